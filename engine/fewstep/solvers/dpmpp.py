"""DPM-Solver++ multistep, for the ODE and the SDE, and exponential integrators of any order.

Lu et al. 2022, 2211.01095, algorithm 2; the SDE and third-order forms are those of k-diffusion and diffusers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import multistep, rows
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
    lower_order_final: bool | int = False,
    euler_at_final: bool = False,
) -> list[Row]:
    """One evaluation a step; the first step and a step to sigma' = 0 are of order 1.

    `variant` is the weight of the slope: "midpoint" (the paper's) or "exact" (the exponential integral; diffusers'
    "heun"). `lower_order_final` takes the last step of order 1 below 15 steps, as the published code does,
    `euler_at_final` at any number. `order` may be given as 1 or 2; an order above the number of steps is refused.
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
        lowered = euler_at_final or (multistep.lowered(lower_order_final) == 1 and steps < 15)
        if step == 0 or order == 1 or (lowered and step == steps - 1):
            of_x, of_denoised = rows.jump(schedule, t, s)
            update = {"x": of_x, "D": of_denoised}
        else:
            of_x, of_denoised, of_past = rows.two_step(schedule, times[step - 1], t, s, variant)
            update = {"x": of_x, "D": of_denoised, "d0": of_past}
        table.append(Row(t, s, {"x": update, "d0": {"D": 1.0}}, step))
    return table


def _multistep(
    schedule: Schedule,
    times: Sequence[float],
    orders: Sequence[int],
    *,
    form: str = "x0",
    slope: str = "exact",
    curvature: str = "exact",
    strength: float = 0.0,
    noise_scale: float = 1.0,
    stride: float | None = None,
) -> list[Row]:
    """One exponential row a step, of the given orders, over a ring of past estimates."""
    depth, table = max(orders) - 1, []
    current = "D" if form == "x0" else "E"
    for step, (t, s) in enumerate(multistep.steps(times, stride)):
        names = multistep.ring(step, depth, current)[: orders[step]]
        estimates = {name: times[step - j] for j, name in enumerate(names)}
        update = multistep.exponential(
            schedule, t, s, estimates, form=form, slope=slope, curvature=curvature, strength=strength
        )
        if "noise" in update:
            update["noise"] *= noise_scale
        table.append(Row(t, s, {"x": update, **multistep.kept(step, depth, current)}, step))
    return table


@register("dpmpp_3m", "order 3, one evaluation a step; 2211.01095 with the full weight of the second difference")
def dpmpp_3m(
    schedule: Schedule,
    times: Sequence[float],
    *,
    order: int | None = None,
    slope: str = "midpoint",
    curvature: str = "exact",
    lower_order_final: bool | int = False,
    euler_at_final: bool = False,
) -> list[Row]:
    """Orders 1, 2, 3, 3, ..; a step to sigma' = 0 is of order 1.

    `curvature`: "exact" integrates the parabola through three estimates (weight I_2 = 1 - 2 I_1/h of its second
    difference); "half_weight" takes I_2/2, as LuChengTHU/dpm-solver, k-diffusion and diffusers do, which is of order 2.
    `slope` is the weight in the second-order steps of the warm-up: "midpoint" (the published one) or "exact".
    """
    order = multistep.chosen_order("dpmpp_3m", order, 3, (1, 2, 3), len(times) - 1)
    multistep.chosen("dpmpp_3m", "slope", slope, multistep.SLOPES)
    multistep.chosen("dpmpp_3m", "curvature", curvature, multistep.CURVATURES[:2])
    orders = multistep.orders(len(times) - 1, order, lower_order_final, euler_at_final)
    return _multistep(schedule, times, orders, slope=slope, curvature=curvature)


