"""UniPC. Zhao et al. 2023, 2302.04867, algorithms 5 to 8: predictor and corrector of any order from one call a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import moments, multistep, rows
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

VARIANTS = ("bh1", "bh2")


@register("unipc", "order p + 1 for order=p, 1 to 3 (default 2), one evaluation a step; 2302.04867")
def unipc(
    schedule: Schedule,
    times: Sequence[float],
    *,
    order: int | None = None,
    variant: str = "bh2",
    lower_order_final: bool | int = False,
    disable_corrector: Sequence[int] = (),
    correct_last: bool = False,
    form: str = "x0",
) -> list[Row]:
    """Each evaluation first corrects the state it was made at, then predicts the next; the last step has no corrector.

    `variant` is B(h): "bh1" (h) or "bh2" (e^h - 1). It matters only to the corrector of order 1 and the predictor of
    order 2; wherever a linear system is solved it cancels. A step of bh1 to sigma' = 0, not a number in diffusers, is
    of order 1 as for bh2. `lower_order_final` ends on orders .., 2, 1 at any number of steps, as the published code
    does, which costs the asymptotic order; 2 ends on .., 3, 2. `correct_last` asks once more where sampling ends, above
    sigma = 0, and corrects there. Together they are what diffusers does where its grid repeats its last level (Karras
    and the like down to sigma_min). `disable_corrector` names steps (from 0) that are not corrected. `form` integrates
    clean-sample ("x0") or noise ("eps") estimates.
    """
    steps = len(times) - 1
    order = multistep.chosen_order("unipc", order, 2, (1, 2, 3), steps)
    multistep.chosen("unipc", "variant", variant, VARIANTS)
    multistep.chosen("unipc", "form", form, multistep.FORMS)
    wrong = [step for step in disable_corrector if isinstance(step, bool) or step not in range(steps)]
    if wrong:
        raise UserError(
            f"solver 'unipc' got disable_corrector={list(disable_corrector)!r}; name steps 0 to {steps - 1}."
        )
    used = multistep.orders(steps, order)
    end = multistep.lowered(lower_order_final)
    if end:
        used = [min(p, steps - step + end - 1) for step, p in enumerate(used)]
    current, table = "D" if form == "x0" else "E", []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        names = multistep.ring(step, order, current)
        corrected = {"x": 1.0}
        if step > 0 and step - 1 not in disable_corrector:
            past = {name: times[step - 1 - j] for j, name in enumerate(names[1 : 1 + used[step - 1]])}
            corrected = _corrected(schedule, times[step - 1], t, past, current, variant, form) or corrected
        estimates = {name: times[step - j] for j, name in enumerate(names[: used[step]])}
        predicted = _predicted(schedule, t, s, estimates, variant, form)
        of_state = predicted.pop("x")
        update = multistep.total((of_state, corrected), (1.0, predicted))
        table.append(Row(t, s, {"x": update, "base": corrected, **multistep.kept(step, order, current)}, step))
    if correct_last:
        multistep.above_zero("unipc", "correct_last=True", schedule, times)
        names = multistep.ring(steps, order, current)
        past = {name: times[steps - 1 - j] for j, name in enumerate(names[1 : 1 + used[-1]])}
        corrected = _corrected(schedule, times[-2], times[-1], past, current, variant, form) or {"x": 1.0}
        table.append(Row(times[-1], times[-1], {"x": corrected}, steps - 1))
    return table


def _predicted(
    schedule: Schedule, t: float, s: float, estimates: dict[str, float], variant: str, form: str
) -> dict[str, float]:
    """UniP; at order 2 the system is not solved and B/2 stands for I_1."""
    if len(estimates) != 2:
        return multistep.exponential(schedule, t, s, estimates, form=form)
    terms = multistep.exponential(schedule, t, s, estimates, form=form, slope="midpoint")
    h = schedule.half_log_snr(s) - schedule.half_log_snr(t)
    if variant == "bh1" and math.isfinite(h):
        scale = h / (-math.expm1(-h) if form == "x0" else math.expm1(h))
        first, second = estimates
        past = terms.get(second, 0.0)
        terms[second] = past * scale
        terms[first] += past - terms[second]
    return terms


def _corrected(
    schedule: Schedule, before: float, t: float, past: dict[str, float], current: str, variant: str, form: str
) -> dict[str, float] | None:
    """UniC: the step from `before` (state in "base") to t again, with the estimate at t; None where it is infinite."""
    if is_clean(schedule, t):
        return None
    at, to = schedule.half_log_snr(before), schedule.half_log_snr(t)
    if len(past) > 1:
        return multistep.exponential(schedule, before, t, {**past, current: t}, form=form, state="base")
    if real.isinf(at):
        if variant == "bh1" or form == "eps":
            return None
        keep, gain = rows.jump(schedule, before, t)
        return {"base": keep, next(iter(past)): 0.5 * gain, current: 0.5 * gain}
    h = to - at
    whole = (moments.decaying if form == "x0" else moments.growing)(h, 1)[0]
    half = 0.5 * (h if variant == "bh1" else whole)
    gain = schedule.alpha(t) if form == "x0" else -schedule.sigma(t)
    keep = schedule.sigma(t) / schedule.sigma(before) if form == "x0" else schedule.alpha(t) / schedule.alpha(before)
    return {"base": keep, next(iter(past)): gain * (whole - half), current: gain * half}
