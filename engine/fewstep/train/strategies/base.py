"""What a strategy gives the trainer: engines for trained networks, homes for frozen ones, and a few collectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.methods import OptimizerConfig
from fewstep.nets.network import Network
from fewstep_kernels import AdamWEma

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Engine(ABC):
    """Networks trained by one loss: one optimiser, one gradient norm, one learning-rate schedule.

    networks: {name: module}; optimizers: the configuration of each; clip: the largest norm over all of them, or None.
    """

    def __init__(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, OptimizerConfig],
        clip: float | None,
        warmup: int,
    ) -> None:
        self.name = name
        self.networks = dict(networks)
        self.configs = dict(optimizers)
        self.clip = clip
        self.warmup = warmup
        self.updates = 0  # steps taken since the start or the last restart

    @abstractmethod
    def forward(self, network: str) -> Callable[..., Any] | None:
        """What a trained call of that network goes through; None for the module itself."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`; `last` marks the last micro-batch before the step."""

    @abstractmethod
    def step(self, decays: Mapping[str, Sequence[float]] | None = None) -> Tensor:
        """Clip, step, move the averages that follow, forget the gradients; the norm before clipping, on the device.

        decays: of the averages of each network, in the order in which they follow.
        """

    def follow(self, network: str, averages: Sequence[Sequence[nn.Parameter]]) -> Sequence[int]:
        """Let `step` move averages of a network of this engine; averages: their parameters, in the network's order.

        Returns the positions of the parameters whose averages this engine does not move.
        """
        return range(len(averages[0]))

    @abstractmethod
    def has_gradients(self) -> bool:
        """Whether any gradient is waiting: a leak, before this engine's turn."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The optimiser's whole state on the CPU, {"<network>.<parameter>|<moment>": tensor}; every rank takes part."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, whatever strategy wrote it."""

    @abstractmethod
    def restart(self) -> None:
        """Forget the optimiser's state and the warm-up."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """{"<network>.<parameter>": parameter} of everything trained here."""
        return {
            f"{name}.{parameter_name}": parameter
            for name, module in self.networks.items()
            for parameter_name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def groups(self) -> list[dict[str, Any]]:
        """One parameter group a network."""
        return [
            {
                "params": [p for p in module.parameters() if p.requires_grad],
                "lr": self.configs[name].lr,
                "weight_decay": self.configs[name].weight_decay,
                **_moments(self.configs[name]),
            }
            for name, module in self.networks.items()
        ]

    def optimizer(self, clips: bool) -> torch.optim.Optimizer:
        """The optimiser of the engine's (first) configuration: ours, which may clip as well, or torch's fused one."""
        name = next(iter(self.configs.values())).name
        if name == "adamw":
            return AdamWEma(self.groups(), max_norm=self.clip if clips else None, skip_nonfinite=clips)
        fused = {"torch_adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        if name in fused:
            return fused[name](self.groups(), fused=True)
        return torch.optim.RAdam(self.groups(), foreach=True)

    def learning_rates(self) -> list[float]:
        """The rate of each group for the coming step: risen linearly over the first `warmup` steps."""
        share = min(1.0, (self.updates + 1) / self.warmup) if self.warmup else 1.0
        return [config.lr * share for config in self.configs.values()]


class Strategy(ABC):
    """Processes, devices and collectives."""

    name = ""
    exact_tangents = True  # whether forward mode runs

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.device, self.rank, self.world = device, rank, world

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @abstractmethod
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
        """An engine over these networks, which are already on the device."""

    def network(self, module: nn.Module, forward: Callable[..., Any] | None = None) -> Network:
        """How a method holds the module."""
        return Network(module, forward)

    def frozen(self, module: nn.Module) -> nn.Module:
        """The home of a network that is never trained (a teacher, an average)."""
        return module

    def shards(self, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        """The part of each parameter this rank holds; modules of one architecture give matching lists."""
        return parameters

    def gather(self, module: nn.Module) -> dict[str, Tensor]:
        """The whole state on the CPU (on the leading rank; others may get less); every rank takes part."""
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()} if self.leads else {}

    def scatter(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put a whole state, given on every rank, into a module, trained or frozen."""
        module.load_state_dict(state)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def barrier(self) -> None:  # noqa: B027
        """Wait for every rank."""

    def close(self) -> None:  # noqa: B027
        """Leave the group of processes."""


def copy_module(strategy: Strategy, source: nn.Module, destination: nn.Module) -> None:
    """Copy the parameters and buffers of one module into another of the same architecture."""
    ours, theirs = (strategy.shards(list(module.parameters())) for module in (destination, source))
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
        for mine, other in zip(destination.buffers(), source.buffers(), strict=True):
            mine.copy_(other)


def norm_of(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The 2-norm of all gradients together, [] on the device."""
    if not gradients:
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm(gradients, foreach=True)


def _moments(config: OptimizerConfig) -> dict[str, Any]:
    if config.name == "sgd":
        return {"momentum": config.betas[0]}
    return {"betas": (float(config.betas[0]), float(config.betas[1])), "eps": config.eps}
