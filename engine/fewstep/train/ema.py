"""Averages of trained networks, updated after each step of the engine that trains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

import fewstep_kernels as fk
from fewstep.train.strategies.base import Strategy


@dataclass
class Average:
    """`average` follows `source`: decay after each update of the source, min(decay, (1 + n) / (10 + n)) with warmup."""

    name: str
    source: str
    decay: float
    warmup: bool = False
    updates: int = 0

    def next_decay(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay


class Averages:
    """All averages of a run. Under ZeRO-3 each rank averages the shards it holds; nothing is gathered."""

    def __init__(self, strategy: Strategy, modules: Mapping[str, nn.Module], averages: list[Average]) -> None:
        self.strategy = strategy
        self._parameters = {name: list(module.parameters()) for name, module in modules.items()}
        self.by_source: dict[str, list[Average]] = {}
        for average in averages:
            self.by_source.setdefault(average.source, []).append(average)

    def after(self, network: str) -> None:
        """One update of every average of that network, all decays in one pass."""
        followers = self.by_source.get(network)
        if not followers:
            return
        parameters = self.strategy.shards(self._parameters[network])
        held = [self.strategy.shards(self._parameters[average.name]) for average in followers]
        fk.ema_update(held, parameters, [average.next_decay() for average in followers])
        for average in followers:
            average.updates += 1

    def state(self) -> dict[str, int]:
        return {average.name: average.updates for group in self.by_source.values() for average in group}

    def load_state(self, state: Mapping[str, int]) -> None:
        for group in self.by_source.values():
            for average in group:
                average.updates = int(state[average.name])
