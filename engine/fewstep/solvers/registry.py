"""Solvers by name: one function per solver, from a schedule and times to rows."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fewstep.diffusion import guidance as guiding
from fewstep.diffusion import prediction as predictions
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import grids, option_kinds
from fewstep.solvers.compiling import compiled
from fewstep.solvers.plans import Part, Plan, Row
from fewstep.solvers.told import retold

Family = Callable[..., "list[Row] | tuple[list[Row], float]"]
Registered = TypeVar("Registered", bound=Family)


@dataclasses.dataclass(frozen=True)
class Solver:
    family: Family
    summary: str
    zero: str | None
    grids: Mapping[str, grids.Grid]
    roles: tuple[str, ...]


_SOLVERS: dict[str, Solver] = {}
_PLUS_PLUS: dict[str, Family] = {}


def register(
    name: str,
    summary: str,
    zero: str | None = None,
    default_grids: Mapping[str, grids.Grid] | None = None,
    roles: Sequence[str] = (),
) -> Callable[[Registered], Registered]:
    """Makes `family(schedule, times, **options) -> rows` the solver called `name`.

    `zero` is how its default grids meet the clean end (see grids); `default_grids` maps schedule names to the grid that
    None means there. A keyword called `prediction` receives the prediction type. A family that starts at another scale
    than sigma at the first time returns (rows, scale). `roles`: further networks its default options ask.
    """

    def add(family: Registered) -> Registered:
        _SOLVERS[name] = Solver(family, summary, zero, default_grids or {}, tuple(roles))
        return family

    return add


def register_plus_plus(name: str) -> Callable[[Registered], Registered]:
    """Makes `family` the rows of solver `name` under CFG++, in terms of guided "D" and unconditional "U"."""

    def add(family: Registered) -> Registered:
        _PLUS_PLUS[name] = family
        return family

    return add


def names(alone: bool = False) -> list[str]:
    """The solvers `plan` knows; `alone`: those that by default ask no network beside the plan's."""
    return sorted(name for name, solver in _SOLVERS.items() if not (alone and solver.roles))


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
    guidance: Any = None,
    initial_scale: float | None = None,
    threshold: Mapping[str, float] | None = None,
    clip: float | None = None,
    told: str = "exact",
    analytic_first_step: bool = False,
    **options: Any,
) -> Plan:
    """Compiles solver `name` to a `Plan`.

    `grid` is a name, {"name": name, option: value}, a list of steps + 1 times, or None for the default. A rising list
    inverts: it takes a state at its first time. `guidance` is w in uncond + w (cond - uncond), or a form of guidance
    ({"name": name, option: value}, see fewstep.diffusion.guidance), for all steps or one per step. `initial_scale` is
    what the executor multiplies the standard normal start by: sigma at the first time unless given.

    Clean-sample estimates are bounded by `clip` (clamped to [-clip, clip]) or `threshold` ({"quantile": 0.995, "least":
    1.0, "most": ..}: clamped to that quantile of their magnitudes, kept within least and most, and divided by it;
    2205.11487, section 2.3). `told` is what the network is told of the time: "exact", or "rounded", "rounded_starts",
    "truncated" or "target" as published samplers do (see fewstep.solvers.told). `analytic_first_step` takes
    x/sqrt(alpha^2 + sigma^2), which is almost all noise, for the first evaluation's noise estimate and asks no network
    there (2210.05475, appendix; AFS). Raises UserError for anything it does not know.
    """
    if not isinstance(name, str) or name not in _SOLVERS:
        raise choose("solver", name, _SOLVERS)
    if not isinstance(schedule, Schedule):
        raise UserError(f"the schedule is {schedule!r}; give one made by fewstep.schedules.get(name).")
    kind = prediction.prediction if isinstance(prediction, Denoiser) else predictions.get(prediction)
    family = _family(name, guidance)
    known = [key for key in list(inspect.signature(family).parameters)[2:] if key != "prediction"]
    for option in options:
        if option not in known:
            if not known:
                raise UserError(f"solver {name!r} takes no option {option!r}; it has none.")
            raise choose(f"option of solver {name!r},", option, known)
    option_kinds.check(f"solver {name!r}", family, options)
    option_kinds.check("a plan", plan, {"initial_scale": initial_scale, "told": told})
    times = grid_times(name, schedule, steps, grid)
    if grids.is_rising(times) and grids.is_clean(schedule, times[0]):
        raise UserError(
            f"a rising grid starts at t={times[0]!r}, where sigma is zero and the noise is undetermined; "
            f"start it above, for example at t_min={schedule.t_min!r}."
        )
    needs = {"prediction": kind} if "prediction" in inspect.signature(family).parameters else {}
    made = family(schedule, times, **needs, **options)
    rows, own_scale = made if isinstance(made, tuple) else (made, float(schedule.sigma(times[0])))
    used = {"grid": _shown(grid, times), **options}
    used.update({key: value for key, value in (("threshold", threshold), ("clip", clip)) if value is not None})
    if analytic_first_step:
        first = next(i for i, row in enumerate(rows) if _asks(row))
        rows = [*(_unasked(schedule, row) for row in rows[: first + 1]), *rows[first + 1 :]]
        used["analytic_first_step"] = True
    if told != "exact":
        used["told"] = told
    if initial_scale is not None:
        used["initial_scale"] = float(initial_scale)
    else:
        initial_scale = 1.0 if grids.is_rising(times) else own_scale
    made_plan = compiled(
        name,
        schedule,
        kind,
        rows,
        guidance=guiding.per_step(guidance, [float(schedule.ratio(t)) for t in times[:-1]]),
        initial_scale=initial_scale,
        options=used,
        limit=_limit(threshold, clip),
        guided_by=guidance,
    )
    if not all(map(math.isfinite, _numbers(made_plan))):
        given = ", ".join(f"{key}={value!r}" for key, value in used.items() if value is not None)
        raise UserError(
            f"solver {name!r} has no finite coefficients on this grid with {given or 'these options'}; choose options "
            "nearer their defaults, or times above sigma = 0 and below pure noise."
        )
    return retold(made_plan, told, [row.step for row in rows])


