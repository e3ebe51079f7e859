"""Searched grids are the cheapest ways, and their costs are what the papers say."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import schedules
from fewstep.errors import UserError
from fewstep.solvers import grid_files, grids, search

STD = 0.5
DATA = Gaussian(torch.zeros(3, dtype=torch.float64), STD)
# ten tight components in 64 dimensions: what the digits look like to a denoiser
DIGITS_LIKE = Mixture(
    [0.1] * 10, torch.randn(10, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.7, [0.3] * 10
)


def cheapest(costs: torch.Tensor, steps: int, growth: float) -> float:
    """Over all subsets of inner nodes."""
    last = len(costs) - 1
    ways = itertools.combinations(range(1, last), steps - 1)
    return min(search.path_cost(costs, (0, *inside, last), growth) for inside in ways)


@pytest.mark.parametrize("growth", [1.0, 1.15, 0.7])
def test_the_search_finds_what_trying_every_subset_finds(growth):
    costs = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # some negative
    found = search.search(costs, growth=growth)
    assert list(found) == list(range(1, 12))
    for steps, path in found.items():
        assert path.nodes[0] == 0 and path.nodes[-1] == 11 and len(path.nodes) == steps + 1
        assert path.cost == pytest.approx(search.path_cost(costs, path.nodes, growth), abs=1e-12)
        assert path.cost == pytest.approx(cheapest(costs, steps, growth), abs=1e-12)


def test_a_forbidden_step_is_never_taken():
    costs = torch.ones(5, 5)
    costs[0, 1:4] = math.inf
    assert set(search.search(costs)) == {1}  # only the direct step is left
    with pytest.raises(UserError, match="nan"):
        search.search(torch.full((3, 3), math.nan))
    with pytest.raises(UserError, match="1 to 4 steps; got 5"):
        search.search(costs, most=5)


def nodes(schedule, points: int = 11):
    first, last = schedule.time_of_half_log_snr(-3.0), schedule.time_of_half_log_snr(2.5)
    return grids.times({"name": "log_snr", "start": first, "end": last, "zero": "none"}, schedule, points)


@pytest.mark.parametrize("name", ["edm", "vp", "flow"])
@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_the_cost_of_a_step_is_what_eulers_method_errs_on_a_gaussian(name, metric):
    schedule = schedules.get(name)
    times = nodes(schedule, 200)  # fine, so that the walked trajectory is the exact one
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs = search.trajectory_costs(DATA.teacher(schedule), noise, times, metric=metric)
    start = schedule.sigma(times[0]) * noise
    for i, j in ((0, 40), (50, 150), (100, 200)):
        x, exact = (DATA.flow_map(start, schedule, times[0], times[k]) for k in (i, j))
        keep, gain = solvers.rows.jump(schedule, times[i], times[j])
        landed = keep * x + gain * DATA.denoise(x, schedule.alpha(times[i]), schedule.sigma(times[i]))
        scale = schedule.alpha(times[j]) + (schedule.sigma(times[j]) if name == "flow" else 0.0)
        error = ((landed - exact) / scale).norm(p=int(metric[1]), dim=1).mean()
        assert float(costs[i, j]) == pytest.approx(float(error), rel=0.01)  # the walk's own error at 200 steps


def test_deviation_is_the_distance_from_the_chord_less_the_teachers():
    schedule, times = schedules.get("edm"), (4.0, 2.0, 1.0, 0.5)
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = DIGITS_LIKE.teacher(schedule)
    costs = search.trajectory_costs(teacher, noise, times)
    plan = solvers.plan("dpmpp_2m", schedule, 3, grid=list(times), prediction="x0")
    states = solvers.execute(plan, teacher, noise, record=("x",)).recorded["x"]

    def away(x):
        chord = states[-1] - states[0]
        along = ((x - states[0]) * chord).sum(1, keepdim=True) / chord.square().sum(1, keepdim=True)
        return (x - states[0] - along * chord).norm(dim=1)

    landed = states[0] + (times[2] - times[0]) * (states[0] - teacher(states[0], times[0])) / times[0]
    assert float(costs[0, 2]) == pytest.approx(float((away(landed) - away(states[2])).mean()), rel=1e-9)
    assert bool(costs[1:, 0].isinf().all()) and bool(costs.diagonal().isinf().all())


def test_gits_is_its_published_search():
    """As zju-pi/diff-sampler describes it, in sigma: iPNDM walks, a step costs its Euler error, the recurrence of V."""
    schedule, teacher = schedules.get("edm"), DIGITS_LIKE.teacher(schedules.get("edm"))
    times = grids.times({"name": "karras", "start": 20.0, "end": 0.1, "zero": "none"}, schedule, 8)
    noise = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adams = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    states, slopes = [times[0] * noise], []
    for t, s in itertools.pairwise(times):
        slopes.insert(0, (states[-1] - teacher(states[-1], t)) / t)
        states.append(states[-1] + (s - t) * sum(w * d for w, d in zip(adams[min(len(slopes), 4) - 1], slopes)))
    slopes.reverse()

    def away(x):
        chord = (states[-1] - states[0]) / (states[-1] - states[0]).norm(dim=1, keepdim=True)
        rest = states[-1] - x
        return (rest - (rest * chord).sum(1, keepdim=True) * chord).norm(dim=1)

    last, inf = len(times) - 1, math.inf
    costs = [[inf] * (last + 1) for _ in range(last + 1)]
    for i, j in itertools.combinations(range(last + 1), 2):
        landed = states[i] + (times[j] - times[i]) * slopes[i]
        costs[i][j] = float((away(landed) - away(states[j])).mean())
    value = {(j, 1): costs[j][last] for j in range(last)}
    for k in range(2, last + 1):
        for j in range(last):
            value[j, k] = min(
                (costs[j][i] + 1.15 * value.get((i, k - 1), inf) for i in range(j + 1, last)), default=inf
            )
    found = search.trajectory_costs(teacher, noise, times, solver="ipndm")
    torch.testing.assert_close(found, torch.tensor(costs, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    for steps, path in search.search(found, growth=1.15).items():
        assert path.cost == pytest.approx(value[0, steps], rel=1e-9, abs=1e-9)


def test_the_free_node_is_the_one_after_which_samples_end_nearest():
    """In sigma, where the analytic first step has slope x/sqrt(1 + sigma^2)."""
    schedule = schedules.get("edm")
    times, teacher = nodes(schedule, 12), DIGITS_LIKE.teacher(schedule)
    noise = torch.randn(16, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = DIGITS_LIKE.flow_map(times[0] * noise, schedule, times[0], times[-1])
    path = search.Path((0, 5, 8, 12), 1.0)

    def ended(node):
        x, t = times[0] * noise, times[0]
        x = x + (times[node] - t) * x / math.sqrt(1.0 + t**2)
        for i, j in ((node, 5), (5, 8), (8, 12)):
            x = x + (times[j] - times[i]) * (x - teacher(x, times[i])) / times[i]
        return float((x - target).norm(dim=1).mean())

    found = search.free_node(teacher, noise, target, times, path)
    assert found.nodes == (0, min(range(1, 5), key=ended), 5, 8, 12)
    assert found.nodes[1] > 1  # not merely the first tried
    with pytest.raises(UserError, match="passes over no node"):
        search.free_node(teacher, noise, target, times, search.Path((0, 1, 12), 1.0))


@pytest.mark.parametrize("metric", ["dev", "l2"])
@pytest.mark.parametrize("name", ["edm", "vp"])
def test_a_searched_grid_beats_even_ones_in_its_own_cost(name, metric):
    schedule = schedules.get(name)
    times = nodes(schedule, 30)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs = search.trajectory_costs(DIGITS_LIKE.teacher(schedule), noise, times, metric=metric)
    found = search.search(costs, most=6, growth=1.15)
    for steps in range(2, 7):
        even_in_log_snr = [round(30 * i / steps) for i in range(steps + 1)]
        for way in (even_in_log_snr, even_in_time(times, steps)):
            if len(set(way)) == steps + 1 and tuple(way) != found[steps].nodes:
                assert found[steps].cost < search.path_cost(costs, way, 1.15)


def even_in_time(times, steps: int) -> list[int]:
    """The nodes nearest to times evenly spaced."""
    wanted = [times[0] + (times[-1] - times[0]) * i / steps for i in range(steps + 1)]
    return [min(range(len(times)), key=lambda n: abs(times[n] - t)) for t in wanted]


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_on_the_searched_grid_few_steps_end_nearer_to_the_exact_path_than_evenly_in_time(steps):
    """On new noise. (Even in log-SNR is nearer still on this mixture: the cost charges steps one by one.)"""
    schedule = schedules.get("edm")
    times, teacher = nodes(schedule, 30), DIGITS_LIKE.teacher(schedule)
    noise, fresh = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = search.search(search.trajectory_costs(teacher, noise, times), growth=1.15)[steps]
    exact = DIGITS_LIKE.flow_map(times[0] * fresh, schedule, times[0], times[-1])

    def distance(way):
        plan = solvers.plan("ddim", schedule, steps, grid=[times[n] for n in way], prediction="x0")
        return float((solvers.sample(teacher, plan, fresh) - exact).norm(dim=1).mean())

    assert distance(found.nodes) < 0.6 * distance(even_in_time(times, steps))


def test_moments_and_both_bounds_are_the_closed_forms_on_a_gaussian():
    schedule = schedules.get("vp")
    times = nodes(schedule)
    generator = torch.Generator().manual_seed(0)
    errors, moments = search.second_moments(
        DATA.teacher(schedule, "v"), DATA.sample(40_000, generator), times[:-1], generator=generator
    )
    spread = [schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2 for t in times]
    exact_errors = [STD**2 * schedule.sigma(t) ** 2 / q for t, q in zip(times[:-1], spread)]
    exact_moments = [schedule.sigma(t) ** 2 / q for t, q in zip(times[:-1], spread)]
    # means of 120000 squares of a normal: relative standard error 0.4%
    assert errors == pytest.approx(exact_errors, rel=0.02) and moments == pytest.approx(exact_moments, rel=0.02)

    bound = search.bound_costs(schedule, times, exact_errors)
    i, j = 3, 7
    alpha, sigma, to, left = (f(t) for t in (times[i], times[j]) for f in (schedule.alpha, schedule.sigma))
    shrink = (left * alpha / (to * sigma)) ** 2  # e^{-2h}
    gain, variance = to * (1 - shrink), left**2 * (1 - shrink)  # of D in the posterior mean, and its variance
    assert float(bound[i, j]) == pytest.approx(gain**2 * exact_errors[i] / (2 * variance), rel=1e-12)

    best = search.optimal_variance_costs(schedule, times, exact_moments)
    # adding steps can only lower the bound, and with the exact variance every chain is exact: the sum telescopes to
    # half the log ratio of the exact conditional variances, here of one jump from first to last
    for way in ([0, 10], [0, 3, 10], [0, 2, 5, 7, 10]):
        kept = [(schedule.alpha(times[a]) / schedule.alpha(times[b])) ** 2 for a, b in itertools.pairwise(way)]
        forward = [
            schedule.sigma(times[a]) ** 2 - k * schedule.sigma(times[b]) ** 2
            for k, (a, b) in zip(kept, itertools.pairwise(way))
        ]
        exact = sum(
            math.log(v * spread[b] / spread[a] / v) + math.log(k)
            for v, k, (a, b) in zip(forward, kept, itertools.pairwise(way))
        )
        assert search.path_cost(best, way) == pytest.approx(exact, rel=1e-12)


def test_a_bounds_last_node_at_sigma_zero_is_reached_from_the_one_before():
    schedule = schedules.get("vp")
    times = (*nodes(schedule), schedule.t_clean)
    costs = search.bound_costs(schedule, times, [0.1] * (len(times) - 1))
    found = search.search(costs)
    assert 1 not in found and all(path.nodes[-2] == len(times) - 2 for path in found.values())


def test_nodes_with_moments_above_one_are_passed_evenly():
    costs = torch.rand(21, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = [1.02, 1.01, 0.99] + [0.5] * 17
    for steps, path in search.segmented(costs, moments).items():
        assert len(path.nodes) == steps + 1 and list(path.nodes) == sorted(set(path.nodes))
        assert path.nodes[0] == 0 and 4 in path.nodes and path.nodes[-1] == 20  # twice the two poor nodes
    assert search.segmented(costs, [0.5] * 20) == search.search(costs)


def searched(schedule, **changes) -> grid_files.SearchedGrid:
    content = {
        "schedule": schedule,
        "searched": {"cost": "dev"},
        "nodes": (9.0, 3.0, 1.0, 0.0),
        "costs": ((1.0, 2.0, 0.1 + 0.2), (1.0, math.inf), (1.0,)),
        "grids": {1: (9.0, 0.0), 2: (9.0, 1.0, 0.0)},
        "prices": {1: 0.3, 2: 3.0},
    }
    return grid_files.SearchedGrid(**{**content, **changes})


def test_a_searched_grid_survives_its_file_and_serves_plans(tmp_path):
    schedule = schedules.get("edm")
    grid, path = searched(schedule), tmp_path / "grid.json"
    grid_files.write(grid, path)
    back = grid_files.read(path)
    assert (back.nodes, back.costs, back.grids, back.prices) == (grid.nodes, grid.costs, grid.grids, grid.prices)
    assert back.matrix()[0] == [math.inf, 1.0, 2.0, 0.1 + 0.2]
    plan = solvers.plan("ddim", schedule, 2, grid={"name": "searched", "path": str(path)}, prediction="x0")
    assert plan.times == (9.0, 1.0, 0.0)
    path.unlink()  # the plan holds the times and not the path
    again = solvers.plan(plan.solver, plan.schedule, 1, prediction="x0", **plan.options)
    assert again.times == (9.0, 0.0)
    assert solvers.Plan.from_json(plan.to_json()) == plan
    student = solvers.plan("consistency", schedule, 2, grid=plan.options["grid"], prediction="edm")
    assert student.times == (9.0, 1.0, 0.0)


def test_a_bad_searched_grid_is_one_sentence(tmp_path):
    schedule, path = schedules.get("edm"), tmp_path / "grid.json"

    def refused(text: str, steps: int = 2, on=schedule) -> str:
        path.write_text(text)
        with pytest.raises(UserError) as error:
            grids.times({"name": "searched", "path": str(path)}, on, steps)
        said = str(error.value)
        assert said.endswith(".") and "\n" not in said
        return said

    good = json.loads(searched(schedule).to_json())
    assert "not JSON" in refused("{")
    assert grid_files.FORMAT in refused("[1, 2]")
    assert "'grids' is missing" in refused(json.dumps({k: v for k, v in good.items() if k != "grids"}))
    assert "does not fall" in refused(json.dumps({**good, "grids": {"2": {"times": [9, 9, 0], "cost": 1}}}))
    assert "does not fall" in refused(json.dumps({**good, "grids": {"1": {"times": [9, -1], "cost": 1}}}))
    assert "one time more" in refused(json.dumps({**good, "grids": {"2": {"times": [9, 0], "cost": 1}}}))
    assert "finite" in refused(json.dumps({**good, "grids": {"1": {"times": ["9", 0], "cost": 1}}}))
    assert "costs do not fit" in refused(json.dumps({**good, "costs": [[1]]}))
    assert "1, 2 steps and not of 3" in refused(json.dumps(good), 3)
    assert "schedule" in refused(json.dumps(good), on=schedules.get("edm", t_max=50.0))
    for options in ({}, {"path": 3}, {"path": "a", "times": {}}, {"times": {"2": [1, 2]}}, {"times": [3]}):
        with pytest.raises(UserError):
            grids.times({"name": "searched", **options}, schedule, 2)