def _sde(solver: str, schedule: Schedule, times: Sequence[float], orders: Sequence[int], **options: Any) -> list[Row]:
    multistep.chosen(solver, "slope", options["slope"], multistep.SLOPES)
    multistep.chosen(solver, "curvature", options.get("curvature", "exact"), multistep.CURVATURES)
    eta = options.pop("eta")
    if not eta >= 0.0:
        raise UserError(f"solver {solver!r} got eta={eta!r}; give a number of at least 0 (0: the ODE, 1: the SDE).")
    if eta > 0.0:
        multistep.falling(solver, times, "inversion is deterministic, give eta=0.")
    return _multistep(schedule, times, orders, strength=eta**0.5, **options)


@register("dpmpp_2m_sde", "weak order 2, one evaluation a step; 2211.01095 on the reverse SDE")
def dpmpp_2m_sde(
    schedule: Schedule,
    times: Sequence[float],
    *,
    order: int | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    slope: str = "midpoint",
    form: str = "x0",
    lower_order_final: bool | int = False,
    euler_at_final: bool = False,
    stride: float | None = None,
) -> list[Row]:
    """`eta` = tau^2 is the strength of the SDE (k-diffusion's eta): 0 is dpmpp_2m, 1 the reverse SDE; `noise_scale`
    multiplies its noise. `slope` as dpmpp_2m's variant; no noise is drawn where sigma' = 0. `form`: "x0", or "eps" for
    the integrals of noise estimates (SDE-DPM-Solver, without ++). `stride` as ddim's (diffusers' CogVideoX).
    """
    multistep.chosen("dpmpp_2m_sde", "form", form, multistep.FORMS)
    order = multistep.chosen_order("dpmpp_2m_sde", order, 2, (1, 2), len(times) - 1)
    orders = multistep.orders(len(times) - 1, order, lower_order_final, euler_at_final)
    options = {"noise_scale": noise_scale, "slope": slope, "form": form, "stride": stride}
    return _sde("dpmpp_2m_sde", schedule, times, orders, eta=eta, **options)


@register("dpmpp_3m_sde", "weak order 2 with a small constant, one evaluation a step; k-diffusion's 3M SDE")
def dpmpp_3m_sde(
    schedule: Schedule,
    times: Sequence[float],
    *,
    order: int | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    slope: str = "midpoint",
    curvature: str = "exact",
    lower_order_final: bool | int = False,
    euler_at_final: bool = False,
) -> list[Row]:
    """As dpmpp_3m on the SDE of strength `eta` (see dpmpp_2m_sde). `curvature`: "exact"; "half_weight" as k-diffusion
    has it; "wrong_sign" as diffusers 0.42.1 has it (I_2/2 - 1: weak order 1 only).
    """
    order = multistep.chosen_order("dpmpp_3m_sde", order, 3, (1, 2, 3), len(times) - 1)
    orders = multistep.orders(len(times) - 1, order, lower_order_final, euler_at_final)
    return _sde(
        "dpmpp_3m_sde", schedule, times, orders, eta=eta, noise_scale=noise_scale, slope=slope, curvature=curvature
    )


@register("exponential", "order 1 to 4 (default 3), one evaluation a step; 2206.00927, 2211.01095")
def exponential(
    schedule: Schedule,
    times: Sequence[float],
    *,
    order: int | None = None,
    form: str = "x0",
    slope: str = "exact",
    curvature: str = "exact",
    lower_order_final: bool | int = False,
    euler_at_final: bool = False,
) -> list[Row]:
    """The exponential Adams-Bashforth integrator in lambda: the polynomial through the last estimates, integrated.

    `form`: "x0" integrates the clean-sample estimates (DPM-Solver++'s multistep), "eps" the noise estimates
    (DPM-Solver's multistep, DEIS in log rho). `slope` and `curvature` as in dpmpp_3m.
    """
    order = multistep.chosen_order("exponential", order, 3, (1, 2, 3, 4), len(times) - 1)
    for option, given, known in (
        ("form", form, multistep.FORMS),
        ("slope", slope, multistep.SLOPES),
        ("curvature", curvature, multistep.CURVATURES[:2]),
    ):
        multistep.chosen("exponential", option, given, known)
    orders = multistep.orders(len(times) - 1, order, lower_order_final, euler_at_final)
    return _multistep(schedule, times, orders, form=form, slope=slope, curvature=curvature)
