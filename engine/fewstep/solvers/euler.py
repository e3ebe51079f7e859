"""Euler in sigma/alpha.  Karras et al. 2022, 2206.00364, section 3 and algorithm 2; for flow matching 2210.02747.

First-order steps do not depend on the coordinate: without churn this is DDIM with eta = 0, in every coefficient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.solvers import rows
from fewstep.solvers.churn import Churn, lifted, started
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register


@register("euler", "order 1; 2206.00364, and flow Euler 2210.02747")
def euler(
    schedule: Schedule,
    times: Sequence[float],
    *,
    prediction: Prediction,
    churn: float = 0.0,
    churn_low: float = 0.0,
    churn_high: float = math.inf,
    churn_noise: float = 1.0,
    late_churn: bool = False,
) -> tuple[list[Row], float]:
    """One evaluation a step.

    `churn` is EDM's S_churn: noise before a step raises sigma/alpha by min(churn/N, sqrt 2 - 1), between `churn_low`
    and `churn_high` (S_tmin, S_tmax), of std `churn_noise` (S_noise). `late_churn` adds it after the network call and
    reads the output as if it had been made at the raised level, as diffusers' Euler schedulers do.
    """
    stir = Churn(churn, churn_low, churn_high, churn_noise)
    stir.check("euler", times)
    raised = stir.raised(schedule, times)
    table: list[Row] = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        at = raised[step]
        of_x, of_denoised = rows.jump(schedule, at, s)
        if late_churn and at != t:
            keep, noise = rows.renoise(schedule, t, at)
            read_x, read_output = (float(value) for value in prediction.coefficients(schedule, at))
            of_x += of_denoised * read_x
            update = {"x": of_x * keep, "noise": of_x * churn_noise * noise, "F": of_denoised * read_output}
            table.append(Row(t, s, {"x": update}, step))
            continue
        if table:
            table[-1] = lifted(schedule, table[-1], at, churn_noise)
        table.append(Row(at, s, {"x": {"x": of_x, "D": of_denoised}}, step))
    return table, started(schedule, times[0], times[0] if late_churn else raised[0], churn_noise)
