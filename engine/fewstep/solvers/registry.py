"""Solvers by name: one function per solver, from a schedule and times to rows."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fewstep.diffusion import prediction as predictions
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import grids
from fewstep.solvers.plans import Plan, Row, compiled

Family = Callable[..., "list[Row] | tuple[list[Row], float]"]
Registered = TypeVar("Registered", bound=Family)


@dataclasses.dataclass(frozen=True)
class Solver:
    family: Family
    summary: str
    zero: str | None
    grids: Mapping[str, grids.Grid]


_SOLVERS: dict[str, Solver] = {}


def register(
    name: str, summary: str, zero: str | None = None, default_grids: Mapping[str, grids.Grid] | None = None
) -> Callable[[Registered], Registered]:
    """Makes `family(schedule, times, **options) -> rows` the solver called `name`.

    `zero` is how its default grids meet the clean end (see grids); `default_grids` maps schedule names to the grid that
    None means there. A keyword called `prediction` receives the prediction type. A family that starts at another scale
    than sigma at the first time returns (rows, scale).
    """

    def add(family: Registered) -> Registered:
        _SOLVERS[name] = Solver(family, summary, zero, default_grids or {})
        return family

    return add


def names() -> list[str]:
    """The solvers `plan` knows."""
    return sorted(_SOLVERS)


def describe() -> dict[str, str]:
    """One line per solver: order and paper."""
    return {name: _SOLVERS[name].summary for name in names()}


def plan(
    name: str,
    schedule: Schedule,
    steps: int,
    *,
    grid: grids.Grid | None = None,
    prediction: str | Prediction | Denoiser = "eps",
    guidance: float | Sequence[float | None] | None = None,
    initial_scale: float | None = None,
    **options: Any,
) -> Plan:
    """Compiles solver `name` to a `Plan`.

    `grid` is a name, {"name": name, option: value}, a list of steps + 1 times, or None for the default. A rising list
    inverts: it takes a state at its first time. `guidance` is w in uncond + w (cond - uncond), for all steps or one per
    step. `initial_scale` is what the executor multiplies the standard normal start by: sigma at the first time unless
    given. Raises UserError for anything it does not know.
    """
    if name not in _SOLVERS:
        raise choose("solver", name, _SOLVERS)
    solver = _SOLVERS[name]
    if not isinstance(schedule, Schedule):
        raise UserError(f"the schedule is {schedule!r}; give one made by fewstep.schedules.get(name).")
    kind = prediction.prediction if isinstance(prediction, Denoiser) else predictions.get(prediction)
    known = [key for key in list(inspect.signature(solver.family).parameters)[2:] if key != "prediction"]
    for option in options:
        if option not in known:
            if not known:
                raise UserError(f"solver {name!r} takes no option {option!r}; it has none.")
            raise choose(f"option of solver {name!r},", option, known)
    times = grid_times(name, schedule, steps, grid)
    if grids.is_rising(times) and grids.is_clean(schedule, times[0]):
        raise UserError(
            f"a rising grid starts at t={times[0]!r}, where sigma is zero and the noise is undetermined; "
            f"start it above, for example at t_min={schedule.t_min!r}."
        )
    scales = _per_step(guidance, steps)
    needs = {"prediction": kind} if "prediction" in inspect.signature(solver.family).parameters else {}
    made = solver.family(schedule, times, **needs, **options)
    rows, own_scale = made if isinstance(made, tuple) else (made, float(schedule.sigma(times[0])))
    used = {"grid": _shown(grid, times), **options}
    if initial_scale is not None:
        used["initial_scale"] = float(initial_scale)
    else:
        initial_scale = 1.0 if grids.is_rising(times) else own_scale
    return compiled(
        name,
        schedule,
        kind,
        rows,
        guidance=scales,
        initial_scale=initial_scale,
        options=used,
    )


def grid_times(name: str, schedule: Schedule, steps: int, grid: grids.Grid | None = None) -> tuple[float, ...]:
    """The N + 1 times that plan(name, schedule, steps, grid=grid) visits."""
    if name not in _SOLVERS:
        raise choose("solver", name, _SOLVERS)
    solver = _SOLVERS[name]
    laid = solver.grids.get(schedule.name) if grid is None else grid
    return grids.times(laid, schedule, steps, zero=solver.zero)


def _shown(grid: grids.Grid | None, times: Sequence[float]) -> Any:
    if grid is None or isinstance(grid, str):
        return grid
    return dict(grids.portable(grid)) if isinstance(grid, Mapping) else list(times)


def _per_step(guidance: float | Sequence[float | None] | None, steps: int) -> list[float | None]:
    given = list(guidance) if isinstance(guidance, Sequence) and not isinstance(guidance, str) else [guidance] * steps
    if len(given) != steps:
        raise UserError(f"guidance has {len(given)} entries for {steps} steps; give one number, or one per step.")
    for value in given:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"guidance is {value!r}; give a number, None, or one of these per step.")
    return [None if value is None else float(value) for value in given]
