"""What the multistep families share: the exponential row of any order, the orders of each step, the history ring."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import moments, rows
from fewstep.solvers.grids import is_clean

SLOPES = ("midpoint", "exact")
CURVATURES = ("exact", "half_weight", "wrong_sign")
FORMS = ("x0", "eps")


def total(*parts: tuple[float, Mapping[str, float]]) -> dict[str, float]:
    """The sum of factor * terms."""
    found: dict[str, float] = {}
    for factor, terms in parts:
        for name, value in terms.items():
            found[name] = found.get(name, 0.0) + factor * value
    return found


def chosen_order(solver: str, order: int | None, default: int, known: Sequence[int], steps: int) -> int:
    """The order to use; the default fits any number of steps, a given one must."""
    if order is None:
        return default
    if isinstance(order, bool) or order not in known:
        raise UserError(f"solver {solver!r} got order={order!r}; choose one of: {', '.join(map(str, known))}.")
    if order > steps:
        raise UserError(
            f"solver {solver!r} of order {order} needs {order} steps and got {steps}; lower one or raise the other."
        )
    return order


def chosen(solver: str, option: str, given: str, known: Sequence[str]) -> str:
    if given not in known:
        raise choose(f"{option} of solver {solver!r},", given, known)
    return given


def falling(solver: str, times: Sequence[float], why: str) -> None:
    """Refuses a rising grid."""
    if times[-1] > times[0]:
        raise UserError(f"solver {solver!r} got a rising grid; {why}")


def steps(times: Sequence[float], stride: float | None = None) -> list[tuple[float, float]]:
    """Every step's (from, to): the grid's own, or with `stride` diffusers' jumps of T // N whatever the next time is.

    A falling step starts at its time t and goes to t - stride, or to the grid's end where that is below index 0; a
    rising one (DDIM's inversion) goes to its time and comes from a stride below. Where the two differ from the grid,
    the state is at another level than the network is told.
    """
    if stride is None:
        return list(itertools.pairwise(times))
    if not stride > 0:
        raise UserError(f"stride is {stride!r}; give a number of indices above 0 (1000 // N reproduces diffusers).")
    if times[-1] > times[0]:
        return [(s - stride if s - stride >= 0.0 else times[0], s) for s in times[1:]]
    return [(t, t - stride if t - stride >= 0.0 else times[-1]) for t in times[:-1]]


def above_zero(solver: str, option: str, schedule: Schedule, times: Sequence[float]) -> None:
    """Refuses an option that asks the network where sampling ends, if sigma is zero there."""
    if is_clean(schedule, times[-1]):
        raise UserError(
            f"solver {solver!r} got {option} and a grid that ends at sigma = 0, where no network can be asked; "
            "end the grid above, or leave the option out."
        )


def lowered(lower_order_final: bool | int) -> int:
    """The order that `lower_order_final` makes a sampler end on, 1 (True) or 2; 0 where it is off."""
    if lower_order_final not in (False, True, 2):
        raise UserError(
            f"lower_order_final is {lower_order_final!r}; give True (the last step is of order 1), 2 (of order 2 at "
            "most) or False."
        )
    return int(lower_order_final)


def orders(steps: int, order: int, lower_order_final: bool | int = False, euler_at_final: bool = False) -> list[int]:
    """Orders 1, 2, .. up to `order`; `lower_order_final` ends on 2, 1 below 15 steps, as the published code of
    2211.01095 does, `euler_at_final` ends on 1.

    lower_order_final=2 ends on 2 below 14 steps: what diffusers does where its grid repeats its last level (Karras and
    the like down to sigma_min) and the step of order 1 goes nowhere.
    """
    found = [min(order, i + 1) for i in range(steps)]
    end = lowered(lower_order_final)
    if end and steps + end - 1 < 15:
        found[-2:] = [min(p, end + place) for place, p in zip((1, 0), found[-2:])] if steps > 1 else [1]
    if euler_at_final:
        found[-1] = 1
    return found


def ring(step: int, depth: int, current: str = "D") -> list[str]:
    """Names of this step's estimate and the `depth` before it, newest first; this one is kept in slot step % depth."""
    return [current, *(f"d{(step - j) % depth}" for j in range(1, min(step, depth) + 1))] if depth else [current]


def kept(step: int, depth: int, current: str = "D") -> dict[str, dict[str, float]]:
    """The output that keeps this step's estimate in the ring."""
    return {f"d{step % depth}": {current: 1.0}} if depth else {}


def exponential(
    schedule: Schedule,
    t: float,
    s: float,
    estimates: Mapping[str, float],
    *,
    form: str = "x0",
    slope: str = "exact",
    curvature: str = "exact",
    strength: float = 0.0,
    state: str = "x",
) -> dict[str, float]:
    """Terms of x_s from `state` at time t: the polynomial through `estimates` (name -> time), integrated exactly.

    Clean-sample form, of the reverse SDE of strength tau (0: the ODE), with H = (1 + tau^2) h and I_k = decaying(H):
    x' = (sigma'/sigma) e^{-tau^2 h} x + alpha' sum w_j D_j + sigma' sqrt(1 - e^{-2 tau^2 h}) z (2309.05019, eq. 17).
    Noise form, with J_k = growing(h): x' = (alpha'/alpha) x - (1 + tau^2) sigma' sum w_j eps_j + tau sigma'
    sqrt(e^{2h} - 1) z (2206.00927, eq. 3.4; its SDE: 2211.01095).
    An estimate at infinite lambda has no weight; from there, or down to sigma = 0, the row is the first-order jump
    of the first estimate, which must be at t then.
    """
    at, to = schedule.half_log_snr(t), schedule.half_log_snr(s)
    first = next(iter(estimates))
    if is_clean(schedule, s) or real.isinf(at):
        keep, gain = rows.jump(schedule, t, s)
        if strength > 0.0 and real.isinf(at):
            return {"D" if first == "E" else first: schedule.alpha(s), "noise": schedule.sigma(s)}
        return {state: keep, "D" if first == "E" else first: gain}
    h = to - at
    nodes = {name: (schedule.half_log_snr(time) - at) / h for name, time in estimates.items()}
    nodes = {name: u for name, u in nodes.items() if math.isfinite(u)}
    count = len(nodes)
    if form == "x0":
        found = moments.decaying((1.0 + strength * strength) * h, count)
    else:
        found = moments.growing(h, count)
    if count == 2 and slope != "exact":
        found[1] = 0.5 * (found[0] if slope == "midpoint" else (1.0 + strength * strength) * h)
    if count == 3 and curvature == "wrong_sign_of_full":
        found[2] -= 2.0
    elif count == 3 and curvature != "exact":
        found[2] = 0.5 * found[2] - (1.0 if curvature == "wrong_sign" else 0.0)
    parts = dict(zip(nodes, moments.weights(list(nodes.values()), found)))
    if form == "eps":
        terms = {state: schedule.alpha(s) / schedule.alpha(t)}
        if strength > 0.0:
            terms["noise"] = strength * schedule.sigma(s) * math.sqrt(math.expm1(2.0 * h))
        return total((1.0, terms), (-(1.0 + strength * strength) * schedule.sigma(s), parts))
    decay = strength * strength * h
    terms = {state: schedule.sigma(s) / schedule.sigma(t) * math.exp(-decay)}
    if strength > 0.0:
        terms["noise"] = schedule.sigma(s) * math.sqrt(-math.expm1(-2.0 * decay))
    return total((1.0, terms), (schedule.alpha(s), parts))