def _numbers(made: Plan) -> Iterator[float]:
    """What a run of the plan computes with."""
    yield made.initial_scale
    for stage in made.stages:
        yield stage.network_time
        yield stage.input_scale
        yield from itertools.chain.from_iterable(stage.matrix)


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


def _family(name: str, guidance: Any) -> Family:
    """The solver's rows, or its rows under CFG++."""
    given = guidance if isinstance(guidance, Sequence) and not isinstance(guidance, str) else [guidance]
    if not any(isinstance(guiding.get(one), guiding.PlusPlus) for one in given):
        return _SOLVERS[name].family
    if name not in _PLUS_PLUS:
        raise choose("solver with rows for guidance 'cfg++',", name, _PLUS_PLUS)
    return _PLUS_PLUS[name]


def _asks(row: Row) -> bool:
    """Whether the row reads the network, and not only what guidance adds to it."""
    return any(name in "DEFUN" for terms in row.outputs.values() for name in terms)


def _unasked(schedule: Schedule, row: Row) -> Row:
    """The row with eps_hat = x/sqrt(alpha^2 + sigma^2) in the place of its networks' answers."""
    alpha, sigma = float(schedule.alpha(row.time)), float(schedule.sigma(row.time))
    norm = math.hypot(alpha, sigma)
    noise, clean = 1.0 / norm, alpha / (norm * (norm + sigma))  # the second is (1 - sigma/norm)/alpha
    values = {"D": clean, "U": clean, "E": noise, "N": noise, "G": 0.0}
    asked = {*row.answers, *(name for columns in row.others.values() for name in columns)}
    outputs = {}
    for name, terms in row.outputs.items():
        if "F" in terms or row.parts:
            raise UserError("the first step of this sampler reads the network's raw output and cannot be analytic.")
        kept = {key: value for key, value in terms.items() if key not in values and key not in asked}
        taken = math.fsum(value * values[key] for key, value in terms.items() if key in values)
        outputs[name] = {**kept, "x": kept.get("x", 0.0) + taken}
    return dataclasses.replace(row, outputs=outputs, answers=(), others={}, landing=None)


def _limit(threshold: Mapping[str, float] | None, clip: float | None) -> Part | None:
    """The part that bounds clean-sample estimates."""
    if threshold is not None and clip is not None:
        raise UserError("plan got both threshold and clip; give one of them.")
    if clip is not None:
        if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 < clip < math.inf:
            raise UserError(f"clip is {clip!r}; give a number above 0, or None.")
        return Part("clamp", (), (), (("most", float(clip)),))
    if threshold is None:
        return None
    if not isinstance(threshold, Mapping):
        raise UserError(f"threshold is {threshold!r}; give {{'quantile': 0.995, 'most': 1.0}} or the like, or None.")
    numbers = {"quantile": 0.995, "least": 1.0, "most": math.inf}
    for key, value in threshold.items():
        if key not in numbers:
            raise choose("option of threshold,", key, numbers)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{key} of threshold is {value!r}; give a number.")
        numbers[key] = float(value)
    if not (0.0 <= numbers["quantile"] <= 1.0 and 0.0 < numbers["least"] <= numbers["most"]):
        raise UserError(f"threshold is {dict(threshold)!r}; give 0 <= quantile <= 1 and 0 < least <= most.")
    return Part("threshold", (), (), tuple((key, value) for key, value in numbers.items() if math.isfinite(value)))
