"""DeepSpeed ZeRO: optimiser states (stage 1), gradients (2) and parameters (3) shared out over the ranks.

Measured with DeepSpeed 0.19.8 and held by tests/train/test_traps.py:
- a trained network is called through its engine only; frozen, as a module (through the engine backward raises);
- a frozen network under stage 3 has an engine of its own, without an optimiser, so that a rank holds its share only;
- `gradient_clipping` is always set: left out, DeepSpeed clips at 1.0;
- stage 3 raises under forward mode, so `tangent` is refused here in one sentence.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.methods import OptimizerConfig
from fewstep.nets.lora import Adapted
from fewstep.nets.network import Network, Way
from fewstep.train.strategies.base import MOMENTS, Engine, Strategy
from fewstep.train.strategies.ddp import Ddp

GATHERED_ELEMENTS = 64 * 2**20


def library(device: torch.device) -> Any:
    """DeepSpeed, imported and joined to the group of processes that torch made.

    On the CPU its shared-memory collectives are left out: building them takes a minute of g++ and gloo serves.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed insists, launcher or not
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "train.strategy 'deepspeed' needs the package deepspeed; pip install deepspeed==0.19.8."
        ) from None
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not deepspeed.comm.is_initialized():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


class Roles(nn.Module):
    """Several networks of one engine, called by name."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.roles = nn.ModuleDict(networks)

    def forward(self, role: str, *inputs: Any, **named: Any) -> Any:
        return self.roles[role](*inputs, **named)


class ZeroNetwork(Network):
    """A network whose parameters are shared out (stage 3): no forward mode, and taps that announce their backward.

    DeepSpeed fetches a module's parameters when the gradient enters its outputs and releases them when it leaves by
    its inputs. A tap enters in the middle, so that the modules around it would be released without a fetch, which
    raises; here the tap's gradient passes the entrances of those modules first.
    """

    def __init__(
        self, module: nn.Module, engine: Callable[..., Any] | None = None, root: nn.Module | None = None
    ) -> None:
        super().__init__(module, engine)
        self.root = root

    def features(
        self, *inputs: Any, at: str | Sequence[str], way: Way = "call", **named: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        answer, taps = super().features(*inputs, at=at, way=way, **named)
        top = self.root if way == "call" and self.root is not None else self.module
        return answer, {name: self._entered(top, self.layers.get_submodule(name), tap) for name, tap in taps.items()}

    def _entered(self, top: nn.Module, tapped: nn.Module, tap: Tensor) -> Tensor:
        if tap.requires_grad:
            if self.layers is self.net:
                around = _holding(top, tapped)
            else:  # an adapter's base is outside its tree
                around = [*_holding(top, self.net), self.net, *_holding(self.layers, tapped)]
            for module in reversed(around):
                entrance: Any = getattr(module, "pre_bwd_fn", None)
                if entrance is not None:
                    tap = entrance.apply(tap)
        return tap

    def tangent(self, primals: Sequence[Tensor], tangents: Sequence[Tensor], **named: Any) -> tuple[Tensor, Tensor]:
        raise UserError(
            "a tangent (forward mode) cannot be taken under train.zero_stage 3, whose hooks raise; "
            "set train.zero_stage to 1 or 2."
        )


def _holding(root: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The modules of a tree that hold `part`, the root first."""
    return [m for m in root.modules() if m is not part and any(inner is part for inner in m.modules())]


