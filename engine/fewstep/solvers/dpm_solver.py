"""DPM-Solver and DPM-Solver++ singlestep, orders 1 to 3. Lu et al. 2022, 2206.00927 (noise form, algorithms 1 and 2)
and 2211.01095 (clean-sample form, algorithm 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import multistep
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

VARIANTS = ("midpoint", "taylor")
INNER = ("between", "grid", "fast")


def _singlestep(
    solver: str,
    schedule: Schedule,
    times: Sequence[float],
    order: int,
    *,
    form: str,
    variant: str,
    inner: str,
    lower_order_final: bool | int,
    ratio: float | None = None,
    strength: float = 0.0,
    curvature: str = "exact",
) -> list[Row]:
    multistep.chosen(solver, "variant", variant, VARIANTS)
    multistep.chosen(solver, "inner", inner, INNER)
    if strength > 0.0:
        multistep.falling(solver, times, "inversion is deterministic, give strength=0.")
    if not strength >= 0.0:
        raise UserError(f"solver {solver!r} got strength={strength!r}; give a number of at least 0.")
    if ratio is not None and not 0.0 < ratio <= 1.0:
        raise UserError(f"solver {solver!r} got ratio={ratio!r}; give a number above 0 and at most 1.")
    if inner == "grid":
        blocks = _grid_blocks(schedule, times, order, lower_order_final)
    elif inner == "fast":
        blocks = _fast_blocks(schedule, times, order, ratio)
    else:
        blocks = _own_blocks(schedule, times, order, ratio)
    table = []
    for block, steps in blocks:
        for stage, (t, s) in enumerate(itertools.pairwise(block)):
            table.append(
                Row(
                    t,
                    s,
                    _stage_outputs(
                        schedule, block, stage, len(block) - 1, form, variant, inner, strength, s, curvature
                    ),
                    steps[stage],
                )
            )
    return table


def _stage_outputs(
    schedule: Schedule,
    block: Sequence[float],
    stage: int,
    order: int,
    form: str,
    variant: str,
    inner: str,
    strength: float,
    s: float,
    curvature: str,
) -> dict[str, dict[str, float]]:
    """One evaluation of a block of `order`: from the block's start (in "base" after the first) to the next node."""
    current = "D" if form == "x0" else "E"
    if stage == 0:
        known = {current: block[0]}
    elif stage == 1 or variant == "midpoint":
        known = {"d0": block[0], current: block[stage]}
    else:
        known = {"d0": block[0], "d1": block[1], current: block[2]}
    # the rule "midpoint" halves I_0 where the last row of a second-order block would take I_1
    halved = variant == "midpoint" and stage == 1 and (order == 2 or inner == "grid")
    update = multistep.exponential(
        schedule,
        block[0],
        s,
        known,
        form=form,
        slope="midpoint" if halved else "exact",
        strength=strength,
        curvature="wrong_sign_of_full" if curvature == "wrong_sign" else "exact",
        state="x" if stage == 0 else "base",
    )
    outputs = {"x": update}
    if stage == 0 and order > 1:
        outputs["base"] = {"x": 1.0}
    if stage + 1 < order:
        outputs[f"d{stage}"] = {current: 1.0}
    return outputs


Blocks = list[tuple[list[float], list[int]]]


def _own_blocks(schedule: Schedule, times: Sequence[float], order: int, ratio: float | None) -> Blocks:
    """Every step of the grid with its own inner nodes, even in lambda (or at `ratio` of the way, for order 2)."""
    blocks: Blocks = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        alone = is_clean(schedule, s) or real.isinf(schedule.half_log_snr(t))
        block = _with_inner_nodes(schedule, t, s, 1 if alone else order, ratio)
        blocks.append((block, [step] * (len(block) - 1)))
    return blocks


def _with_inner_nodes(schedule: Schedule, t: float, s: float, order: int, ratio: float | None) -> list[float]:
    """The times of a block: `order` - 1 between t and s, even in lambda, or at `ratio` of the way for order 2."""
    if order == 1:
        return [t, s]
    at, to = schedule.half_log_snr(t), schedule.half_log_snr(s)
    parts = [ratio or 0.5] if order == 2 else [1 / 3, 2 / 3]
    return [t, *(float(schedule.time_of_half_log_snr(at + part * (to - at))) for part in parts), s]


def _fast_blocks(schedule: Schedule, times: Sequence[float], order: int, ratio: float | None) -> Blocks:
    """As many evaluations as the grid has steps, in blocks of `order` that are all as wide, the last of lower order
    where they do not add up (2206.00927, DPM-Solver-fast); a step from pure noise or to sigma = 0 stands
    alone. Ends of blocks between times of the grid are laid linearly in lambda.
    """
    lambdas = [schedule.half_log_snr(t) for t in times]
    first, last = int(real.isinf(lambdas[0])), len(times) - 1 - int(real.isinf(lambdas[-1]))
    first = min(first, last)
    orders = _fast_orders(last - first, order)
    ends = [times[first]]
    for number in range(1, len(orders)):
        place = first + number * (last - first) / len(orders)
        below = math.floor(place)
        at = lambdas[below] + (place - below) * (lambdas[below + 1] - lambdas[below])
        ends.append(float(schedule.time_of_half_log_snr(at)) if place > below else times[below])
    ends.append(times[last])
    blocks = [[*times[: first + 1]]] if first else []
    blocks += [_with_inner_nodes(schedule, t, s, own, ratio) for own, (t, s) in zip(orders, itertools.pairwise(ends))]
    blocks += [[*times[last:]]] if last < len(times) - 1 else []
    numbers = itertools.count()
    return [(block, [next(numbers) for _ in block[1:]]) for block in blocks]


