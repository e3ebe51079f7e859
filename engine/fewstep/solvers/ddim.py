"""DDIM(eta). Song et al. 2020, 2010.02502; eta = 1 is DDPM's ancestral step with the posterior variance
(2006.11239).
"""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import multistep, rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register


@register("ddim", "order 1 (weak order 1 for eta > 0); 2010.02502")
def ddim(
    schedule: Schedule,
    times: Sequence[float],
    *,
    prediction: Prediction,
    eta: float = 0.0,
    stride: float | None = None,
    unbounded_noise: bool = False,
) -> list[Row]:
    """One evaluation a step; eta from 0 (the ODE) to 1 (ancestral sampling). No noise is drawn where sigma' = 0.

    `unbounded_noise` matters where clean estimates are bounded (`clip`, `threshold`): the noise estimate is then the
    network's own, and not the one that follows from the bounded estimate (diffusers' use_clipped_model_output=False).

    `stride` reproduces diffusers' target, t - 1000 // N rather than the next time of the grid (multistep.steps): the
    two differ on "linspace", for one.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"solver 'ddim' got eta={eta!r}; give a number from 0 (deterministic) to 1 (ancestral).")
    if eta > 0.0 and times[-1] > times[0]:
        raise UserError(f"solver 'ddim' got eta={eta!r} on a rising grid; inversion is deterministic, give eta=0.")
    table = []
    for step, (t, s) in enumerate(multistep.steps(times, stride)):
        if eta == 0.0:
            of_x, of_denoised = rows.jump(schedule, t, s)
            of_noise = 0.0
        else:
            of_x, of_denoised, of_noise = rows.noisy_jump(schedule, t, s, eta)
        update = {"x": of_x, "D": of_denoised, "noise": of_noise}
        if unbounded_noise:  # x' = alpha' D + d E, with d = k_x sigma
            read_x, read_output = (float(value) for value in prediction.noise_coefficients(schedule, t))
            kept = of_x * schedule.sigma(t)
            update = {"x": kept * read_x, "D": schedule.alpha(s), "F": kept * read_output, "noise": of_noise}
        table.append(Row(t, s, {"x": update}, step))
    return table
