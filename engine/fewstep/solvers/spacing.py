"""Spacings: where the times of a grid lie between its start and its end, in whatever coordinate they are even in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose

COORDINATES = ("ratio", "flow")
Place = Callable[[float, float, float], float]


def _laid(
    schedule: Schedule,
    steps: int,
    start: float | None,
    end: float | None,
    zero: str,
    place: Place,
    finite: bool = False,
) -> list[float]:
    """Times at place(fraction, start, end); `finite` moves a start without signal to just below."""
    if zero not in ("append", "replace", "none"):
        raise choose("zero", zero, ("append", "replace", "none"))
    first = schedule.t_max if start is None else float(start)
    last = schedule.t_min if end is None else float(end)
    near = first
    if finite and not schedule.ratio(first) < 1e12:
        near = first - 1e-3 * (first - schedule.t_clean)
    if finite and not schedule.ratio(last) > 0:
        raise UserError(
            f"this grid is laid in sigma/alpha and cannot end at t={last!r}, where it is zero; give end > {last!r}."
        )
    points = steps if zero == "append" else steps + 1
    values = [place(i / max(points - 1, 1), near, last) for i in range(points)]
    values[0] = first
    if points > 1:
        values[-1] = last
    if zero == "append":
        values.append(schedule.t_clean)
    elif zero == "replace":
        values[-1] = schedule.t_clean
    return values


def flow_level(schedule: Schedule, t: float) -> float:
    """sigma/(alpha + sigma): what flow matching calls its time, for any schedule."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return sigma / (alpha + sigma)


def time_of_flow_level(schedule: Schedule, level: float) -> float:
    return float(schedule.time_of_ratio(real.divide(level, 1.0 - level)))


