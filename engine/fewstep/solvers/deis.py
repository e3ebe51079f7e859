"""DEIS, Adams-Bashforth on the noise estimate. Zhang and Chen 2022, 2204.13902; rho-AB is also k-diffusion's LMS."""

from __future__ import annotations

import dataclasses
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
FOURTHS = ("exact", "unbalanced")


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
def ipndm_v(
    schedule: Schedule,
    times: Sequence[float],
    *,
    order: int | None = None,
    third: str = "exact",
    fourth: str = "exact",
) -> list[Row]:
    """2204.13902's iPNDM for uneven steps, from exact integrals: rho-AB-DEIS.

    The other values give rows of that order the weights of zju-pi/diff-sampler's code. `third` "misplaced_parenthesis"
    is right only where three steps in sigma/alpha are equal. `fourth` "unbalanced" has the same parenthesis, a wrong
    sign and a wrong ratio: it is of order 3 where steps are equal, and where they grow in no steady ratio its weights
    do not add up to 1, so that no number of steps converges.
    """
    multistep.chosen("ipndm_v", "third", third, THIRDS)
    multistep.chosen("ipndm_v", "fourth", fourth, FOURTHS)
    order = multistep.chosen_order("ipndm_v", order, 4, (1, 2, 3, 4), len(times) - 1)
    table = deis(schedule, times, order=min(order, len(times) - 1), coordinate="rho")
    published = {3: third != "exact", 4: fourth != "exact"}
    for step, row in enumerate(table):
        names = multistep.ring(step, min(order, len(times) - 1) - 1, "E")[:order]
        if published.get(len(names)) and all(name in row.outputs["x"] for name in names):
            update = _published(schedule, times, step, names)
            table[step] = dataclasses.replace(row, outputs={**row.outputs, "x": update})
    return table


def _published(schedule: Schedule, times: Sequence[float], step: int, names: Sequence[str]) -> dict[str, float]:
    """Terms of the published third or fourth order: sums over differences of past estimates, each with its slip."""
    rho = [schedule.ratio(t) for t in times[step - len(names) + 1 : step + 2]]
    *_, two_back, back, ahead = (after - before for before, after in itertools.pairwise(rho))
    slope = 0.5 * ahead / back
    share, growth = ahead / (3.0 * (ahead + back)), ahead * (ahead + back) / (back * (back + two_back))
    bend = 0.5 * (1.0 - share * growth)  # for (1 - share)/2 growth
    weights = [1.0 + slope + bend, -slope - (1.0 + back / two_back) * bend, bend * back / two_back]
    if len(names) == 4:
        three_back = rho[1] - rho[0]
        # + for -, and in the last weight back/two_back for two_back/three_back
        twist = 0.5 * (1.0 - share) + (1.0 - ahead / (2.0 * (ahead + back))) * ahead / (6.0 * (ahead + back + two_back))
        twist *= growth * (ahead + back + two_back) / (back + two_back + three_back)
        spread = back * (back + two_back) / (two_back * (two_back + three_back))
        weights[0] += twist
        weights[1] -= (1.0 + back / two_back + spread) * twist
        weights[2] += (back / two_back + spread * (1.0 + two_back / three_back)) * twist
        weights.append(-spread * back / two_back * twist)
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
        for x, part in zip(*moments.gauss_legendre(40)):
            place = 0.5 * (low + high + (high - low) * x)
            u = (float(schedule.time_of_ratio(math.sinh(place))) - t) / (s - t)
            for k in range(1, count):
                found[k] += 0.5 * (high - low) * part * math.cosh(place) * u**k
    return found
