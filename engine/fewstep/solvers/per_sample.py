"""Solver updates whose times are tensors [B], for distillation methods: on the device and differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.diffusion.linear import combine, matrix
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import rows

ROWS = ("ddim", "dpmpp_2m", "euler")
STEPS = ("ddim", "euler", "heun")


def row(solver: str, schedule: Schedule, t: Tensor, s: Tensor, history: Sequence[Tensor] = ()) -> Tensor:
    """Coefficients [B, 1, K] of x_s on (x_t, D_0, then D at the times in `history`, newest first); t, s [B].

    `history` is used by dpmpp_2m (one time; none gives its first step). Raises UserError for other solvers and lengths.
    """
    if solver not in ROWS:
        raise choose("solver with a single row,", solver, ROWS)
    if len(history) > (1 if solver == "dpmpp_2m" else 0):
        raise UserError(
            f"row of solver {solver!r} got {len(history)} past times; it takes {int(solver == 'dpmpp_2m')}."
        )
    entries: tuple[Tensor, ...]
    if history:
        entries = rows.two_step(schedule, history[0], t, s, "midpoint")
    else:
        entries = rows.jump(schedule, t, s)
    return matrix([entries], t.device, t.dtype)


def step(
    solver: str,
    denoise: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    x: Tensor,
    t: Tensor,
    s: Tensor,
) -> Tensor:
    """x_s from x_t by one step, t and s [B]; `denoise(x, t)` gives x0_hat. Differentiable in everything.

    heun evaluates twice, in sigma/alpha (in flow's own coordinate on the flow schedule); where sigma(s) = 0 it is
    Euler's step, and the second evaluation's answer, taken at t there, has no weight.
    """
    if solver not in STEPS:
        raise choose("one-step solver", solver, STEPS)
    first = denoise(x, t)
    ahead = combine([x, first], [rows.jump(schedule, t, s)])[0]
    if solver != "heun":
        return ahead
    second = denoise(ahead, torch.where(schedule.sigma(s) == 0, t, s))
    coordinate = "flow" if schedule.name == "flow" else "ratio"
    return combine([x, first, ahead, second], [rows.trapezoid(schedule, t, s, coordinate)])[0]
