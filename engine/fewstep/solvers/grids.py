"""Time grids: the N + 1 times a sampler of N steps visits, in float64 on the host, the last being where it ends.

`zero` says how a grid meets the clean end: "append" takes N times from `start` to `end` and then t_clean (as EDM does);
"replace" takes N + 1 times from `start` to `end` and puts t_clean in place of the last; "none" stops at `end`.
`start` and `end` are schedule times and default to t_max and t_min. On a schedule whose start is pure noise (alpha = 0)
the grids laid in tau or lambda, which are infinite there, run from 0.1% below it, and their first time is then `start`.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import grid_files, indices

Grid = str | Sequence[float] | Mapping[str, Any]

_GRIDS: dict[str, Callable[..., list[float]]] = {}


def _grid(name: str) -> Callable[[Callable[..., list[float]]], Callable[..., list[float]]]:
    def add(function: Callable[..., list[float]]) -> Callable[..., list[float]]:
        _GRIDS[name] = function
        return function

    return add


def names() -> list[str]:
    """The grids `times` knows by name; a list of times is a grid too."""
    return sorted(_GRIDS)


def times(grid: Grid | None, schedule: Schedule, steps: int, *, zero: str | None = None) -> tuple[float, ...]:
    """The N + 1 times of `grid`: a name, {"name": name, option: value}, a list of N + 1 times, or None for the default
    ("karras" on the edm schedule, "uniform" on the others).

    `zero` is the solver's own way to meet the clean end, used where the grid does not say one.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps is {steps!r}; give a whole number of at least 1.")
    if grid is None:
        grid = "karras" if schedule.name == "edm" else "uniform"
    if isinstance(grid, str):
        grid = {"name": grid}
    if not isinstance(grid, Mapping):
        return _custom(list(grid), schedule, steps)
    options = dict(grid)
    name = options.pop("name", None)
    if name not in _GRIDS:
        raise choose("grid", name, _GRIDS)
    known = list(inspect.signature(_GRIDS[name]).parameters)[2:]
    for option in options:
        if option not in known:
            raise choose(f"option of grid {name!r},", option, known)
    if zero is not None and "zero" in known:
        options.setdefault("zero", zero)
    return _checked(_GRIDS[name](schedule, steps, **options), f"grid {name!r}", falling=True)


def _custom(grid: list[float], schedule: Schedule, steps: int) -> tuple[float, ...]:
    if len(grid) != steps + 1:
        raise UserError(
            f"a custom grid for {steps} steps needs {steps + 1} times (the last is where it ends), not {len(grid)}."
        )
    try:
        values = [float(value) for value in grid]
    except (TypeError, ValueError):
        raise UserError(f"a custom grid holds numbers; {grid!r} does not.") from None
    outside = [value for value in values if not schedule.t_clean <= value <= schedule.last_time]
    if outside:
        raise UserError(
            f"a custom grid holds {outside[0]!r}, outside the times {schedule.t_clean:g} to {schedule.last_time:g} of "
            f"schedule {schedule.name!r}."
        )
    return _checked(values, "a custom grid", falling=values[-1] < values[0])


def _checked(values: Sequence[float], what: str, falling: bool) -> tuple[float, ...]:
    for before, after in itertools.pairwise(values):
        if not (after < before if falling else after > before):
            raise UserError(
                f"{what} must be strictly {'falling' if falling else 'rising'} and goes from {before!r} to {after!r}; "
                "reorder the times, or take fewer steps."
            )
    return tuple(values)


