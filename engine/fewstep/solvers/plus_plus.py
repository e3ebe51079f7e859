"""Rows under CFG++: the clean estimate is guided ("D"), what is renoised is the unconditional one ("U").

Chung et al. 2024, 2406.08070, algorithms 2 to 4: x' = alpha' D_w + sigma' E_u, and what follows from it for
DPM-Solver++ 2M. With D = U these are the solvers' own rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import multistep, rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register_plus_plus


@register_plus_plus("ddim")
def ddim(schedule: Schedule, times: Sequence[float], *, eta: float = 0.0) -> list[Row]:
    """eta as in ddim."""
    if not 0.0 <= eta <= 1.0 or (eta > 0.0 and times[-1] > times[0]):
        raise UserError(
            f"solver 'ddim' got eta={eta!r}; give a number from 0 (deterministic) to 1 (ancestral), 0 on a rising grid."
        )
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        of_x, _, of_noise = rows.noisy_jump(schedule, t, s, eta) if eta else (*rows.jump(schedule, t, s), 0.0)
        update = {"x": of_x, "D": schedule.alpha(s), "U": -schedule.alpha(t) * of_x, "noise": of_noise}
        table.append(Row(t, s, {"x": update}, step))
    return table


@register_plus_plus("euler")
def euler(schedule: Schedule, times: Sequence[float]) -> list[Row]:
    """x' = D_w + (tau'/tau)(x - D_u) in x/alpha: DDIM's row in every coefficient."""
    return ddim(schedule, times)


@register_plus_plus("dpmpp_2m")
def dpmpp_2m(
    schedule: Schedule, times: Sequence[float], *, lower_order_final: bool | int = False, euler_at_final: bool = False
) -> list[Row]:
    """In x/alpha: e^-h x + D_w - e^-h D_u + (I_0/2r)(D_w - D_u before); d0 is D_u. Options as dpmpp_2m's."""
    steps = len(times) - 1
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        lowered = euler_at_final or (multistep.lowered(lower_order_final) == 1 and steps < 15)
        of_x, gain = rows.jump(schedule, t, s)
        slope = 0.0
        at, to = schedule.half_log_snr(t), schedule.half_log_snr(s)
        past = schedule.half_log_snr(times[step - 1]) if step else 0.0
        first = step == 0 or (lowered and step == steps - 1)
        if not first and schedule.sigma(s) > 0.0 and not (real.isinf(at) or real.isinf(past)):
            slope = 0.5 * gain * (to - at) / (at - past)
        update = {"x": of_x, "D": schedule.alpha(s) + slope, "U": -schedule.alpha(t) * of_x, "d0": -slope}
        table.append(Row(t, s, {"x": update, "d0": {"U": 1.0}}, step))
    return table
