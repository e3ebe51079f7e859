"""pi-Flow's DX policy: one evaluation and many substeps that ask nobody.  Chen et al. 2025, 2510.14974, section 3.1.

The network answers with clean-sample estimates for several times of the way from t to s. Until it is asked again the
state follows the path that these estimates, taken as piecewise linear in t, would give: substeps of first order, all
linear in what the network said, so that the host composes them into one row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register


@register(
    "piflow", "order 1 for a network of one answer, its policy's path for several; one evaluation a step; 2510.14974"
)
def piflow(
    schedule: Schedule,
    times: Sequence[float],
    *,
    prediction: Prediction,
    points: int = 1,
    substeps: int = 128,
    segment: float | None = None,
) -> list[Row]:
    """x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D(t) a substep, D(t) between the network's answers.

    `points`: how many answers the network gives at once, as shares of its channels or a tuple, each of the plan's
    prediction type: the first for the end of the segment, the last for its start, evenly spread in the schedule's time
    (on `flow` that is time before the shift). 1 is an ordinary network and DDIM's step. `substeps`: how many even
    substeps in time the whole way from t_max to t_clean takes; a step takes its share of them, at least one. `segment`:
    how much time the answers span, where that is not the step's own (a network used in other steps than it was
    distilled for).
    """
    for option, value in (("points", points), ("substeps", substeps)):
        if value < 1:
            raise UserError(f"solver 'piflow' got {option}={value!r}; give a whole number of at least 1.")
    if segment is not None and not segment > 0.0:
        raise UserError(f"solver 'piflow' got segment={segment!r}; give a span of time above 0, or None.")
    answers = tuple(f"point {k}" for k in range(1, points))
    whole = schedule.t_max - schedule.t_clean
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        end = s if segment is None else max(t + math.copysign(segment, s - t), schedule.t_clean)
        count = max(1, round(abs(t - s) / whole * substeps))
        keep, weights = _rolled_out(schedule, t, s, end, points, count)
        if points == 1:
            table.append(Row(t, s, {"x": {"x": keep, "D": weights[0]}}, step))
            continue
        of_x, of_output = (float(value) for value in prediction.coefficients(schedule, t))
        update = {"x": keep + of_x * sum(weights)}
        update |= {name: of_output * weight for name, weight in zip(("F", *answers), weights)}
        table.append(Row(t, s, {"x": update}, step, answers=answers))
    return table


def _rolled_out(
    schedule: Schedule, t: float, s: float, end: float, points: int, substeps: int
) -> tuple[float, list[float]]:
    """(of x, of each clean-sample estimate) after all substeps from t to s; estimates are spread from `end` to t."""
    keep, weights = 1.0, [0.0] * points
    at = [t + (s - t) * i / substeps for i in range(substeps)]
    for now, then in itertools.pairwise([*at, s]):
        of_x, of_denoised = rows.jump(schedule, now, then)
        keep *= of_x
        weights = [of_x * weight for weight in weights]
        place = min(max((now - end) / (t - end), 0.0), 1.0) * (points - 1)
        below = max(min(int(place), points - 2), 0)
        weights[below] += of_denoised * (1.0 - (place - below))
        if points > 1:
            weights[below + 1] += of_denoised * (place - below)
    return float(keep), [float(weight) for weight in weights]
