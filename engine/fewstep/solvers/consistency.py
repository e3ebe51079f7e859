"""Consistency multistep.  Song et al. 2023, 2303.01469, algorithm 1; LCM, Luo et al. 2023, 2310.04378."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register


@register(
    "consistency", "exact in law for the exact consistency function, whatever the steps; 2303.01469", zero="replace"
)
def consistency(schedule: Schedule, times: Sequence[float], *, prediction: Prediction) -> list[Row]:
    """Answer, add fresh noise up to the next time, answer again; the last answer is the sample.

    With a boundary e the student answers at time e and noise of std sqrt(s^2 - e^2) (in the VE form) goes on top;
    without one the answer counts as clean (e = 0), as for a DMD2 student.
    """
    if times[-1] > times[0]:
        raise UserError(
            "solver 'consistency' got a rising grid; it only goes down, use ddim, euler or heun for inversion."
        )
    end = schedule.t_clean if prediction.boundary is None else prediction.boundary
    if times[-2] < end:
        raise UserError(
            f"solver 'consistency' got time {times[-2]!r} below the boundary {end!r} of the prediction; leave it out."
        )
    table = []
    for step, t in enumerate(times[:-2]):
        of_answer, of_noise = rows.renoise(schedule, end, times[step + 1])
        table.append(Row(t, times[step + 1], {"x": {"D": of_answer, "noise": of_noise}}, step))
    table.append(Row(times[-2], end, {"x": {"D": 1.0}}, len(times) - 2))
    return table
