"""`adamw_ema_step` as a torch.optim.Optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import registration
from .adamw_ema import MOST_AVERAGES, adamw_ema_step
from .decay_profiles import DecayProfile
from .ema import check_averages, element_origins
from .l2norm import clip_coefficient, multi_tensor_l2norm
from .packed_step import PackedStep


class AdamWEma(torch.optim.Optimizer):
    """AdamW that clips, averages and writes the low-precision copy in the same pass.

    lr may be a 0-d tensor on the parameters' device; nothing here reads a tensor on the host, so a step can be captured
    in a CUDA graph. profiles: a decay profile for each average; `averages(k)` lists them, in average_dtype (None: the
    parameters' own; bfloat16 ones need a seed, or they stall). working: a tensor for each parameter, in their order,
    that receives a copy of it, or None. max_norm clips by the norm of all gradients. A step is skipped whole, on the
    device, when that norm is not finite (skip_nonfinite asks for this without clipping; it costs one more read of the
    gradients). Groups may hold `weight_decay_mask`, a bool for each parameter. Under a torch.amp.GradScaler gradients
    are unscaled in the same pass. `follow` hands over averages that the caller holds, such as another module's
    parameters.

    The state dict is torch.optim.AdamW's (exp_avg, exp_avg_sq, step), and each loads the other's; averages come along
    as average_0, average_1, ... and their number of updates as a group's `updates`.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        profiles: Sequence[DecayProfile] = (),
        average_dtype: torch.dtype | None = torch.float32,
        working: Sequence[Tensor | None] | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        seed: int | None = None,
    ) -> None:
        if len(profiles) > MOST_AVERAGES:
            raise ValueError(f"AdamWEma keeps at most {MOST_AVERAGES} averages; got {len(profiles)} profiles.")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, or None; got {max_norm}.")
        self.profiles, self.average_dtype, self.seed = tuple(profiles), average_dtype, seed
        self.max_norm, self.skip_nonfinite = max_norm, skip_nonfinite
        self.norm: Tensor | None = None  # of the last step's gradients, before clipping; on the device
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "weight_decay_mask": None}
        super().__init__(params, defaults)
        parameters = [p for group in self.param_groups for p in group["params"]]
        if working is not None and len(working) != len(parameters):
            raise ValueError(f"AdamWEma got {len(working)} working copies for {len(parameters)} parameters.")
        self._working = {} if working is None else dict(zip(parameters, working))
        self._followers: dict[int, list[Sequence[Tensor]]] = {}  # of each group, by its position
        self._packed: dict[int, tuple[Any, PackedStep | None]] = {}  # what it was made of beside tensors, the tables

    def follow(self, averages: Sequence[Sequence[Tensor]], decays: Sequence[float | Tensor], group: int = 0) -> None:
        """Let `step` also average a group's parameters in tensors of the caller's, which no state dict holds.

        averages: lists of tensors like the group's parameters, in their order, and a decay each. The decays lie in
        `param_groups[group]["decays"]`, where the next ones may be put before each step as learning rates are. Raises
        ValueError for a number or shapes that do not fit.
        """
        parameters = self.param_groups[group]["params"]
        if len(averages) != len(decays) or len(self.profiles) + len(averages) > MOST_AVERAGES:
            raise ValueError(
                f"AdamWEma keeps at most {MOST_AVERAGES} averages, with a decay each; got {len(averages)} more and "
                f"{len(decays)} decays beside {len(self.profiles)} profiles."
            )
        check_averages(averages, parameters)
        self._followers[group] = [list(tensors) for tensors in averages]
        self._packed.pop(group, None)
        self.param_groups[group]["decays"] = list(decays)

    def _ready(self, parameter: Tensor, moments: bool = True) -> dict[str, Any]:
        """The parameter's state, made where it is missing; an average starts at the parameter's value now."""
        state = self.state[parameter] if moments or self.profiles else {}
        if moments and "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif moments and state["step"].device != parameter.device:  # torch's AdamW keeps it on the host
            state["step"] = state["step"].to(parameter.device)
        for k in range(len(self.profiles)):
            if f"average_{k}" not in state:
                dtype = self.average_dtype or parameter.dtype
                state[f"average_{k}"] = parameter.detach().to(dtype, copy=True, memory_format=torch.preserve_format)
        return state

    def averages(self, profile: int = 0) -> list[Tensor]:
        """The averages of one profile, one for each parameter in the groups' order: live tensors, not copies."""
        if not 0 <= profile < len(self.profiles):
            raise ValueError(f"profile must be in [0, {len(self.profiles)}); got {profile}.")
        return [self._ready(p, False)[f"average_{profile}"] for group in self.param_groups for p in group["params"]]

    def _scale_and_guard(self, gradients: list[Tensor], norm: Tensor | None) -> tuple[float | Tensor, Tensor | None]:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale: float | Tensor = 1.0 if grad_scale is None else 1.0 / grad_scale.squeeze()
        guard = None
        if norm is None and gradients and (self.max_norm is not None or self.skip_nonfinite):
            norm = multi_tensor_l2norm(gradients) * scale
        self.norm = norm
        if norm is not None:
            guard = norm
            if self.max_norm is not None:
                scale = clip_coefficient(norm, self.max_norm) * scale
        if found_inf is not None:
            stop = torch.where(found_inf.squeeze() > 0, torch.inf, 0.0)
            guard = stop if guard is None else guard + stop
        return scale, guard

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, norm: Tensor | None = None) -> Any:
        """One update. norm: the norm of all gradients (of all ranks) where these are only a part of them; else it is
        computed here when it is needed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale, guard = self._scale_and_guard(given, norm)
        offset = 0
        for position, group in enumerate(self.param_groups):
            parameters = group["params"]
            followers = self._followers.get(position, [])
            # without an average, a parameter that has no gradient has nothing to do here
            kept = [i for i, p in enumerate(parameters) if p.grad is not None or self.profiles or followers]
            if kept:
                self._step_group(position, kept, offset, scale, guard)
            if position + 1 < len(self.param_groups):
                offset += sum(-(-p.numel() // 8) * 8 for p in parameters)
        return loss

    def _step_group(
        self, position: int, kept: list[int], offset: int, scale: float | Tensor, guard: Tensor | None
    ) -> None:
        group, followers = self.param_groups[position], self._followers.get(position, [])
        parameters = [group["params"][i] for i in kept]
        device = parameters[0].device
        updates = group.get("updates")
        if updates is None:
            updates = torch.zeros((), dtype=torch.float64)
        if updates.device != device:
            updates = updates.to(device)
        group["updates"] = updates.add_(1.0 if guard is None else torch.isfinite(guard))
        lr, decay, mask = group["lr"], group["weight_decay"], group["weight_decay_mask"]
        if mask is not None and len(mask) != len(group["params"]):
            raise ValueError(f"weight_decay_mask has {len(mask)} entries for {len(group['params'])} parameters.")
        lr = lr.to(device) if isinstance(lr, Tensor) else lr
        decays = [profile.at(updates) for profile in self.profiles] + (group["decays"] if followers else [])
        made_of = (kept, offset, decay, None if mask is None else list(mask))
        before, packed = self._packed.get(position, (None, None))
        quiet = registration.quiet()
        known = quiet and before == made_of
        if known and packed is not None and packed.current(parameters, [self.state.get(p) for p in parameters]):
            packed.step(lr, group["betas"], group["eps"], scale, guard, self.seed, updates, decays)
            return
        states = [self._ready(p, p.grad is not None) for p in parameters]
        averages = [[state[f"average_{k}"] for state in states] for k in range(len(self.profiles))]
        averages += [[tensors[i] for i in kept] for tensors in followers]
        weight_decays = [decay if mask is None or mask[i] else 0.0 for i in kept]
        copies = [self._working.get(p) for p in parameters]
        origins = [offset + start for start in element_origins(group["params"])]
        origins = [origins[i] for i in kept]
        adamw_ema_step(
            parameters,
            [p.grad for p in parameters],
            [state.get("exp_avg") for state in states],
            [state.get("exp_avg_sq") for state in states],
            [state.get("step") for state in states],
            lr=lr,
            betas=group["betas"],
            epsilon=group["eps"],
            weight_decay=weight_decays,
            gradient_scale=scale,
            guard=guard,
            averages=averages,
            decays=decays,
            working=copies,
            seed=self.seed,
            update=updates,
            origins=origins,
        )
        if quiet:
            kept_states = [self.state.get(p) for p in parameters]
            packed = PackedStep.pack(parameters, kept_states, averages, weight_decays, copies, origins)
            self._packed[position] = (made_of, packed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of AdamWEma or torch.optim.AdamW; averages it lacks start at the parameters' values.

        Raises ValueError when it is of an AdamW with amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"AdamWEma has no {option}; the state dict is of an optimiser that uses it.")
        decays = [group.get("decays") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, saved, held in zip(self.param_groups, state_dict["param_groups"], decays):
            group.setdefault("weight_decay_mask", None)
            if held is not None:
                group["decays"] = held
            steps = []
            for parameter, number in zip(group["params"], saved["params"]):
                state, given = self.state.get(parameter, {}), state_dict["state"].get(number, {})
                for name, value in given.items():  # torch casts to the parameter's dtype, which would cost digits
                    if name.startswith("average_"):
                        state[name] = value.detach().to(parameter.device, copy=True)
                if "step" in state:
                    steps.append(float(state["step"]))
            if "updates" not in saved and steps:
                group["updates"] = torch.tensor(max(steps), dtype=torch.float64)
