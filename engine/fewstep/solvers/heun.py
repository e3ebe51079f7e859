"""Heun's method and the midpoint method in sigma/alpha. Karras et al. 2022, 2206.00364, algorithms 1 and 2; in the flow
coordinate, Heun of flow matching; with restarts, Xu et al. 2023, 2306.14878.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose
from fewstep.solvers import grids, multistep, rows
from fewstep.solvers.churn import Churn, level_down, lifted, started
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

COORDINATES = ("ratio", "flow")


@register("heun", "order 2, two evaluations a step (2N - 1 down to sigma = 0); 2206.00364")
def heun(
    schedule: Schedule,
    times: Sequence[float],
    *,
    coordinate: str | None = None,
    churn: float = 0.0,
    churn_low: float = 0.0,
    churn_high: float = math.inf,
    churn_noise: float = 1.0,
) -> tuple[list[Row], float]:
    """Two evaluations a step, one for the step to sigma' = 0.

    `coordinate` is where the trapezoid is taken: "ratio" (sigma/alpha, EDM's) or "flow" (sigma/(alpha + sigma), finite
    at pure noise); by default "flow" on the flow schedule and "ratio" on the others. `churn`, `churn_low`, `churn_high`
    and `churn_noise` as in euler (EDM's stochastic sampler).
    """
    coordinate = _coordinate("heun", schedule, times, coordinate)
    stir = Churn(churn, churn_low, churn_high, churn_noise)
    stir.check("heun", times)
    raised = stir.raised(schedule, times)
    table: list[Row] = []
    for step, s in enumerate(times[1:]):
        if table:
            table[-1] = lifted(schedule, table[-1], raised[step], churn_noise)
        table += _step(schedule, raised[step], s, coordinate, step)
    return table, started(schedule, times[0], raised[0], churn_noise)


def _coordinate(solver: str, schedule: Schedule, times: Sequence[float], coordinate: str | None) -> str:
    if coordinate is None:
        coordinate = "flow" if schedule.name == "flow" else "ratio"
    if coordinate not in COORDINATES:
        raise choose(f"coordinate of solver {solver!r},", coordinate, COORDINATES)
    if coordinate == "ratio" and schedule.alpha(max(times[0], times[-1])) == 0:
        raise UserError(
            f"solver {solver!r} divides by alpha, and alpha is zero at t={max(times[0], times[-1])!r}; "
            "use coordinate='flow', or start at a smaller t_max."
        )
    return coordinate


def _step(schedule: Schedule, t: float, s: float, coordinate: str, step: int) -> list[Row]:
    """Both stages of one step; the first alone down to sigma' = 0."""
    of_x, of_denoised = rows.jump(schedule, t, s)
    if is_clean(schedule, s):
        return [Row(t, s, {"x": {"x": of_x, "D": of_denoised}}, step)]
    first = {"x": {"x": of_x, "D": of_denoised}, "base": {"x": 1.0}, "d0": {"D": 1.0}}
    of_base, of_past, of_x, of_denoised = rows.trapezoid(schedule, t, s, coordinate)
    second = {"x": {"base": of_base, "d0": of_past, "x": of_x, "D": of_denoised}}
    return [Row(t, s, first, step), Row(s, s, second, step)]


@register("restart", "order 2, Heun with stretches repeated from fresh noise; 2306.14878")
def restart(
    schedule: Schedule,
    times: Sequence[float],
    *,
    intervals: Sequence[Sequence[float]] = (),
    coordinate: str | None = None,
    noise_scale: float = 1.0,
) -> list[Row]:
    """Heun, and after the step that ends nearest an interval's lower level, K returns to its upper level.

    `intervals` holds [points, K, low, high]: levels are sigma/alpha, and each return adds noise up to `high` and comes
    back over a Karras grid (rho 7) of `points` times. Without intervals this is heun.
    """
    coordinate = _coordinate("restart", schedule, times, coordinate)
    inner = _inner_grids(schedule, times, intervals)
    table: list[Row] = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        table += _step(schedule, t, s, coordinate, step)
        for grid, repeats in inner.get(step, []):
            for _ in range(repeats):
                table[-1] = lifted(schedule, table[-1], grid[0], noise_scale)
                for a, b in itertools.pairwise(grid):
                    table += _step(schedule, a, b, coordinate, step)
    return table


def _inner_grids(
    schedule: Schedule, times: Sequence[float], intervals: Sequence[Sequence[float]]
) -> dict[int, list[tuple[list[float], int]]]:
    """Step -> (grid, repeats) of the intervals that begin where it ends."""
    found: dict[int, list[tuple[list[float], int]]] = {}
    if intervals:
        multistep.falling("restart", times, "restarts only go down, use heun for inversion.")
    for interval in intervals:
        if len(interval) != 4 or interval[0] < 2 or interval[1] < 1 or not 0 < interval[2] < interval[3]:
            raise UserError(
                f"solver 'restart' got interval {list(interval)!r}; "
                "give [points >= 2, repeats >= 1, low, high] with 0 < low < high."
            )
        points, repeats, low, high = int(interval[0]), int(interval[1]), float(interval[2]), float(interval[3])
        ends = {i: s for i, s in enumerate(times[1:]) if not is_clean(schedule, s)}
        if not ends:
            raise UserError("solver 'restart' needs a step that ends above sigma = 0; take more steps.")
        step = min(ends, key=lambda i: abs(schedule.ratio(ends[i]) - low))
        top = min(float(schedule.time_of_ratio(high)), schedule.last_time)
        if not top > ends[step]:
            raise UserError(f"solver 'restart' got interval {list(interval)!r}, which ends below the grid's level.")
        laid = {"name": "karras", "start": top, "end": ends[step], "zero": "none"}
        found.setdefault(step, []).append((list(grids.times(laid, schedule, points - 1)), repeats))
    return found


@register("dpm2", "order 2, two evaluations a step; the midpoint method of 2206.00364 at even log(sigma/alpha)")
def dpm2(schedule: Schedule, times: Sequence[float], *, eta: float = 0.0) -> list[Row]:
    """k-diffusion's DPM2 ("KDPM2"); steps from pure noise and to sigma' = 0 are of order 1.

    `eta` above 0 is its ancestral form: the step goes to sigma_down of euler_a, and noise goes on top.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"solver 'dpm2' got eta={eta!r}; give a number from 0 (deterministic) to 1 (ancestral).")
    if eta > 0.0:
        multistep.falling("dpm2", times, "inversion is deterministic, give eta=0.")
    table: list[Row] = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        ratio, down = schedule.ratio(t), level_down(schedule, t, s, eta)
        if is_clean(schedule, down) or real.isinf(ratio):
            of_x, of_denoised = rows.jump(schedule, t, down)
            table.append(lifted(schedule, Row(t, down, {"x": {"x": of_x, "D": of_denoised}}, step), s))
            continue
        ratio_down = schedule.ratio(down)
        middle = float(schedule.time_of_ratio(math.sqrt(ratio * ratio_down)))
        of_x, of_denoised = rows.jump(schedule, t, middle)
        table.append(Row(t, middle, {"x": {"x": of_x, "D": of_denoised}, "base": {"x": 1.0}}, step))
        move = (ratio_down - ratio) * schedule.alpha(down)
        update = {"base": schedule.alpha(down) / schedule.alpha(t), "E": move}
        table.append(lifted(schedule, Row(middle, down, {"x": update}, step), s))
    return table