def _fast_orders(evaluations: int, order: int) -> list[int]:
    """Orders of blocks that take so many evaluations: 3, .., 3 and then 2, 1 or 1 or 2; 2, .., 2 and then 1."""
    whole, rest = divmod(evaluations, order)
    if order == 3 and rest == 0 and whole:
        return [*[3] * (whole - 1), 2, 1]
    return [order] * whole + [rest] * (rest > 0)


def _grid_blocks(schedule: Schedule, times: Sequence[float], order: int, lower_order_final: bool | int) -> Blocks:
    """Consecutive times of the grid as inner nodes; what is left at the end, and a step to sigma = 0, has lower order.

    `lower_order_final` ends on 3, 2, 1 or 2, 1, 1 also where whole blocks would fit (2206.00927, appendix D.3);
    2 does so where the last time counts twice (see multistep.orders).
    """
    end, given = multistep.lowered(lower_order_final), len(times) - 1
    steps = len(times) - 1
    if end == 2:
        multistep.above_zero("singlestep", "lower_order_final=2", schedule, times)
        times, steps = [*times, times[-1]], steps + 1
    lengths = [order] * (steps // order) + [steps % order] * (steps % order > 0)
    if end and order > 1 and steps % order == 0:
        lengths[-1:] = [order - 1, 1]
    if end == 2 and lengths[-1] == 1:
        lengths.pop()
    if is_clean(schedule, times[-1]) and lengths[-1] > 1:
        lengths[-1:] = [lengths[-1] - 1, 1]
    if real.isinf(schedule.half_log_snr(times[0])) and lengths[0] > 1:
        lengths[:1] = [1, lengths[0] - 1]
    blocks, start = [], 0
    for length in lengths:
        blocks.append(
            (list(times[start : start + length + 1]), [min(step, given - 1) for step in range(start, start + length)])
        )
        start += length
    return blocks


@register("dpm_solver", "order 1 to 3 (default 2), that many evaluations a step; 2206.00927")
def dpm_solver(
    schedule: Schedule,
    times: Sequence[float],
    *,
    order: int = 2,
    variant: str = "midpoint",
    ratio: float | None = None,
    inner: str = "between",
    lower_order_final: bool | int = False,
) -> list[Row]:
    """The noise form. Steps from pure noise and to sigma' = 0 are of order 1.

    `variant`: "midpoint" (the paper's; at order 3 its two-node rule) or "taylor" (exact integrals through all nodes).
    `ratio` places the inner node of order 2. `inner`: "between" puts `order` evaluations in each step, at even lambda;
    "grid" takes the grid's own times as inner nodes, one evaluation a step (diffusers), and keeps order 3 only where
    lambda is evenly spaced; there `lower_order_final` ends on blocks of lower order, as diffusers does. "fast" takes as
    many evaluations as steps too, in equally wide blocks of orders 3, .., 3 that end on 2, 1 or 1 or 2 (DPM-Solver-fast
    of the paper; k-diffusion's "DPM fast", on the grid log_snr that ends at t_min).
    """
    if order not in (1, 2, 3):
        raise UserError(f"solver 'dpm_solver' got order={order!r}; choose one of: 1, 2, 3.")
    return _singlestep(
        "dpm_solver",
        schedule,
        times,
        order,
        form="eps",
        variant=variant,
        ratio=ratio,
        inner=inner,
        lower_order_final=lower_order_final,
    )


@register("dpmpp_2s", "order 2, two evaluations a step; 2211.01095")
def dpmpp_2s(
    schedule: Schedule,
    times: Sequence[float],
    *,
    variant: str = "midpoint",
    ratio: float | None = None,
    inner: str = "between",
    lower_order_final: bool | int = False,
    strength: float = 0.0,
) -> list[Row]:
    """The clean-sample form of order 2; options as dpm_solver's. `strength` (tau, 0 the ODE, 1 the reverse SDE) makes
    every row draw its own noise.
    """
    return _singlestep(
        "dpmpp_2s",
        schedule,
        times,
        2,
        form="x0",
        variant=variant,
        ratio=ratio,
        inner=inner,
        lower_order_final=lower_order_final,
        strength=strength,
    )


@register("dpmpp_3s", "order 3, three evaluations a step; 2211.01095")
def dpmpp_3s(
    schedule: Schedule,
    times: Sequence[float],
    *,
    variant: str = "midpoint",
    inner: str = "between",
    lower_order_final: bool | int = False,
    strength: float = 0.0,
    curvature: str = "exact",
) -> list[Row]:
    """The clean-sample form of order 3; options as dpmpp_2s'. `curvature`: "exact", or "wrong_sign" for what diffusers
    0.42.1 makes of variant "taylor" with noise (-1/2 for +1/2 of the second derivative).
    """
    multistep.chosen("dpmpp_3s", "curvature", curvature, ("exact", "wrong_sign"))
    return _singlestep(
        "dpmpp_3s",
        schedule,
        times,
        3,
        form="x0",
        variant=variant,
        inner=inner,
        lower_order_final=lower_order_final,
        strength=strength,
        curvature=curvature,
    )
