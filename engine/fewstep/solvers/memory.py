"""A plan's numbers as tensors on a device, and the buffers its runs reuse; both live and die with the plan."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import guidance as guiding
from fewstep.solvers.plans import Plan

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
        stage = self.plan.stages[index]
        row = stage.matrix[stage.outputs.index("x")]
        return self._cached(("mean", index), lambda: [row[: len(row) - bool(stage.noise)]])

    def start(self, scales: tuple[float, ...]) -> Tensor:
        return self._cached(("start", scales), lambda: [[scale] for scale in scales])

    def read_out(self, index: int) -> Tensor:
        """[1, 2] or [1, 3]: x and the network's columns to the denoised estimate."""

        def rows() -> list:
            stage = self.plan.stages[index]
            of_x, of_output = (float(v) for v in self.plan.prediction.coefficients(self.plan.schedule, stage.time))
            if not stage.guided:
                return [[of_x, of_output]]
            assert stage.guidance is not None
            return [[of_x, *(of_output * float(weight) for weight in guiding.coefficients(stage.guidance))]]

        return self._cached(("read out", index), rows)

    def times(self, index: int, first: Tensor, buffers: Buffers | None) -> Tensor:
        """The network's time for every sample of the call, [B] or [2 B]."""
        stage = self.plan.stages[index]
        batch = first.shape[0] * (2 if stage.guided else 1)
        if buffers is None:
            return first.new_full((batch,), stage.network_time, dtype=self.dtype)
        return buffers.keep(("time", index), lambda: first.new_full((batch,), stage.network_time, dtype=self.dtype))


class Buffers(dict[Any, Any]):
    """The tensors of one shape that runs of a plan reuse; by register name."""

    doubled: Tensor

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self:
            with torch.inference_mode(False):
                self[key] = make()
        return self[key]


def buffers_of(plan: Plan, first: Tensor) -> Buffers:
    """The buffers of this shape, dtype, device and thread, made on first use; the last eight are kept."""
    key = ("buffers", first.shape, first.dtype, first.device, threading.get_ident())
    cache = plan._device_cache
    if key in cache:
        cache[key] = cache.pop(key)
        return cache[key]
    buffers = Buffers()
    with torch.inference_mode(False):
        if any(stage.guided for stage in plan.stages):
            buffers.doubled = first.new_empty((2 * first.shape[0], *first.shape[1:]))
            buffers["input"], buffers["second input"] = buffers.doubled[: len(first)], buffers.doubled[len(first) :]
        elif any(stage.input_scale != 1.0 for stage in plan.stages):
            buffers["input"] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
        for name in {"x", *(name for stage in plan.stages for name in stage.outputs if name != "input")}:
            buffers[name] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    mine = [other for other in list(cache) if other[0] == "buffers"]
    for other in mine[: max(0, len(mine) + 1 - _KEPT_SHAPES)]:
        cache.pop(other, None)
    cache[key] = buffers
    return buffers
