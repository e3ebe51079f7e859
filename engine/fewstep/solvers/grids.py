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
from fewstep.solvers import flow_grids, grid_files, indices, option_kinds, spacing

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


def describe() -> dict[str, str]:
    """What each grid is and whose."""
    return {name: " ".join(str(inspect.getdoc(_GRIDS[name])).partition("\n\n")[0].split()) for name in names()}


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
        if not hasattr(grid, "__iter__"):
            raise UserError(f"the grid is {grid!r}; give a name, {{'name': name, option: value}}, or a list of times.")
        return _custom(list(grid), schedule, steps)
    options = dict(grid)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in _GRIDS:
        raise choose("grid", name, _GRIDS)
    known = list(inspect.signature(_GRIDS[name]).parameters)[2:]
    for option in options:
        if option not in known:
            raise choose(f"option of grid {name!r},", option, known)
    option_kinds.check(f"grid {name!r}", _GRIDS[name], options)
    if zero is not None and "zero" in known:
        options.setdefault("zero", zero)
    try:
        laid = [float(value) for value in _GRIDS[name](schedule, steps, **options)]
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError):
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise UserError(
            f"grid {name!r} cannot use {given}; its options are numbers, or names where it says so."
        ) from None
    return _checked(laid, f"grid {name!r}", schedule, falling=True)


def _custom(grid: list[float], schedule: Schedule, steps: int) -> tuple[float, ...]:
    if len(grid) != steps + 1:
        raise UserError(
            f"a custom grid for {steps} steps needs {steps + 1} times (the last is where it ends), not {len(grid)}."
        )
    try:
        values = [float(value) for value in grid]
    except (TypeError, ValueError):
        raise UserError(f"a custom grid holds numbers; {grid!r} does not.") from None
    return _checked(values, "a custom grid", schedule, falling=values[-1] < values[0])


def _checked(values: Sequence[float], what: str, schedule: Schedule, falling: bool) -> tuple[float, ...]:
    slack = 1e-9 * (schedule.t_max - schedule.t_clean)  # of the rounding with which a grid lays its ends
    for value in values:
        if not (math.isfinite(value) and schedule.t_clean - slack <= value <= schedule.last_time + slack):
            raise UserError(
                f"{what} holds {value!r}, outside the times {schedule.t_clean:g} to {schedule.last_time:g} of schedule "
                f"{schedule.name!r}."
            )
    for before, after in itertools.pairwise(values):
        if not (after < before if falling else after > before):
            raise UserError(
                f"{what} must be strictly {'falling' if falling else 'rising'} and goes from {before!r} to {after!r}; "
                "reorder the times, or take fewer steps."
            )
    return tuple(values)


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


for _function in (
    spacing.uniform,
    spacing.quadratic,
    spacing.karras,
    spacing.log_snr,
    spacing.exponential,
    spacing.beta,
    spacing.kl_optimal,
    spacing.scm,
    indices.leading,
    indices.trailing,
    indices.linspace,
    indices.lcm,
    indices.cm,
    indices.align_your_steps,
    flow_grids.flow_shift,
    flow_grids.linear_quadratic,
):
    _grid(_function.__name__)(_function)


def is_rising(values: Sequence[float]) -> bool:
    return values[-1] > values[0]


def is_clean(schedule: Schedule, t: float) -> bool:
    """Whether sigma is zero at t."""
    return t == schedule.t_clean