def _laid(
    schedule: Schedule,
    steps: int,
    start: float | None,
    end: float | None,
    zero: str,
    place: Callable[[float, float, float], float],
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


@_grid("uniform")
def uniform(
    schedule: Schedule, steps: int, start: float | None = None, end: float | None = None, zero: str = "none"
) -> list[float]:
    """Linear in t; down to t_clean unless `end` is given. On the sd schedule: diffusers' "trailing"."""
    last = schedule.t_clean if end is None and zero != "append" else end
    return _laid(schedule, steps, start, last, zero, lambda u, a, b: a + u * (b - a))


@_grid("quadratic")
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
    if not power > 0:
        raise UserError(f"grid 'quadratic' got power={power!r}; give a number above 0.")

    def place(u: float, a: float, b: float) -> float:
        low, high = (b - clean) ** (1 / power), (a - clean) ** (1 / power)
        return clean + (high + u * (low - high)) ** power

    return _laid(schedule, steps, start, last, zero, place)


@_grid("karras")
def karras(
    schedule: Schedule,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    zero: str = "append",
    rho: float = 7.0,
) -> list[float]:
    """Linear in tau^(1/rho), tau = sigma/alpha (2206.00364, eq. 5)."""
    if not rho > 0:
        raise UserError(f"grid 'karras' got rho={rho!r}; give a number above 0 (the paper's is 7).")

    def place(u: float, a: float, b: float) -> float:
        high, low = float(schedule.ratio(a)) ** (1 / rho), float(schedule.ratio(b)) ** (1 / rho)
        return float(schedule.time_of_ratio((high + u * (low - high)) ** rho))

    return _laid(schedule, steps, start, end, zero, place, finite=True)


@_grid("log_snr")
def log_snr(
    schedule: Schedule, steps: int, start: float | None = None, end: float | None = None, zero: str = "append"
) -> list[float]:
    """Linear in lambda = log(alpha/sigma) (2206.00927, section 3.4); the same as exponential in tau."""
    return exponential(schedule, steps, start, end, zero)


@_grid("exponential")
def exponential(
    schedule: Schedule,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    zero: str = "append",
    rho: float = 1.0,
) -> list[float]:
    """log tau falls linearly (rho = 1), or with the ramp (1 - u)^rho (k-diffusion's polyexponential)."""
    if not rho > 0:
        raise UserError(f"grid 'exponential' got rho={rho!r}; give a number above 0.")

    def place(u: float, a: float, b: float) -> float:
        high, low = float(schedule.half_log_snr(a)), float(schedule.half_log_snr(b))
        return float(schedule.time_of_half_log_snr(low + (1.0 - u) ** rho * (high - low)))

    return _laid(schedule, steps, start, end, zero, place, finite=True)


@_grid("beta")
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

    `coordinate` is what they are quantiles of: "t" (the paper's) or "ratio" (sigma/alpha, diffusers').
    """
    if not (a > 0 and b > 0):
        raise UserError(f"grid 'beta' got a={a!r} and b={b!r}; give numbers above 0.")
    if coordinate not in ("t", "ratio"):
        raise choose("coordinate of grid 'beta',", coordinate, ("t", "ratio"))

    def place(u: float, high: float, low: float) -> float:
        share = _beta_quantile(1.0 - u, a, b)
        if coordinate == "t":
            return low + share * (high - low)
        top, bottom = float(schedule.ratio(high)), float(schedule.ratio(low))
        return float(schedule.time_of_ratio(bottom + share * (top - bottom)))

    return _laid(schedule, steps, start, end, zero, place, finite=coordinate == "ratio")


def _beta_quantile(share: float, a: float, b: float) -> float:
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


@_grid("searched")
def searched(
    schedule: Schedule,
    steps: int,
    path: str | None = None,
    times: Mapping[Any, Sequence[float]] | None = None,
    end: float | None = None,
    zero: str | None = None,
) -> list[float]:
    """What `fewstep search-grid` wrote to `path`, or the same as a mapping `times` from steps to their N + 1 times.

    It ends where it was searched to end; zero="replace" ends it at t_clean, zero="none" at `end` (t_min unless given)
    where it was searched down to t_clean.
    """
    if (path is None) == (times is None) or not isinstance(path, str | None):
        raise UserError("grid 'searched' takes path, a file that `fewstep search-grid` wrote, or times; give one.")
    known = grid_files.read(path).for_schedule(schedule) if path is not None else grid_files.checked(times, schedule)
    if steps not in known:
        raise UserError(
            f"grid 'searched' holds grids of {', '.join(map(str, sorted(known)))} steps and not of {steps}; "
            f"search it with --steps {steps}."
        )
    values = list(known[steps])
    if zero == "replace":
        values[-1] = schedule.t_clean
    elif zero == "none" and is_clean(schedule, values[-1]):
        values[-1] = schedule.t_min if end is None else float(end)
    elif zero not in (None, "none"):
        raise choose("zero of grid 'searched',", zero, ("none", "replace"))
    return values


def portable(grid: Mapping[str, Any]) -> Mapping[str, Any]:
    """The grid without references to files: a searched grid with its times in it."""
    if grid.get("name") == "searched" and grid.get("path") is not None:
        known = grid_files.read(grid["path"]).grids
        times = {str(steps): list(values) for steps, values in known.items()}
        return {**{key: value for key, value in grid.items() if key != "path"}, "times": times}
    return grid


for _name, _function in (
    ("leading", indices.leading),
    ("trailing", indices.trailing),
    ("linspace", indices.linspace),
    ("lcm", indices.lcm),
    ("align_your_steps", indices.align_your_steps),
):
    _grid(_name)(_function)


def is_rising(values: Sequence[float]) -> bool:
    return values[-1] > values[0]


def is_clean(schedule: Schedule, t: float) -> bool:
    """Whether sigma is zero at t."""
    return t == schedule.t_clean
