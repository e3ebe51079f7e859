"""Explicit Runge-Kutta methods in rho = sigma/alpha, where the path is d(x/alpha)/d rho = eps.

The rho-RK solvers of DEIS, Zhang and Chen 2022, 2204.13902, section 3.3; order 2 as in EDM's ablations, Karras et al.
2022, 2206.00364, algorithm 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import multistep, rows
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

Tableau = tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]  # where the stages stand, and what each step sums


def _tableau(order: int, place: float) -> Tableau:
    if order == 2:
        late = 0.5 / place
        return (0.0, place), ((place,), (1.0 - late, late))
    if order == 3:  # Kutta's
        return (0.0, 0.5, 1.0), ((0.5,), (-1.0, 2.0), (1 / 6, 2 / 3, 1 / 6))
    return (0.0, 0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


@register("rho_rk", "order 2 to 4 (default 4), that many evaluations a step; 2204.13902")
def rho_rk(schedule: Schedule, times: Sequence[float], *, order: int = 4, place: float = 1.0) -> list[Row]:
    """Heun's family (order 2), Kutta's method (3) or the classical one (4) in rho.

    `place` is where in rho the second evaluation of order 2 stands: 1 is heun, 1/2 the midpoint method, 2/3 Ralston's.
    Steps from pure noise and to sigma' = 0 are of order 1.
    """
    if order not in (2, 3, 4):
        raise UserError(f"solver 'rho_rk' got order={order!r}; choose one of: 2, 3, 4.")
    if not 0.0 < place <= 1.0:
        raise UserError(f"solver 'rho_rk' got place={place!r}; give a number above 0 and at most 1.")
    if place != 1.0 and order != 2:
        raise UserError(f"solver 'rho_rk' got place={place!r} with order={order}; only order 2 has a choice.")
    places, sums = _tableau(order, place)
    table: list[Row] = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        rho, rho_to = schedule.ratio(t), schedule.ratio(s)
        if is_clean(schedule, s) or real.isinf(rho):
            of_x, of_denoised = rows.jump(schedule, t, s)
            table.append(Row(t, s, {"x": {"x": of_x, "D": of_denoised}}, step))
            continue
        at = [t, *(s if c == 1.0 else float(schedule.time_of_ratio(rho + c * (rho_to - rho))) for c in places[1:]), s]
        for stage, weights in enumerate(sums):
            slopes = [f"d{j}" for j in range(stage)] + ["E"]
            to, state = at[stage + 1], "base" if stage else "x"
            gain = schedule.alpha(to) * (rho_to - rho)
            update = multistep.total(
                (schedule.alpha(to) / schedule.alpha(t), {state: 1.0}), (gain, dict(zip(slopes, weights)))
            )
            outputs = {"x": update, f"d{stage}": {"E": 1.0}}
            if stage == 0:
                outputs["base"] = {"x": 1.0}
            table.append(Row(at[stage], to, outputs, step))
    return table
