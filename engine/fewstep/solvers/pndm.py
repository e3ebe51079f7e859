"""Pseudo-numerical methods: PNDM, PLMS and iPNDM. Liu et al. 2022, 2202.09778; iPNDM: 2204.13902, appendix B.

All move by DDIM's transfer with eps replaced by a mean of estimates: phi(x, e) = (alpha'/alpha) x + (sigma' - alpha'
sigma/alpha) e. The Adams-Bashforth weights are those of equal steps in the step's number, so the order is 2 on a
smooth grid and 1 where neighbouring steps differ in size; deis and ipndm_v keep theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from fewstep.diffusion import real
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.solvers import multistep, rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

ADAMS = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_SUM = "d4"  # Runge-Kutta's running mean, beside the ring d0..d2


def _transfer(schedule: Schedule, t: float, s: float, mean: Mapping[str, float], state: str = "x") -> dict[str, float]:
    """phi from `state` at t to s; from pure noise it is finite only as the jump of this evaluation."""
    if real.isinf(schedule.ratio(t)):
        keep, gain = rows.jump(schedule, t, s)
        return {state: keep, "D": gain}
    keep = schedule.alpha(s) / schedule.alpha(t)
    return multistep.total((1.0, {state: keep}), (schedule.sigma(s) - keep * schedule.sigma(t), mean))


def _adams(step: int, count: int, current: str = "E") -> dict[str, float]:
    """The mean of this estimate and up to count - 1 before it, `step` being how many are kept."""
    names = multistep.ring(step, 3, current)[:count]
    return dict(zip(names, ADAMS[len(names) - 1]))


@register("ipndm", "order 2 on smooth grids for order 2 to 4 (default 4), one evaluation a step; 2204.13902")
def ipndm(schedule: Schedule, times: Sequence[float], *, order: int | None = None) -> list[Row]:
    """Orders 1, 2, 3, 4, .. from the first step on; equal-step weights (see ipndm_v for uneven grids)."""
    order = multistep.chosen_order("ipndm", order, 4, (1, 2, 3, 4), len(times) - 1)
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        update = _transfer(schedule, t, s, _adams(step, order))
        table.append(Row(t, s, {"x": update, **multistep.kept(step, 3, "E")}, step))
    return table


MIXED = ("noise", "output")
Mean = Callable[[float, Mapping[str, float], str], dict[str, float]]


def _mixing(solver: str, schedule: Schedule, prediction: Prediction, mixed: str) -> tuple[str, Mean]:
    """(what of an evaluation is kept, the mean of kept estimates as a noise estimate of `state` at time t)."""
    multistep.chosen(solver, "mixed", mixed, MIXED)
    if mixed == "noise":
        return "E", lambda t, weights, state: dict(weights)

    def mean(t: float, weights: Mapping[str, float], state: str) -> dict[str, float]:
        of_state, of_output = (float(value) for value in prediction.noise_coefficients(schedule, t))
        return multistep.total((1.0, {state: of_state}), (of_output, weights))

    return "F", mean


def _strided(solver: str, times: Sequence[float], stride: float | None) -> None:
    if stride is not None:
        multistep.falling(solver, times, "a stride only goes down, leave it out.")


@register("plms", "order 2 on smooth grids, N + 1 evaluations for N steps; 2202.09778 as in Stable Diffusion")
def plms(
    schedule: Schedule,
    times: Sequence[float],
    *,
    prediction: Prediction,
    mixed: str = "noise",
    stride: float | None = None,
) -> list[Row]:
    """The first step is a pseudo-Heun step (two evaluations), then Adams-Bashforth 2, 3, 4; one step alone is DDIM.

    `mixed`: "noise" takes means of noise estimates, "output" of raw network outputs, which the present state then makes
    a noise estimate (diffusers: the same for networks that predict eps, of order 1 for those that predict v or flow).

    `stride` as ddim's; the second evaluation, told the grid's next time, then repeats the step from a stride above it.
    """
    current, mean = _mixing("plms", schedule, prediction, mixed)
    _strided("plms", times, stride)
    table = []
    for step, (t, s) in enumerate(multistep.steps(times, stride)):
        update = _transfer(schedule, t, s, mean(t, _adams(step, 4, current), "x"))
        row = Row(t, s, {"x": update, **multistep.kept(step, 3, current)}, step)
        if step > 0 or len(times) == 2 or real.isinf(schedule.ratio(t)):
            table.append(row)
            continue
        table.append(Row(t, s, {**row.outputs, "base": {"x": 1.0}}, step))
        start, s = (t, s) if stride is None else (times[1] + stride, times[1])
        both = mean(start, {current: 0.5, "d0": 0.5}, "base")
        table.append(Row(s, s, {"x": _transfer(schedule, start, s, both, "base")}, step))
    return table


@register("pndm", "order 2 on smooth grids, N + 9 evaluations for N > 3 steps; 2202.09778")
def pndm(
    schedule: Schedule,
    times: Sequence[float],
    *,
    prediction: Prediction,
    mixed: str = "noise",
    stride: float | None = None,
) -> list[Row]:
    """The first three steps are pseudo-Runge-Kutta steps of four evaluations, with the middle at the mean of the times;
    then Adams-Bashforth 4. The last step is never a Runge-Kutta step. `mixed` as in plms.

    `stride` as ddim's, of the Adams-Bashforth steps; of the others' middles one is then stride // 2 below the step's
    start and one as far above its end, in whole indices, as in diffusers.
    """
    current, mean = _mixing("pndm", schedule, prediction, mixed)
    _strided("pndm", times, stride)
    strided, table = multistep.steps(times, stride), []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        if step >= min(3, len(times) - 2) or real.isinf(schedule.ratio(t)):
            s = strided[step][1]
            update = _transfer(schedule, t, s, mean(t, _adams(step, 4, current), "x"))
            table.append(Row(t, s, {"x": update, **multistep.kept(step, 3, current)}, step))
            continue
        below, middle = (0.5 * (t + s),) * 2 if stride is None else (t - stride // 2, s + stride // 2)
        alone = {current: 1.0}
        first = {"x": _transfer(schedule, t, below, mean(t, alone, "x")), "base": {"x": 1.0}, _SUM: {current: 1 / 6}}
        table.append(Row(t, below, {**first, **multistep.kept(step, 3, current)}, step))
        for here, there in ((middle, middle), (middle, s)):
            update = _transfer(schedule, t, there, mean(t, alone, "base"), "base")
            table.append(Row(here, there, {"x": update, _SUM: {_SUM: 1.0, current: 1 / 3}}, step))
        last = _transfer(schedule, t, s, mean(t, {_SUM: 1.0, current: 1 / 6}, "base"), "base")
        table.append(Row(s, s, {"x": last}, step))
    return table
