"""Solvers that are the same thing are the same table, and the integrals behind them are the integrals."""

from __future__ import annotations

import math

import pytest

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.solvers import moments

ALL = schedules.names()
STEPS = 7


def rows(solver: str, name: str, steps: int = STEPS, prediction: str = "x0", grid: object = None, **options):
    """The maps of every stage, for D (kind x0) on an uneven grid that ends above sigma = 0."""
    schedule = schedules.get(name)
    low, high = schedule.t_min + 0.02 * (schedule.t_max - schedule.t_min), 0.9 * schedule.t_max
    grid = [low + (high - low) * (1.0 - i / steps) ** 1.7 for i in range(steps + 1)] if grid is None else grid
    plan = solvers.plan(solver, schedule, steps, grid=grid, prediction=prediction, **options)
    table, written = [], {}
    for number, stage in enumerate(plan.stages):
        # a slot is named by the stage that filled it, so that rings of any depth compare
        table.append({written.get(key, key): value for key, value in stage.row("x").items() if value})
        written.update({output: f"{output[0]} of {number}" for output in stage.outputs if output not in ("x", "input")})
    return table


def same(one, other, rel: float = 1e-9) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other):
        for key in first.keys() | second.keys():
            # entries that cancel to nothing are left at rounding
            assert first.get(key, 0.0) == pytest.approx(second.get(key, 0.0), rel=rel, abs=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_four_names_of_ancestral_sampling_are_one_table(name):
    reference = rows("ddim", name, eta=1.0)
    same(rows("ddpm", name, final_noise=True), reference)
    same(rows("euler_a", name), reference)
    same(rows("dpmpp_2m_sde", name, order=1), reference)
    same(rows("sa", name, predictor=1, corrector=0), reference)


@pytest.mark.parametrize("name", ALL)
def test_what_is_ddim_without_noise(name):
    reference = rows("ddim", name)
    for solver, options in (
        ("euler", {}),
        ("dpm_solver", {"order": 1}),
        ("exponential", {"order": 1}),
        ("exponential", {"order": 1, "form": "eps"}),
        ("deis", {"order": 1}),
        ("deis", {"order": 1, "coordinate": "rho"}),
        ("ipndm", {"order": 1}),
        ("sa", {"predictor": 1, "corrector": 0, "strength": 0.0}),
        ("unipc", {"order": 1, "disable_corrector": list(range(STEPS))}),
        ("tcd", {"eta": 0.0}),
        ("ctm", {"gamma": 0.0}),
        ("dpmpp_2m_sde", {"order": 1, "eta": 0.0}),
    ):
        same(rows(solver, name, **options), reference)


@pytest.mark.parametrize("name", ALL)
def test_one_step_of_any_multistep_is_ddim(name):
    reference = rows("ddim", name, steps=1)
    for solver in ("dpmpp_2m", "dpmpp_3m", "exponential", "unipc", "deis", "ipndm", "ipndm_v", "plms", "pndm"):
        same(rows(solver, name, steps=1), reference)
    same(rows("sa", name, steps=1, strength=0.0), reference)


@pytest.mark.parametrize("name", ALL)
def test_second_and_third_orders_under_several_names(name):
    off = {"disable_corrector": list(range(STEPS))}
    same(rows("unipc", name, order=2, **off), rows("dpmpp_2m", name))
    same(rows("unipc", name, order=3, **off), rows("dpmpp_3m", name))
    same(rows("exponential", name, order=2), rows("dpmpp_2m", name, variant="exact"))
    same(rows("exponential", name, slope="midpoint"), rows("dpmpp_3m", name))
    same(rows("dpmpp_3m_sde", name, eta=0.0), rows("dpmpp_3m", name))
    same(rows("dpmpp_2m_sde", name, eta=0.0), rows("dpmpp_2m", name))
    noise_form = rows("exponential", name, order=2, form="eps", slope="midpoint")
    same(rows("dpmpp_2m_sde", name, eta=0.0, form="eps"), noise_form)
    same(rows("deis", name, coordinate="log_rho"), rows("exponential", name, form="eps"))
    same(rows("ipndm_v", name), rows("deis", name, coordinate="rho", order=4))
    # SA's predictor is the exact row, but for H/2 in the place of I_1 at two nodes
    same(
        rows("sa", name, predictor=3, corrector=0, strength=0.0)[2:],
        rows("exponential", name)[2:],
    )


@pytest.mark.parametrize("name", ALL)
def test_a_bare_restart_is_heun_and_full_renoising_is_consistency(name):
    same(rows("restart", name), rows("heun", name))
    grid = {"name": "uniform", "start": 0.9 * schedules.get(name).t_max, "zero": "replace"}
    consistency = rows("consistency", name, grid=grid)
    same(rows("lcm", name, grid=grid), consistency)
    same(rows("ctm", name, grid=grid, gamma=1.0), consistency)
    if schedules.get(name).t_clean == 0.0:  # on indices TCD lands at index 0, which is not clean
        same(rows("tcd", name, grid=grid, eta=1.0), consistency)


def test_bh1_and_bh2_differ_only_where_no_system_is_solved():
    one, two = rows("unipc", "vp", order=3), rows("unipc", "vp", order=3, variant="bh1")
    differ = [i for i in range(STEPS) if any(abs(one[i][k] - two[i].get(k, 0.0)) > 1e-9 for k in one[i])]
    assert differ == [1]  # the corrector of order 1 and the predictor of order 2 share that row


def test_a_restart_counts_its_evaluations():
    schedule = schedules.get("edm")
    plan = solvers.plan("restart", schedule, 18, prediction="edm", intervals=[[4, 2, 0.3, 1.5], [3, 5, 1.0, 20.0]])
    assert plan.evaluations == 2 * 18 - 1 + 2 * 2 * (4 - 1) + 5 * 2 * (3 - 1)
    assert plan.stochastic_stages == 2 + 5


def test_churn_raises_the_level_the_network_is_told():
    schedule = schedules.get("edm")
    plain = solvers.plan("heun", schedule, 10, prediction="edm")
    plan = solvers.plan(
        "heun", schedule, 10, prediction="edm", churn=3.0, churn_low=0.05, churn_high=50.0, churn_noise=1.003
    )
    gamma = min(3.0 / 10, math.sqrt(2) - 1)
    for ours, theirs in zip(plan.stages[::2], plain.stages[::2]):
        inside = 0.05 <= theirs.time <= 50.0
        assert ours.time == pytest.approx(theirs.time * (1 + gamma * inside), rel=1e-12)
    row = plan.stages[1].row("x")  # the first step's second stage carries the second step's noise
    level = plain.stages[2].time
    assert row["noise"] == pytest.approx(1.003 * level * math.sqrt((1 + gamma) ** 2 - 1), rel=1e-12)
    everywhere = solvers.plan("euler", schedule, 10, prediction="edm", churn=3.0)
    assert everywhere.initial_scale == pytest.approx(80.0 * (1 + gamma), rel=1e-12)


@pytest.mark.parametrize("h", [1e-9, 1e-3, 0.3, 0.999, 1.001, 4.0, 30.0, -0.2, -3.0])
def test_moments_are_the_integrals(h):
    points, parts = moments.gauss_legendre(60)
    for k in range(4):
        for found, rate in ((moments.decaying(h, 4)[k], -h), (moments.growing(h, 4)[k], h)):
            integral = sum(
                0.5 * w * h * math.exp(rate * (1 - u)) * u**k
                for u, w in ((0.5 * (x + 1), w) for x, w in zip(points, parts))
            )
            assert found == pytest.approx(integral, rel=1e-12 * max(1.0, abs(h)) ** k)


def test_weights_integrate_polynomials_exactly():
    nodes, values = [0.0, -0.7, -1.1, 1.0], moments.decaying(0.8, 4)
    weights = moments.weights(nodes, values)
    for k in range(4):
        assert sum(w * u**k for w, u in zip(weights, nodes)) == pytest.approx(values[k], rel=1e-12)
