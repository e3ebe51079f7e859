"""DEIS, Adams-Bashforth on the noise estimate. Zhang and Chen 2022, 2204.13902; rho-AB is also k-diffusion's LMS."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.solvers import moments, multistep, rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

COORDINATES = ("t", "rho", "log_rho")
THIRDS = ("exact", "misplaced_parenthesis")
_points = functools.cache(moments.gauss_legendre)


@register("deis", "order 1 to 4 (default 3), one evaluation a step; 2204.13902")
def deis(
    schedule: Schedule,
    times: Sequence[float],
    *,
    order: int | None = None,
    coordinate: str = "t",
    lower_order_final: bool | int = False,
) -> list[Row]:
    """x' = (alpha'/alpha) x + alpha' int (polynomial through past eps) d rho, rho = sigma/alpha.

    `coordinate` is what the polynomial is in: "t" (the paper's tAB-DEIS), "rho" (rho-AB; k-diffusion's LMS), or
    "log_rho" (diffusers' DEIS; the noise form of the exponential integrator). With "log_rho" a step to sigma' = 0 is of
    order 1, and from pure noise every step is. `lower_order_final` ends on orders 2, 1 below 15 steps.
    """
    order = multistep.chosen_order("deis", order, 3, (1, 2, 3, 4), len(times) - 1)
    multistep.chosen("deis", "coordinate", coordinate, COORDINATES)
    orders = multistep.orders(len(times) - 1, order, lower_order_final)
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        names = multistep.ring(step, order - 1, "E")[: orders[step]]
        estimates = {name: times[step - j] for j, name in enumerate(names)}
        if coordinate == "log_rho":
            update = multistep.exponential(schedule, t, s, estimates, form="eps")
        else:
            update = adams(schedule, t, s, estimates, coordinate)
        table.append(Row(t, s, {"x": update, **multistep.kept(step, order - 1, "E")}, step))
    return table


@register("ipndm_v", "order 1 to 4 (default 4), one evaluation a step; iPNDM with the weights of uneven steps")
def ipndm_v(schedule: Schedule, times: Sequence[float], *, order: int | None = None, third: str = "exact") -> list[Row]:
    """2204.13902's iPNDM for uneven steps, from exact integrals: rho-AB-DEIS.

    `third` "misplaced_parenthesis" gives the rows of order 3 the weights of zju-pi/diff-sampler's code, which are right
    only where three steps in sigma/alpha are equal.
    """
    multistep.chosen("ipndm_v", "third", third, THIRDS)
    order = multistep.chosen_order("ipndm_v", order, 4, (1, 2, 3, 4), len(times) - 1)
    table = deis(schedule, times, order=min(order, len(times) - 1), coordinate="rho")
    if third == "exact":
        return table
    for step, row in enumerate(table):
        names = multistep.ring(step, min(order, len(times) - 1) - 1, "E")[:order]
        if len(names) == 3 and all(name in row.outputs["x"] for name in names):
            table[step] = dataclasses.replace(
                row, outputs={**row.outputs, "x": _misplaced(schedule, times, step, names)}
            )
    return table


def _misplaced(schedule: Schedule, times: Sequence[float], step: int, names: Sequence[str]) -> dict[str, float]:
    """Terms of the published third order, with (1 - a b)/2 for (1 - a) b/2 in its correction."""
    rho = [schedule.ratio(t) for t in times[step - 2 : step + 2]]
    two_back, back, ahead = (after - before for before, after in itertools.pairwise(rho))
    slope = 0.5 * ahead / back
    share = ahead / (3.0 * (ahead + back)) * (ahead * (ahead + back)) / (back * (back + two_back))
    bend = 0.5 * (1.0 - share)
    weights = (1.0 + slope + bend, -slope - (1.0 + back / two_back) * bend, bend * back / two_back)
    keep = schedule.alpha(times[step + 1]) / schedule.alpha(times[step])
    return {"x": keep, **{name: schedule.alpha(times[step + 1]) * ahead * w for name, w in zip(names, weights)}}


def adams(schedule: Schedule, t: float, s: float, estimates: Mapping[str, float], coordinate: str) -> dict[str, float]:
    """Terms of x_s: the polynomial in `coordinate` through `estimates` (name -> time) of eps, integrated d rho."""
    rho, rho_to = schedule.ratio(t), schedule.ratio(s)
    if real.isinf(rho):
        keep, gain = rows.jump(schedule, t, s)
        return {"x": keep, "D": gain}
    if coordinate == "rho":
        nodes = {name: (schedule.ratio(time) - rho) / (rho_to - rho) for name, time in estimates.items()}
        nodes = {name: u for name, u in nodes.items() if math.isfinite(u)}
        whole = [(rho_to - rho) / (k + 1) for k in range(len(nodes))]
    else:
        nodes = {name: (time - t) / (s - t) for name, time in estimates.items()}
        whole = _moments_in_time(schedule, t, s, len(nodes))
    parts = dict(zip(nodes, moments.weights(list(nodes.values()), whole)))
    return multistep.total((1.0, {"x": schedule.alpha(s) / schedule.alpha(t)}), (schedule.alpha(s), parts))


def _moments_in_time(schedule: Schedule, t: float, s: float, count: int) -> list[float]:
    """int u^k d rho, u = (time - t)/(s - t), over asinh(rho), in which time is smooth down to rho = 0."""
    rho, rho_to = schedule.ratio(t), schedule.ratio(s)
    found = [rho_to - rho] + [0.0] * (count - 1)
    if count > 1:
        low, high = math.asinh(rho), math.asinh(rho_to)
        for x, part in zip(*_points(40)):
            place = 0.5 * (low + high + (high - low) * x)
            u = (float(schedule.time_of_ratio(math.sinh(place))) - t) / (s - t)
            for k in range(1, count):
                found[k] += 0.5 * (high - low) * part * math.cosh(place) * u**k
    return found
