"""Splitting: the network's part by a multistep rule, what guidance adds by Euler steps of its own.

Wizadwongsa and Suwajanakorn 2023, 2301.11558: in x/alpha over gamma = sigma/alpha the guided equation is eps + g, and
its two flows are applied one after the other. g is what a form of guidance adds to the noise estimate: -s sigma grad
log p for a classifier's gradient, for which a step then asks the network only once; every other form is asked again at
the states in between. From pure noise, where gamma is infinite, the first step is DDIM's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.solvers import multistep, pndm, rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register


def _push(schedule: Schedule, at: float, t: float, s: float, share: float, step: int) -> Row:
    """x += alpha share (gamma' - gamma) g, asked at time `at`, where x stands."""
    ahead = schedule.ratio(s) - schedule.ratio(t)
    return Row(at, at, {"x": {"x": 1.0, "G": share * schedule.alpha(at) * ahead}}, step)


def _split(solver: str, schedule: Schedule, times: Sequence[float], order: int | None, halves: bool) -> list[Row]:
    order = multistep.chosen_order(solver, order, 4, (1, 2, 4), len(times) - 1)
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        kept = multistep.kept(step, 3, "N")
        if real.isinf(schedule.ratio(t)):
            of_x, of_denoised = rows.jump(schedule, t, s)
            table.append(Row(t, s, {"x": {"x": of_x, "D": of_denoised}, **kept}, step))
            continue
        names = multistep.ring(step, 3, "N")[:order]
        mean = dict(zip(names, pndm.ADAMS[len(names) - 1]))
        keep = schedule.alpha(s) / schedule.alpha(t)
        update = multistep.total((1.0, {"x": keep}), (schedule.sigma(s) - keep * schedule.sigma(t), mean))
        twice = halves and schedule.sigma(s) > 0.0  # nothing is asked where sigma is zero
        table.append(_push(schedule, t, t, s, 0.5 if twice else 1.0, step))
        table.append(Row(t, s, {"x": update, **kept}, step))
        if twice:
            table.append(_push(schedule, s, t, s, 0.5, step))
    return table


@register("ltsp", "order 1; Lie splitting of guidance and network, 2301.11558; without guidance ipndm")
def ltsp(schedule: Schedule, times: Sequence[float], *, order: int | None = None) -> list[Row]:
    """A whole step of guidance, then one of the network by pseudo-linear multistep of `order` 4, 1 or 2."""
    return _split("ltsp", schedule, times, order, halves=False)


@register("stsp", "order 1; Strang splitting of guidance and network, 2301.11558; without guidance ipndm")
def stsp(schedule: Schedule, times: Sequence[float], *, order: int | None = None) -> list[Row]:
    """Half a step of guidance, one of the network (see ltsp), half a step of guidance where it ended."""
    return _split("stsp", schedule, times, order, halves=True)
