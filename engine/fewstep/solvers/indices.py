"""Time grids made of published tables: Stable Diffusion's spacings of its 1000 indices, LCM's, consistency models', and
Align-Your-Steps'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewstep.diffusion.schedules import DiscreteVariancePreserving, Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import spacing


def _train_steps(schedule: Schedule, grid: str, steps: int) -> int:
    if not isinstance(schedule, DiscreteVariancePreserving):
        raise UserError(f"grid {grid!r} counts the indices of sd and sdxl, not {schedule.name!r}; use 'uniform'.")
    if steps > schedule.train_steps:
        raise UserError(f"grid {grid!r} has {schedule.train_steps} indices and got {steps} steps; take fewer.")
    return schedule.train_steps


def _ended(schedule: Schedule, values: list[float], end: float | None) -> list[float]:
    return [*(float(value) for value in values), schedule.t_clean if end is None else float(end)]


def leading(schedule: Schedule, steps: int, offset: int = 1, end: float | None = None) -> list[float]:
    """Multiples of T // N, plus `offset` (1 for Stable Diffusion): the first evaluation is well below T."""
    stride = _train_steps(schedule, "leading", steps) // steps
    return _ended(schedule, [min(i * stride + offset, schedule.last_time) for i in reversed(range(steps))], end)


def trailing(schedule: Schedule, steps: int, end: float | None = None) -> list[float]:
    """round(T - i T/N) - 1: from the last index (what few-step students are trained for)."""
    train = _train_steps(schedule, "trailing", steps)
    return _ended(schedule, [round(train - i * train / steps) - 1 for i in range(steps)], end)


def linspace(schedule: Schedule, steps: int, drop_last: bool = False, end: float | None = None) -> list[float]:
    """N points from the last index to index 0; with `drop_last` the first N of N + 1, rounded.

    diffusers says "linspace" for both: Euler and DDIM take the first, DPM-Solver, UniPC and DEIS the second.
    """
    last = _train_steps(schedule, "linspace", steps) - 1
    if drop_last:
        return _ended(schedule, [round(last * (steps - i) / steps) for i in range(steps)], end)
    return _ended(
        schedule, [last * (steps - 1 - i) / max(steps - 1, 1) for i in range(steps)] if steps > 1 else [last], end
    )


def lcm(schedule: Schedule, steps: int, original_steps: int = 50, end: float | None = None) -> list[float]:
    """LCM's training indices T/50 k - 1, N of them even in k: 999, 759, 499, 259 for N = 4 (2310.04378)."""
    train = _train_steps(schedule, "lcm", steps)
    if not steps <= original_steps <= train:
        raise UserError(f"grid 'lcm' got original_steps={original_steps!r} for {steps} steps; give {steps} to {train}.")
    stride = train // original_steps
    falling = [stride * k - 1 for k in range(original_steps, 0, -1)]
    return _ended(schedule, [falling[math.floor(i * original_steps / steps)] for i in range(steps)], end)


def cm(
    schedule: Schedule,
    steps: int,
    train_steps: int = 40,
    picked: Sequence[int] | None = None,
    rho: float = 7.0,
    end: float | None = None,
) -> list[float]:
    """Consistency models' sampling times, of the levels they are trained between (2303.01469, appendix C).

    Of `train_steps` Karras levels, counted from t_max, every (train_steps // steps)-th, as in diffusers'
    CMStochasticIterativeScheduler, or those `picked`: [0, 22] on ImageNet-64, [0, 17] on LSUN.
    """
    if train_steps < max(steps, 2):
        raise UserError(f"grid 'cm' got train_steps={train_steps!r} for {steps} steps; give at least {max(steps, 2)}.")
    if not rho > 0:
        raise UserError(f"grid 'cm' got rho={rho!r}; give a number above 0 (the paper's is 7).")
    chosen = [i * (train_steps // steps) for i in range(steps)] if picked is None else list(picked)
    if len(chosen) != steps or any(isinstance(i, bool) or i not in range(train_steps) for i in chosen):
        raise UserError(f"grid 'cm' got picked={chosen!r}; give {steps} indices from 0 to {train_steps - 1}.")
    levels = spacing.karras(schedule, train_steps - 1, zero="none", rho=rho)
    return _ended(schedule, [levels[i] for i in chosen], end)


# 2404.14507, appendix; the ten-step sigmas as NVIDIA and diffusers publish them
_ALIGNED = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}
_ALIGNED_FOR = {"sd": "sd15", "sdxl": "sdxl", "edm": "svd"}


def align_your_steps(schedule: Schedule, steps: int, model: str | None = None, end: float | None = None) -> list[float]:
    """Sigmas optimised per model (2404.14507): `model` is sd15, sdxl or svd; by default the schedule's.

    Ten steps take the published sigma/alpha; other numbers interpolate log sigma linearly between them, as NVIDIA's
    note advises. Levels above the schedule's t_max start there.
    """
    model = _ALIGNED_FOR.get(schedule.name) if model is None else model
    if model not in _ALIGNED:
        raise choose("model of grid 'align_your_steps',", model, _ALIGNED)
    table = [math.log(sigma) for sigma in _ALIGNED[model]]
    values = []
    for i in range(steps):
        place = i * (len(table) - 1) / max(steps - 1, 1)
        below = min(int(place), len(table) - 2)
        level = math.exp(table[below] + (place - below) * (table[below + 1] - table[below]))
        values.append(min(float(schedule.time_of_ratio(level)), schedule.t_max) if i else schedule.t_max)
    return _ended(schedule, values, end)