class ZeroEngine(Engine):
    """One DeepSpeed engine over all networks trained by one loss.

    Averages do not move within its step (`follow` is not met): the optimiser sees flat float32 pieces cut across
    parameters, while stages 1 and 2 keep averages whole and stage 3 cuts them parameter by parameter.
    """

    def __init__(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, OptimizerConfig],
        clip: float | None,
        warmup: int,
        *,
        stage: int,
        configuration: Mapping[str, Any],
        deepspeed: Any,
        frozen: Mapping[int, Any],
    ) -> None:
        super().__init__(name, networks, optimizers, clip, warmup)
        self.stage = stage
        self.frozen = frozen  # the engines of frozen networks, under stage 3
        self.deepspeed = deepspeed
        self.zero, *_ = deepspeed.initialize(
            model=Roles(networks),
            optimizer=self.optimizer(clips=False),
            config={**configuration, "gradient_clipping": clip or 0.0},
            dist_init_required=False,
        )
        self._trained = self.parameters()

    def forward(self, network: str) -> Callable[..., Any]:
        return functools.partial(self.zero, network)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.zero.set_gradient_accumulation_boundary(last)
        self.zero.backward(loss, scale_wrt_gas=False)

    def step(self, decays: Mapping[str, Sequence[float]] | None = None) -> Tensor:
        for group, rate in zip(self.zero.optimizer.param_groups, self.learning_rates()):
            group["lr"] = rate
        self.zero.step()
        if any(isinstance(getattr(network, "net", None), Adapted) for network in self.networks.values()):
            for engine in self.frozen.values():  # layers of an adapter's base that no gradient left again stay gathered
                engine.optimizer.partition_all_parameters()
        self.updates += 1
        return torch.as_tensor(self.zero.get_global_grad_norm())

    def has_gradients(self) -> bool:
        """Seen while they are whole (stage 1), or waiting in DeepSpeed's own buffers (2 and 3)."""
        if any(p.grad is not None for p in self._trained.values()):
            return True
        waiting = getattr(self.zero.optimizer, "averaged_gradients", None) or {}
        return any(gradients is not None for gradients in waiting.values())

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [state for flat in self._flat() if (state := self._torch_optimizer.state.get(flat))]
        if not states:
            return {}
        self._link()
        leads, whole = dist.get_rank() == 0, {}
        for name, parameter in self._trained.items():
            for key in (key for key in MOMENTS if key in states[0]):  # one order on all ranks
                moment = safe_get_full_optimizer_state(parameter, key)
                if leads:
                    whole[f"{name}|{key}"] = moment.detach().cpu().reshape(_whole_shape(parameter)).clone()
            if leads and "step" in states[0]:
                whole[f"{name}|step"] = torch.as_tensor(states[0]["step"]).detach().cpu().clone()
        return whole

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        keys = {entry.rpartition("|")[2] for entry in state}
        if not keys:
            return self.restart()
        steps = {float(value) for entry, value in state.items() if entry.endswith("|step")}
        if len(steps) > 1:
            raise UserError(
                f"engine {self.name!r} cannot resume under ZeRO: its parameters took unequal numbers of steps."
            )
        for flat in self._flat():
            own = self._torch_optimizer.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS if key in keys}
            if steps:
                own["step"] = torch.tensor(next(iter(steps)), device=flat.device)
        self._link()
        for name, parameter in self._trained.items():
            for key in (key for key in MOMENTS if f"{name}|{key}" in state):
                value = state[f"{name}|{key}"].to(parameter.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value, key)
                else:
                    safe_set_local_optimizer_state(parameter, _share(value, parameter), key)

    def restart(self) -> None:
        for flat in self._flat():
            for value in self._torch_optimizer.state.get(flat, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()
        self.updates = 0

    def _link(self) -> None:
        """Show stages 1 and 2 their states by parameter: they do so once, after the step of the first group only."""
        if self.stage < 3:
            self.zero.optimizer._hp_optimizer_states_linked = False
            self.zero.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.zero.optimizer.optimizer

    def _flat(self) -> list[Tensor]:
        """The flat float32 partitions this rank's optimiser steps."""
        if self.stage == 3:
            return list(self.zero.optimizer.fp32_partitioned_groups_flat)
        return list(self.zero.optimizer.single_partition_of_fp32_groups)


class DeepSpeed(Ddp):
    """ZeRO stage 1, 2 or 3; `options` are merged into DeepSpeed's configuration (`train.deepspeed` of the recipe)."""

    name = "deepspeed"

    def __init__(
        self, device: torch.device, rank: int, world: int, *, stage: int = 2, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(device, rank, world)
        self.stage = stage
        self.options = dict(options or {})
        self.exact_tangents = stage < 3
        self.deepspeed = library(device)
        self._engines: dict[int, Any] = {}  # frozen ones by the identity of their module
        self._owners: list[ZeroEngine] = []

    def engine(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, OptimizerConfig],
        *,
        clip: float | None,
        warmup: int,
        micro_batch: int,
        accumulate: int,
    ) -> Engine:
        for module in networks.values():
            for parameter in module.parameters():
                dist.broadcast(parameter.data, 0)
        configuration = self._configuration(micro_batch, accumulate)
        with self._accepted():
            engine = ZeroEngine(
                name,
                networks,
                optimizers,
                clip,
                warmup,
                stage=self.stage,
                configuration=configuration,
                deepspeed=self.deepspeed,
                frozen=self._engines,
            )
        self._owners.append(engine)
        return engine

    def network(self, module: nn.Module, forward: Callable[..., Any] | None = None) -> Network:
        if self.stage < 3:
            return Network(module, forward)
        zero: Any = forward.func if isinstance(forward, functools.partial) else None
        return ZeroNetwork(module, forward, zero.module if zero is not None else None)

    def frozen(self, module: nn.Module) -> nn.Module:
        if self.stage < 3 or not any(True for _ in module.parameters()):
            return module
        with self._accepted():
            engine, *_ = self.deepspeed.initialize(
                model=module, config={**self._configuration(1, 1), "gradient_clipping": 0.0}, dist_init_required=False
            )
        self._engines[id(module)] = engine
        return module

    def shards(self, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        return parameters if self.stage < 3 else [getattr(p, "ds_tensor", p) for p in parameters]

    def gather(self, module: nn.Module) -> dict[str, Tensor]:
        if self.stage < 3:
            return super().gather(module)
        state: dict[str, Tensor] = {}
        for part in _parts(module):
            with self.deepspeed.zero.GatheredParameters(list(part.values())):
                if self.leads:
                    state.update({name: p.detach().cpu().clone() for name, p in part.items()})
        if self.leads:
            whole = set(module.state_dict())
            state.update({n: b.detach().cpu().clone() for n, b in module.named_buffers() if n in whole})
        return state

    def scatter(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        if self.stage < 3:
            module.load_state_dict(state)
        else:
            for name, parameter in module.named_parameters():
                if hasattr(parameter, "ds_tensor"):
                    parameter.ds_tensor.copy_(_share(state[name].to(parameter.device), parameter))
                else:
                    parameter.data.copy_(state[name])
            for name, buffer in module.named_buffers():
                if name in state:
                    buffer.copy_(state[name])
        self.refresh(module)

    def refresh(self, module: nn.Module) -> None:
        """Tell an engine that its network's parameters were written to from outside."""
        for owner in self._owners:
            if not any(module is network for network in owner.networks.values()):
                continue
            if self.stage < 3:
                owner.zero.optimizer.refresh_fp32_params()
                continue
            from deepspeed.utils import safe_set_local_fp32_param

            for parameter in module.parameters():
                safe_set_local_fp32_param(parameter, self.shards([parameter])[0])

    @contextlib.contextmanager
    def _accepted(self) -> Iterator[None]:
        """What DeepSpeed says against the recipe's own options is told as a mistake in them."""
        try:
            yield
        except (AssertionError, ValueError, TypeError, LookupError, AttributeError) as error:
            if not self.options:
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"DeepSpeed does not take train.deepspeed {self.options} ({reason}).") from None

    def _configuration(self, micro_batch: int, accumulate: int) -> dict[str, Any]:
        zero = {"stage": self.stage, "overlap_comm": self.device.type == "cuda"}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        options = dict(self.options)
        with self._accepted():
            zero.update(options.pop("zero_optimization", {}))
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulate,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            **options,
            "zero_optimization": zero,
        }


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _share(value: Tensor, parameter: Any) -> Tensor:
    """This rank's flat piece of a whole tensor, the last one padded with zeros, as stage 3 cuts it."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * dist.get_world_size(), dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value.reshape(-1)
    return padded.narrow(0, size * dist.get_rank(), size)


def _parts(module: nn.Module) -> list[dict[str, nn.Parameter]]:
    """The parameters in runs of a bounded number of elements, so that gathering never holds a whole large model."""
    parts: list[dict[str, nn.Parameter]] = [{}]
    held = 0
    for name, parameter in module.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if parts[-1] and held + size > GATHERED_ELEMENTS:
            parts.append({})
            held = 0
        parts[-1][name] = parameter
        held += size
    return parts


__all__ = ["DeepSpeed", "Roles", "Strategy", "ZeroEngine", "ZeroNetwork", "library"]
