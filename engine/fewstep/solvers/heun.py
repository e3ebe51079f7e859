"""Heun's method. Karras et al. 2022, 2206.00364, algorithm 1 (no churn); in the flow coordinate, Heun of flow
matching.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import rows
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

COORDINATES = ("ratio", "flow")


@register("heun", "order 2, two evaluations a step (2N - 1 down to sigma = 0); 2206.00364")
def heun(schedule: Schedule, times: Sequence[float], *, coordinate: str | None = None) -> list[Row]:
    """Two evaluations a step, one for the step to sigma' = 0.

    `coordinate` is where the trapezoid is taken: "ratio" (sigma/alpha, EDM's) or "flow" (sigma/(alpha + sigma), finite
    at pure noise); by default "flow" on the flow schedule and "ratio" on the others.
    """
    if coordinate is None:
        coordinate = "flow" if schedule.name == "flow" else "ratio"
    if coordinate not in COORDINATES:
        raise choose("coordinate of solver 'heun',", coordinate, COORDINATES)
    if coordinate == "ratio" and schedule.alpha(max(times[0], times[-1])) == 0:
        raise UserError(
            f"solver 'heun' divides by alpha, and alpha is zero at t={max(times[0], times[-1])!r}; "
            "use coordinate='flow', or start at a smaller t_max."
        )
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        of_x, of_denoised = rows.jump(schedule, t, s)
        if is_clean(schedule, s):
            table.append(Row(t, s, {"x": {"x": of_x, "D": of_denoised}}, step))
            continue
        first = {"x": {"x": of_x, "D": of_denoised}, "base": {"x": 1.0}, "d0": {"D": 1.0}}
        table.append(Row(t, s, first, step))
        of_base, of_past, of_x, of_denoised = rows.trapezoid(schedule, t, s, coordinate)
        table.append(Row(s, s, {"x": {"base": of_base, "d0": of_past, "x": of_x, "D": of_denoised}}, step))
    return table
