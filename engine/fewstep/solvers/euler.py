"""Euler in sigma/alpha.  Karras et al. 2022, 2206.00364, section 3; for flow matching 2210.02747.

First-order steps do not depend on the coordinate: this is DDIM with eta = 0, in every coefficient.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fewstep.diffusion.schedules import Schedule
from fewstep.solvers import rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register


@register("euler", "order 1; 2206.00364, and flow Euler 2210.02747")
def euler(schedule: Schedule, times: Sequence[float]) -> list[Row]:
    """One evaluation a step."""
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        of_x, of_denoised = rows.jump(schedule, t, s)
        table.append(Row(t, s, {"x": {"x": of_x, "D": of_denoised}}, step))
    return table