def _coordinate(
    grid: str, coordinate: str, known: Sequence[str], schedule: Schedule
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """(of a time, the time of): sigma/alpha, sigma/(alpha + sigma) or the time itself."""
    if coordinate not in known:
        raise choose(f"coordinate of grid {grid!r},", coordinate, known)
    if coordinate == "ratio":
        return lambda t: float(schedule.ratio(t)), lambda value: float(schedule.time_of_ratio(value))
    if coordinate == "flow":
        return lambda t: flow_level(schedule, t), lambda value: time_of_flow_level(schedule, value)
    return float, float


def _positive(grid: str, option: str, value: float, usual: str = "") -> None:
    if not value > 0:
        raise UserError(f"grid {grid!r} got {option}={value!r}; give a number above 0{usual}.")


def uniform(
    schedule: Schedule, steps: int, start: float | None = None, end: float | None = None, zero: str = "none"
) -> list[float]:
    """Linear in t; down to t_clean unless `end` is given. On the sd schedule: diffusers' "trailing"."""
    last = schedule.t_clean if end is None and zero != "append" else end
    return _laid(schedule, steps, start, last, zero, lambda u, a, b: a + u * (b - a))


def quadratic(
    schedule: Schedule,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    zero: str = "none",
    power: float = 2.0,
) -> list[float]:
    """Linear in t^(1/power), counted from t_clean (DDIM, 2010.02502, appendix D.2; DEIS' ts_order)."""
    clean = schedule.t_clean
    last = clean if end is None and zero != "append" else end
    _positive("quadratic", "power", power)

    def place(u: float, a: float, b: float) -> float:
        low, high = (b - clean) ** (1 / power), (a - clean) ** (1 / power)
        return clean + (high + u * (low - high)) ** power

    return _laid(schedule, steps, start, last, zero, place)


def karras(
    schedule: Schedule,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    zero: str = "append",
    rho: float = 7.0,
    coordinate: str = "ratio",
) -> list[float]:
    """Linear in tau^(1/rho), tau = sigma/alpha (2206.00364, eq. 5).

    With `coordinate` "flow" tau is sigma/(alpha + sigma) (the use_karras_sigmas of diffusers' flow schedulers).
    """
    _positive("karras", "rho", rho, " (the paper's is 7)")
    of, time_of = _coordinate("karras", coordinate, COORDINATES, schedule)

    def place(u: float, a: float, b: float) -> float:
        high, low = of(a) ** (1 / rho), of(b) ** (1 / rho)
        return time_of((high + u * (low - high)) ** rho)

    return _laid(schedule, steps, start, end, zero, place, finite=coordinate == "ratio")


def log_snr(
    schedule: Schedule, steps: int, start: float | None = None, end: float | None = None, zero: str = "append"
) -> list[float]:
    """Linear in lambda = log(alpha/sigma) (2206.00927, section 3.4); the same as exponential in tau."""
    return exponential(schedule, steps, start, end, zero)


def exponential(
    schedule: Schedule,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    zero: str = "append",
    rho: float = 1.0,
    coordinate: str = "ratio",
) -> list[float]:
    """log tau falls linearly (rho = 1), or with the ramp (1 - u)^rho (k-diffusion's polyexponential).

    tau is sigma/alpha, or with `coordinate` "flow" sigma/(alpha + sigma) (diffusers' use_exponential_sigmas there).
    """
    _positive("exponential", "rho", rho)
    _, time_of = _coordinate("exponential", coordinate, COORDINATES, schedule)

    def place(u: float, a: float, b: float) -> float:
        share = (1.0 - u) ** rho
        if coordinate == "ratio":
            high, low = float(schedule.half_log_snr(a)), float(schedule.half_log_snr(b))
            return float(schedule.time_of_half_log_snr(low + share * (high - low)))
        high, low = math.log(flow_level(schedule, a)), math.log(flow_level(schedule, b))
        return time_of(math.exp(low + share * (high - low)))

    return _laid(schedule, steps, start, end, zero, place, finite=coordinate == "ratio")


def beta(
    schedule: Schedule,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    zero: str = "append",
    a: float = 0.6,
    b: float = 0.6,
    coordinate: str = "t",
) -> list[float]:
    """Quantiles of the Beta(a, b) distribution between the end and the start: denser at both (2407.12173).

    `coordinate` is what they are quantiles of: "t" (the paper's), "ratio" (sigma/alpha, diffusers') or "flow"
    (sigma/(alpha + sigma), diffusers' flow schedulers').
    """
    if not (a > 0 and b > 0):
        raise UserError(f"grid 'beta' got a={a!r} and b={b!r}; give numbers above 0.")
    of, time_of = _coordinate("beta", coordinate, ("t", *COORDINATES), schedule)

    def place(u: float, high: float, low: float) -> float:
        share = beta_quantile(1.0 - u, a, b)
        return time_of(of(low) + share * (of(high) - of(low)))

    return _laid(schedule, steps, start, end, zero, place, finite=coordinate == "ratio")


def beta_quantile(share: float, a: float, b: float) -> float:
    """x with I_x(a, b) = share, by bisection."""
    if share <= 0.0 or share >= 1.0:
        return min(max(share, 0.0), 1.0)
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if _beta_share(middle, a, b) < share else (low, middle)
    return 0.5 * (low + high)


def _beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Numerical Recipes, section 6.4)."""
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _beta_share(1.0 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    total = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = 1.0 / (1.0 + even * d), 1.0 + even / c
        total *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1.0 / (1.0 + odd * d), 1.0 + odd / c
        total *= d * c
        if abs(d * c - 1.0) < 1e-16:
            break
    return front * total / a


def kl_optimal(
    schedule: Schedule,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    zero: str = "append",
    data_std: float = 1.0,
) -> list[float]:
    """Linear in the angle atan(sigma/(alpha data_std)); Align-Your-Steps in closed form (2404.14507, section 3).

    It is what they find for Gaussian data of that standard deviation; ComfyUI's "kl_optimal" has 1.
    """
    _positive("kl_optimal", "data_std", data_std)
    return _laid(schedule, steps, start, end, zero, _angular(schedule, data_std))


def _angular(schedule: Schedule, scale: float) -> Place:
    def place(u: float, a: float, b: float) -> float:
        high, low = (math.atan(float(schedule.ratio(t)) / scale) for t in (a, b))
        return float(schedule.time_of_ratio(scale * math.tan(high + u * (low - high))))

    return place


def scm(
    schedule: Schedule,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    zero: str = "none",
    middle: float | None = 1.3,
    sigma_data: float | None = None,
) -> list[float]:
    """sCM's times, linear in TrigFlow's angle atan(sigma/(alpha sigma_data)) (2410.11081).

    Of two steps the second is at the angle `middle`: 1.3 in SANA-Sprint and diffusers, 1.1 in the paper, None for half
    way. `sigma_data` is the trigflow schedule's, 0.5 on the others.
    """
    scale = float(getattr(schedule, "sigma_data", 0.5)) if sigma_data is None else float(sigma_data)
    _positive("scm", "sigma_data", scale)
    last = schedule.t_clean if end is None and zero != "append" else end
    values = _laid(schedule, steps, start, last, zero, _angular(schedule, scale))
    if steps == 2 and zero != "append" and middle is not None:
        if not 0.0 < middle < 0.5 * math.pi:
            raise UserError(f"grid 'scm' got middle={middle!r}; give an angle above 0 and below pi/2, or None.")
        values[1] = float(schedule.time_of_ratio(scale * math.tan(middle)))
    return values
