"""TrigFlow's own samplers, in the angle theta = atan(sigma/(alpha sigma_data)).  Lu and Song 2024, 2410.11081.

With x/n = cos(theta) x0 + sigma_data sin(theta) eps the path's slope is sigma_data F = d(x/n)/d theta, finite from pure
noise to the clean end, on any schedule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import consistency, multistep, rows
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register


@register("trigflow", "order 1 (default) or 2, that many evaluations a step; 2410.11081")
def trigflow(
    schedule: Schedule, times: Sequence[float], *, order: int = 1, sigma_data: float | None = None
) -> list[Row]:
    """order 1: x' = cos(theta - theta') x - sin(theta - theta') sigma_data F (2410.11081, section 2; DDIM in every
    coefficient). order 2: the trapezoid with tan(d/2) in the place of d/2, d = theta' - theta, which is exact where
    the data are one point; a step to sigma' = 0 is of order 1. `sigma_data`: the trigflow schedule's, 0.5 on others.
    """
    if order not in (1, 2):
        raise UserError(f"solver 'trigflow' got order={order!r}; choose one of: 1, 2.")
    scale = float(getattr(schedule, "sigma_data", 0.5)) if sigma_data is None else float(sigma_data)
    if not scale > 0:
        raise UserError(f"solver 'trigflow' got sigma_data={sigma_data!r}; give a number above 0.")

    def polar(t: float) -> tuple[float, float]:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t)) / scale
        return math.atan2(sigma, alpha), math.hypot(alpha, sigma)

    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        of_x, of_denoised = rows.jump(schedule, t, s)
        jump = {"x": of_x, "D": of_denoised}
        if order == 1 or is_clean(schedule, s):
            table.append(Row(t, s, {"x": jump}, step))
            continue
        table.append(Row(t, s, {"x": jump, "base": {"x": 1.0}, "d0": {"D": 1.0}}, step))
        (angle, norm), (angle_to, norm_to) = polar(t), polar(s)
        half = math.tan(0.5 * (angle_to - angle))
        first = {"base": 1.0 / norm / math.tan(angle), "d0": -1.0 / math.sin(angle)}
        second = {"x": 1.0 / norm_to / math.tan(angle_to), "D": -1.0 / math.sin(angle_to)}
        update = multistep.total((norm_to / norm, {"base": 1.0}), (norm_to * half, first), (norm_to * half, second))
        table.append(Row(s, s, {"x": update}, step))
    return table


@register(
    "scm",
    "exact in law for the exact consistency function; sCM's multistep, 2410.11081",
    default_grids=dict.fromkeys(schedules.names(), "scm"),
)
def scm(schedule: Schedule, times: Sequence[float], *, prediction: Prediction) -> list[Row]:
    """x' = cos(t') D + sin(t') sigma_data z, the last D being the sample: `consistency` on sCM's times."""
    return consistency.consistency(schedule, times, prediction=prediction)
