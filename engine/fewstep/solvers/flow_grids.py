"""Grids of flow-matching models, as levels sigma/(alpha + sigma) from 1: shifted by image size, stretched to an end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers.spacing import flow_level, time_of_flow_level

FORMS = ("exponential", "linear")


def dynamic_shift(
    image_length: float,
    base_length: float = 256,
    max_length: float = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """mu, linear in the number of image tokens (Flux; 2403.03206, section 5.3.2, shifts by its square root instead)."""
    if not max_length > base_length > 0 or not image_length > 0:
        raise UserError(
            f"grid 'flow_shift' got image_length={image_length!r}, base_length={base_length!r} and "
            f"max_length={max_length!r}; give numbers above 0, with base_length < max_length."
        )
    slope = (max_shift - base_shift) / (max_length - base_length)
    return base_shift + slope * (image_length - base_length)


def flow_shift(
    schedule: Schedule,
    steps: int,
    shift: float | None = None,
    mu: float | None = None,
    image_length: float | None = None,
    base_length: float = 256,
    max_length: float = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    form: str = "exponential",
    terminal: float | None = None,
    lowest: float | None = None,
    end: float | None = None,
) -> list[float]:
    """Flow levels shifted once (SD3), by image size (Flux), or to a terminal level (LTX) (2403.03206, eq. 23).

    Levels u from 1 to `lowest` (1/steps), each moved to s u/(1 + (s - 1) u), and then the end. s is `shift` (3 in SD3),
    or e^mu ("exponential"; mu itself for `form` "linear") with `mu` given or, from `image_length`, the number of image
    tokens, by `dynamic_shift` (Flux); by default the flow schedule's own. It is applied once, whatever the schedule's
    own shift. `terminal` stretches 1 - level so that the last level before the end is this (LTX: 0.1).
    """
    given = {"shift": shift, "mu": mu, "image_length": image_length}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"grid 'flow_shift' got {' and '.join(named)}; give one of shift, mu and image_length.")
    if form not in FORMS:
        raise choose("form of grid 'flow_shift',", form, FORMS)
    if image_length is not None:
        mu = dynamic_shift(image_length, base_length, max_length, base_shift, max_shift)
    if mu is not None:
        shift = math.exp(mu) if form == "exponential" else mu
    elif shift is None:
        shift = float(getattr(schedule, "shift", 1.0))
    if not shift > 0:
        raise UserError(f"grid 'flow_shift' got a shift of {shift!r}; give a number above 0 (1 is no shift).")
    low = 1.0 / steps if lowest is None else float(lowest)
    if not 0.0 < low <= 1.0:
        raise UserError(f"grid 'flow_shift' got lowest={low!r}; give a level above 0 and at most 1.")
    even = [1.0 + i / max(steps - 1, 1) * (low - 1.0) for i in range(steps)]
    levels = [shift * u / (1.0 + (shift - 1.0) * u) for u in even]
    if terminal is not None:
        if not 0.0 < terminal < 1.0:
            raise UserError(f"grid 'flow_shift' got terminal={terminal!r}; give a level above 0 and below 1.")
        if steps == 1:
            raise UserError("grid 'flow_shift' cannot end on a terminal level in 1 step; take 2 or more.")
        scale = (1.0 - levels[-1]) / (1.0 - terminal)
        levels = [1.0 - (1.0 - level) / scale for level in levels]
    return _times(schedule, levels, end)


def linear_quadratic(
    schedule: Schedule,
    steps: int,
    threshold: float = 0.025,
    linear_steps: int | None = None,
    end: float | None = None,
) -> list[float]:
    """Small even steps, then growing ones: Movie Gen's (2410.13720), as Mochi and LTX-Video take it.

    1 - level rises linearly to `threshold` over the first half (or `linear_steps`), then quadratically to 1.
    """
    linear = steps // 2 if linear_steps is None else linear_steps
    if isinstance(linear, bool) or not isinstance(linear, int) or not 0 <= linear < max(steps, 1):
        raise UserError(f"grid 'linear_quadratic' got linear_steps={linear!r} of {steps} steps; give 1 to {steps - 1}.")
    if not 0.0 < threshold < 1.0:
        raise UserError(f"grid 'linear_quadratic' got threshold={threshold!r}; give a number above 0 and below 1.")
    if linear == 0:
        return _times(schedule, [1.0 - (i / steps) ** 2 for i in range(steps)], end)
    slope, rest = threshold / linear, steps - linear
    # passes through the threshold with the line's slope less what makes it reach 1 at the end
    curve = (linear - threshold * steps) / (linear * rest * rest)
    rise = [
        slope * i if i < linear else threshold + (i - linear) * (slope + curve * (i - linear)) for i in range(steps)
    ]
    return _times(schedule, [1.0 - value for value in rise], end)


def _times(schedule: Schedule, levels: Sequence[float], end: float | None) -> list[float]:
    """Their times; where t_max is not pure noise, levels are shares of its own."""
    top = flow_level(schedule, schedule.t_max)
    times = [time_of_flow_level(schedule, top * level) for level in levels[1:]]
    return [schedule.t_max, *times, schedule.t_clean if end is None else float(end)]
