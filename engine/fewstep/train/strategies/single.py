"""One process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.methods import OptimizerConfig
from fewstep.train.strategies.base import MOMENTS, Engine, Strategy, norm_of
from fewstep_kernels import AdamWEma
from fewstep_kernels.adamw_ema import MOST_AVERAGES


class LocalEngine(Engine):
    """Whole parameters and whole optimiser states in this process.

    AdamWEma clips, steps and moves the averages in one pass. torch's fused optimisers get the clip factor and the flag
    of a non-finite norm as their gradient scale and `found_inf`. Neither waits for the device: a non-finite norm leaves
    weights and state untouched.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.torch_optimizer: Any = self.optimizer(
            clips=True
        )  # has grad_scale and found_inf, which its type does not tell
        self._trained = [p for group in self.torch_optimizer.param_groups for p in group["params"]]
        self._following: set[str] = set()

    def follow(self, network: str, averages: Sequence[Sequence[nn.Parameter]]) -> Sequence[int]:
        optimizer = self.torch_optimizer
        if not isinstance(optimizer, AdamWEma) or len(averages) > MOST_AVERAGES:
            return super().follow(network, averages)
        trained = [p.requires_grad for p in self.networks[network].parameters()]
        lists = [list(compress(parameters, trained)) for parameters in averages]
        optimizer.follow(lists, [1.0] * len(lists), list(self.networks).index(network))
        self._following.add(network)
        return [i for i, ours in enumerate(trained) if not ours]

    def forward(self, network: str) -> Callable[..., Any] | None:
        return None

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, decays: Mapping[str, Sequence[float]] | None = None) -> Tensor:
        for name, group, rate in zip(self.networks, self.torch_optimizer.param_groups, self.learning_rates()):
            group["lr"] = rate
            if name in self._following:
                group["decays"] = list((decays or {})[name])
        norm = self._step()
        self.torch_optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def _step(self) -> Tensor:
        if isinstance(self.torch_optimizer, AdamWEma):
            self.torch_optimizer.step()
            norm = self.torch_optimizer.norm
            return torch.zeros((), device=self._trained[0].device) if norm is None else norm
        norm = norm_of([p.grad for p in self._trained if p.grad is not None], self._trained[0].device)
        if getattr(self.torch_optimizer, "_step_supports_amp_scaling", False):
            scale = ((norm + 1e-6) / self.clip).clamp_min(1.0) if self.clip else torch.ones_like(norm)
            self.torch_optimizer.grad_scale = scale.float()
            self.torch_optimizer.found_inf = (~torch.isfinite(norm)).float()
            self.torch_optimizer.step()
        elif torch.isfinite(norm):
            if self.clip:
                torch.nn.utils.clip_grads_with_norm_(self._trained, self.clip, norm)
            self.torch_optimizer.step()
        return norm

    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._trained)

    def state(self) -> dict[str, Tensor]:
        state = {}
        for name, parameter in self.parameters().items():
            for key, value in self.torch_optimizer.state.get(parameter, {}).items():
                if key in MOMENTS or key == "step":
                    state[f"{name}|{key}"] = torch.as_tensor(value).detach().cpu().clone()
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.torch_optimizer.state.clear()
        parameters = self.parameters()
        for entry, value in state.items():
            name, _, key = entry.rpartition("|")
            parameter = parameters[name]
            self.torch_optimizer.state[parameter][key] = value.to(parameter.device, copy=True)

    def restart(self) -> None:
        self.torch_optimizer.state.clear()
        self.updates = 0


class Single(Strategy):
    """One process, one device."""

    name = "single"

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
        return LocalEngine(name, networks, optimizers, clip, warmup)
