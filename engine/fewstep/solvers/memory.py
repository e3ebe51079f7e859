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
    """Whether a compiler, an exporter or a transform of torch.func is reading along: then nothing is cached or reused,
    as what is made there is its own kind of tensor."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


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

    def matrix(self, index: int, names: tuple[str, ...]) -> Tensor:
        """[M, K]: the rows of what the stage writes, by name; both halves of a guided call's input have the same."""
        stage = self.plan.stages[index]
        rows = dict(zip((*stage.outputs, "second input"), (*stage.matrix, stage.matrix[-1])))
        return self._cached(("matrix", index, names), lambda: [rows[name] for name in names])

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
    """The tensors of one shape that runs of a plan reuse; by register name.

    `joined` is the input of joined calls. Where networks read x unscaled, x is its first share: one tensor less to
    write a stage, and one less for the cache to hold.
    """

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


def reads_apart(stage: Stage) -> bool:
    """Whether the stage's network reads something else than x: x scaled, or once for each condition."""
    return len(stage.conditions) > 1 or (len(stage.conditions) == 1 and stage.input_scale != 1.0)


def _inputs(asked: int, buffers: Buffers | None) -> tuple[str, ...]:
    """What a map writes, beside x, for a network that reads apart and is asked for so many conditions."""
    if buffers is None:
        return ("input",)
    first = () if buffers["input"] is buffers["x"] else ("input",)
    return (*first, "second input") if asked == 2 else first


def started(stage: Stage, scale: float, buffers: Buffers | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """What a run's first map writes, x and what the first stage's network reads if that is something else, and what
    each of them is of the noise."""
    apart = _inputs(len(stage.conditions), buffers) if reads_apart(stage) else ()
    return ("x", *apart), (scale, *[scale * stage.input_scale] * len(apart))


def targets(plan: Plan, index: int, buffers: Buffers | None) -> tuple[str, ...]:
    """What a stage writes: its outputs, "input" as the buffers of the next network's."""
    names = plan.stages[index].outputs
    if "input" not in names:
        return names
    kept = tuple(name for name in names if name != "input")
    return (*kept, *_inputs(len(plan.stages[index + 1].conditions), buffers))


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
            if all(stage.input_scale == 1.0 for stage in plan.stages if stage.conditions):
                buffers["x"] = buffers["input"]
        elif any(stage.input_scale != 1.0 for stage in plan.stages):
            buffers["input"] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
        for name in {"x", *(name for stage in plan.stages for name in stage.outputs)} - {*buffers, "input"}:
            buffers[name] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
        for name in {name for stage in plan.stages for part in stage.nonlinear for name in part.outputs}:
            # guided estimates cancel and are bounded before they are rounded
            buffers[name] = torch.empty(first.shape, dtype=coefficient_dtype(first), device=first.device)
    mine = [other for other in list(cache) if other[0] == "buffers"]
    for other in mine[: max(0, len(mine) + 1 - _KEPT_SHAPES)]:
        cache.pop(other, None)
    cache[key] = buffers
    return buffers
