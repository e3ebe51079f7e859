"""A plan's numbers as tensors on a device, and the buffers its runs reuse; both live and die with the plan."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.linear import coefficient_dtype
from fewstep.solvers.plans import Plan, Stage
from fewstep.solvers.reading import SHAPED

_KEPT_SHAPES = 8


def tracing() -> bool:
    """Whether a compiler or exporter is reading along: then nothing is cached or reused."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


@dataclasses.dataclass(frozen=True)
class Tables:
    """A plan's numbers as tensors on one device, made once."""

    plan: Plan
    device: torch.device
    dtype: torch.dtype

    def _cached(self, key: tuple[Any, ...], rows: Callable[[], list]) -> Tensor:
        if tracing():
            return torch.tensor(rows(), device=self.device, dtype=self.dtype)
        cache, place = self.plan._device_cache, (*key, self.device, self.dtype)
        if place not in cache:
            with torch.inference_mode(False):
                cache[place] = torch.tensor(rows(), device=self.device, dtype=self.dtype)
        return cache[place]

    def matrix(self, index: int, repeated: bool) -> Tensor:
        """[M, K]; `repeated` doubles the last row, for the two halves of a guided call's input."""
        rows = self.plan.stages[index].matrix
        return self._cached(("matrix", index, repeated), lambda: [*rows, rows[-1]] if repeated else list(rows))

    def mean(self, index: int) -> Tensor:
        """[1, K]: the row of x without its noise, which comes last."""
        stage = self.plan.stages[index]
        row = stage.matrix[stage.outputs.index("x")]
        return self._cached(("mean", index), lambda: [row[: len(row) - noises(stage.inputs)]])

    def part(self, index: int, number: int) -> Tensor:
        rows = self.plan.stages[index].nonlinear[number].matrix
        return self._cached(("part", index, number), lambda: list(rows))

    def start(self, scales: tuple[float, ...]) -> Tensor:
        return self._cached(("start", scales), lambda: [[scale] for scale in scales])

    def read_out(self, index: int) -> Tensor:
        """[1, K]: the registers of the stage's read-out to the denoised estimate."""
        return self._cached(("read out", index), lambda: [[value for _, value in self.plan.stages[index].read_out]])

    def times(self, index: int, asked: int, first: Tensor, buffers: Buffers | None) -> Tensor:
        """The network's time for every sample of a joined call, [asked B]."""
        return self._told(("time", index), self.plan.stages[index].network_time, asked * first.shape[0], first, buffers)

    def landing(self, index: int, size: int, first: Tensor, buffers: Buffers | None) -> Tensor:
        """The network time of the jump's end, [size]."""
        landing = self.plan.stages[index].landing
        assert landing is not None
        return self._told(("landing", index), landing, size, first, buffers)

    def other_times(self, index: int, number: int, first: Tensor, buffers: Buffers | None) -> Tensor:
        """The time of one of the stage's further networks, [B]."""
        told = self.plan.stages[index].others[number].network_time
        return self._told(("time", index, number), told, first.shape[0], first, buffers)

    def _told(self, what: Any, time: float, size: int, first: Tensor, buffers: Buffers | None) -> Tensor:
        if buffers is None:
            return first.new_full((size,), time, dtype=self.dtype)
        return buffers.keep(what, lambda: first.new_full((size,), time, dtype=self.dtype))


def noises(inputs: tuple[str, ...]) -> int:
    """How many of a stage's inputs are noise."""
    return ("noise" in inputs) + (SHAPED in inputs)


class Buffers(dict[Any, Any]):
    """The tensors of one shape that runs of a plan reuse; by register name. `joined` is the input of joined calls."""

    joined: Tensor

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self:
            with torch.inference_mode(False):
                self[key] = make()
        return self[key]

    def input_of(self, asked: int) -> Tensor:
        """What a call of `asked` conditions reads; beyond two, the first's share is copied to the others here."""
        if asked == 1:
            return self["input"]
        size = self["input"].shape[0]
        share = self.keep(("joined", asked), lambda: self.joined[: asked * size])
        if asked > 2:
            share.unflatten(0, (asked, size))[1:].copy_(self["input"])
        return share


def started(stage: Stage, scale: float, buffers: Buffers | None) -> tuple[list[Tensor] | None, tuple[float, ...]]:
    """Where a run's first map writes x and what the first stage's network reads, if that is something else, and what
    each of them is of the noise."""
    asked = len(stage.conditions)
    separate = asked > 1 or (asked == 1 and stage.input_scale != 1.0)
    read = scale * stage.input_scale
    if buffers is None:
        return None, (scale, read) if separate else (scale,)
    if not separate:
        return [buffers["x"]], (scale,)
    if asked == 2:
        return [buffers["x"], buffers["input"], buffers["second input"]], (scale, read, read)
    return [buffers["x"], buffers["input"]], (scale, read)


def targets(plan: Plan, index: int, buffers: Buffers) -> tuple[list[Tensor], tuple[str, ...]]:
    """The buffers a stage writes, with their registers; both halves of a guided call's input."""
    names = plan.stages[index].outputs
    if "input" in names and len(plan.stages[index + 1].conditions) == 2:
        names = (*names, "second input")
    return [buffers[name] for name in names], names


def buffers_of(plan: Plan, first: Tensor) -> Buffers:
    """The buffers of this shape, dtype, device and thread, made on first use; the last eight are kept."""
    key = ("buffers", first.shape, first.dtype, first.device, threading.get_ident())
    cache = plan._device_cache
    if key in cache:
        cache[key] = cache.pop(key)
        return cache[key]
    buffers = Buffers()
    with torch.inference_mode(False):
        most = max(len(stage.conditions) for stage in plan.stages)
        if most > 1:
            buffers.joined = first.new_empty((most * first.shape[0], *first.shape[1:]))
            buffers["input"], buffers["second input"] = buffers.joined.split(len(first))[:2]
        elif any(stage.input_scale != 1.0 for stage in plan.stages):
            buffers["input"] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
        for name in {"x", *(name for stage in plan.stages for name in stage.outputs if name != "input")}:
            buffers[name] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
        for name in {name for stage in plan.stages for part in stage.nonlinear for name in part.outputs}:
            # guided estimates cancel and are bounded before they are rounded
            buffers[name] = torch.empty(first.shape, dtype=coefficient_dtype(first), device=first.device)
    mine = [other for other in list(cache) if other[0] == "buffers"]
    for other in mine[: max(0, len(mine) + 1 - _KEPT_SHAPES)]:
        cache.pop(other, None)
    cache[key] = buffers
    return buffers
