"""DPM-Solver++ multistep.  Lu et al. 2022, 2211.01095, algorithm 2."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

VARIANTS = ("midpoint", "exact")


@register("dpmpp_2m", "order 2, one evaluation a step; 2211.01095")
def dpmpp_2m(
    schedule: Schedule,
    times: Sequence[float],
    *,
    order: int | None = None,
    variant: str = "midpoint",
    lower_order_final: bool = False,
) -> list[Row]:
    """One evaluation a step; the first step and a step to sigma' = 0 are of order 1.

    `variant` is the weight of the slope: "midpoint" (the paper's) or "exact" (the exponential integral; diffusers'
    "heun"). `lower_order_final` takes the last step of order 1 below 15 steps, as the published code does. `order` may
    be given as 1 or 2; an order above the number of steps is refused.
    """
    steps = len(times) - 1
    if order is not None and order not in (1, 2):
        raise UserError(f"solver 'dpmpp_2m' got order={order!r}; choose one of: 1, 2.")
    if order is not None and order > steps:
        raise UserError(
            f"solver 'dpmpp_2m' of order {order} needs {order} steps and got {steps}; lower one or raise the other."
        )
    if variant not in VARIANTS:
        raise choose("variant of solver 'dpmpp_2m',", variant, VARIANTS)
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        first = step == 0 or order == 1 or (lower_order_final and steps < 15 and step == steps - 1)
        if first:
            of_x, of_denoised = rows.jump(schedule, t, s)
            update = {"x": of_x, "D": of_denoised}
        else:
            of_x, of_denoised, of_past = rows.two_step(schedule, times[step - 1], t, s, variant)
            update = {"x": of_x, "D": of_denoised, "d0": of_past}
        table.append(Row(t, s, {"x": update, "d0": {"D": 1.0}}, step))
    return table
