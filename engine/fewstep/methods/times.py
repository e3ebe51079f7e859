"""At which noise levels a method trains, and at which a student is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.methods.base import MethodConfig, Positive
from fewstep.solvers import grids

Grid = str | dict[str, Any]
Levels = Mapping[int, Sequence[float]]


class TimeLaw(MethodConfig):
    """A law of training times, as a quantile function of a uniform draw; the times lie in [t_min, t_max]."""

    name: Literal["log_normal", "karras", "uniform"] = "karras"
    """log_normal: ln(sigma/alpha) normal; karras: uniform in (sigma/alpha)^(1/rho); uniform: uniform in t."""
    mean: float = -1.2
    """Mean of ln(sigma/alpha) (EDM, arXiv:2206.00364, table 1)."""
    std: Positive = 1.2
    """Standard deviation of ln(sigma/alpha)."""
    rho: Positive = 7.0
    """Exponent of the karras law (arXiv:2206.00364, equation 5)."""
    low: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lowest quantile drawn."""
    high: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Highest quantile drawn; DMD2's student trains on 0.02 .. 0.98 of the levels."""

    @model_validator(mode="after")
    def _in_order(self) -> TimeLaw:
        if self.low > self.high:
            raise UserError(f"low {self.low:g} is not below high {self.high:g}")
        return self

    def __call__(self, schedule: Schedule, uniform: Tensor) -> Tensor:
        """Times [B] from uniform draws [B] in [0, 1)."""
        quantile = self.low + (self.high - self.low) * uniform
        if self.name == "log_normal":
            ratio = torch.exp(self.mean + self.std * torch.special.ndtri(quantile))
            times = schedule.time_of_ratio(ratio)
        elif self.name == "karras":
            first, last = _bounded_ratios(schedule)
            a, b = first ** (1 / self.rho), last ** (1 / self.rho)
            times = schedule.time_of_ratio((a + (b - a) * quantile) ** self.rho)
        else:
            times = schedule.t_min + (schedule.t_max - schedule.t_min) * quantile
        return times.clamp(schedule.t_min, schedule.t_max)


def usual_law(schedule: Schedule, **quantiles: float) -> TimeLaw:
    """Karras levels where sigma/alpha is bounded by 1000, uniform times where it is not (flow: alpha(t_max) = 0)."""
    bounded = schedule.ratio(schedule.t_max) <= 1e3
    return TimeLaw(name="karras" if bounded else "uniform", **quantiles)


def node_times(schedule: Schedule, count: int, grid: Grid = "karras") -> list[float]:
    """`count` >= 2 descending times of `grid` (a name of `solvers.grids`, or one with options) from t_max to t_min."""
    if count < 2:
        raise UserError(f"a grid of times has at least 2 nodes, t_max and t_min; got {count}.")
    options = {"name": grid} if isinstance(grid, str) else dict(grid)
    return list(grids.times({**options, "zero": "none", "end": schedule.t_min}, schedule, count - 1))


def student_grid(schedule: Schedule, steps: int, grid: Grid = "karras", levels: Levels | None = None) -> Any:
    """The grid of a consistency plan of `steps` evaluations: the student is asked at all its times but the last.

    The times are `levels[steps]` where the recipe gives them, otherwise those of `grid` between t_max and t_min.
    """
    given = (levels or {}).get(steps)
    if given is None:
        options = {"name": grid} if isinstance(grid, str) else dict(grid)
        return {**options, "zero": "replace", "end": schedule.t_min}
    times = [float(t) for t in given]
    inside = all(schedule.t_min < t <= schedule.t_max for t in times)
    if len(times) != steps or not inside or any(a <= b for a, b in pairwise(times)):
        raise UserError(
            f"method.levels.{steps} is {times}; give {steps} descending times above {schedule.t_min:g} and up to "
            f"{schedule.t_max:g}."
        )
    return [*times, schedule.t_clean]


def _bounded_ratios(schedule: Schedule) -> tuple[float, float]:
    first, last = schedule.ratio(schedule.t_min), schedule.ratio(schedule.t_max)
    if not math.isfinite(last):
        raise UserError(
            f"karras times need a finite noise-to-signal ratio; schedule {schedule.name!r} has none at t_max."
        )
    return first, last
