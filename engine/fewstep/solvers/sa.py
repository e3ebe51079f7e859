"""SA-Solver, stochastic Adams with a predictor and a corrector.  Xue et al. 2023, 2309.05019, algorithm 1."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import multistep
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register


@register("sa", "order min(predictor + 1, corrector) without noise, weak order 2 with; 2309.05019")
def sa(
    schedule: Schedule,
    times: Sequence[float],
    *,
    predictor: int = 3,
    corrector: int = 4,
    strength: float | Sequence[float] = 1.0,
    lower_order_final: bool | int = False,
    correct_last: bool = False,
) -> list[Row]:
    """Each evaluation first corrects the state it was made at, with the noise the prediction drew, then predicts.

    `predictor` (1 to 3) and `corrector` (1 to 4; 0: none) are orders, reached by a warm-up 1, 2, ..; (2, 2) is advised
    under strong guidance. `strength` is tau of the SDE, for all steps or one per step. A corrector of order 1 is
    implicit Euler and lowers the order to 1. `lower_order_final` ends on orders .., 2, 1, as the published code does;
    2 and `correct_last` as in unipc.
    """
    steps = len(times) - 1
    strengths = [float(value) for value in strength] if isinstance(strength, Sequence) else [float(strength)] * steps
    if len(strengths) != steps or min(strengths) < 0.0:
        raise UserError(f"solver 'sa' got strength={strength!r}; give a number of at least 0, or {steps} of them.")
    if predictor not in (1, 2, 3) or corrector not in (0, 1, 2, 3, 4):
        raise UserError(
            f"solver 'sa' got predictor={predictor!r} and corrector={corrector!r}; give 1 to 3, and 0 to 4 (0: none)."
        )
    if max(strengths) > 0.0:
        multistep.falling("sa", times, "inversion is deterministic, give strength=0.")
    end = multistep.lowered(lower_order_final)
    depth = max(predictor, corrector, 2) - 1
    table: list[Row] = []

    def corrected_at(step: int) -> dict[str, float]:
        use = min(corrector, step + 1, *([steps - step + 1 + end] if end else []))
        if step == 0 or use == 0 or real.isinf(schedule.half_log_snr(times[step - 1])):
            return {"x": 1.0}
        nodes = {name: times[step - j] for j, name in enumerate(multistep.ring(step, depth)[:use])}
        found = _row(schedule, times[step - 1], times[step], nodes, strengths[step - 1])
        return {"base": 1.0, **{name: value for name, value in found.items() if name in nodes}}

    for step, (t, s) in enumerate(itertools.pairwise(times)):
        names, corrected = multistep.ring(step, depth), corrected_at(step)
        use = min(predictor, step + 1, *([steps - step + end - 1] if end else []))
        nodes = {name: times[step - j] for j, name in enumerate(names[:use])}
        found = _row(schedule, t, s, nodes, strengths[step])
        base = multistep.total((found.get("x", 0.0), corrected), (1.0, {"noise": found.get("noise", 0.0)}))
        update = multistep.total((1.0, base), (1.0, {name: value for name, value in found.items() if name in nodes}))
        table.append(Row(t, s, {"x": update, "base": base, **multistep.kept(step, depth)}, step))
    if correct_last:
        multistep.above_zero("sa", "correct_last=True", schedule, times)
        table.append(Row(times[-1], times[-1], {"x": corrected_at(steps)}, steps - 1))
    return table


def _row(schedule: Schedule, t: float, s: float, nodes: dict[str, float], strength: float) -> dict[str, float]:
    """One exponential row; two nodes take H/2 for I_1, as the paper's code does."""
    return multistep.exponential(schedule, t, s, nodes, slope="trapezoid", strength=strength)
