"""Averages of trained networks, moved by each step of the engine that trains them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

import fewstep_kernels as fk
from fewstep.train.strategies.base import Engine, Strategy


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
    """All averages of a run. An engine moves those it can within its step; the others move here, in one pass after it.

    A skipped update moves no average of a network whose engine moves them; it counts all the same. Under ZeRO-3 each
    rank averages the shards it holds; nothing is gathered.
    """

    def __init__(
        self,
        strategy: Strategy,
        modules: Mapping[str, nn.Module],
        averages: Sequence[Average],
        engines: Mapping[str, Engine],
    ) -> None:
        self.strategy = strategy
        self.by_source: dict[str, list[Average]] = {}
        for average in averages:
            self.by_source.setdefault(average.source, []).append(average)
        self._apart: dict[str, list[list[nn.Parameter]]] = {}  # [network, each of its averages], matching parameters
        for source, followers in self.by_source.items():
            lists = [list(modules[name].parameters()) for name in (source, *(average.name for average in followers))]
            engine = engines.get(source)
            rest = range(len(lists[0])) if engine is None else engine.follow(source, lists[1:])
            self._apart[source] = [[parameters[i] for i in rest] for parameters in lists]

    def decays(self, networks: Iterable[str]) -> dict[str, list[float]]:
        """The decays of the coming update, for each network that has averages."""
        return {
            name: [average.next_decay() for average in self.by_source[name]]
            for name in networks
            if name in self.by_source
        }

    def after(self, network: str) -> None:
        """Count an update of that network, and move what its engine did not, all decays in one pass."""
        followers = self.by_source.get(network, [])
        if followers and self._apart[network][0]:
            parameters, *held = (self.strategy.shards(parameters) for parameters in self._apart[network])
            fk.ema_update(held, parameters, [average.next_decay() for average in followers])
        for average in followers:
            average.updates += 1

    def state(self) -> dict[str, int]:
        return {average.name: average.updates for group in self.by_source.values() for average in group}

    def load_state(self, state: Mapping[str, int]) -> None:
        for group in self.by_source.values():
            for average in group:
                average.updates = int(state[average.name])
