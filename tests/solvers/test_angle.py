"""TrigFlow's samplers and Runge-Kutta methods in sigma/alpha are what they are named for."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.errors import UserError

ALL = schedules.names()


def maps(plan):
    """Every stage's map of the state, without names."""
    return [{key: value for key, value in stage.row("x").items() if value} for stage in plan.stages]


def same(one, other, rel=1e-9):
    assert len(one) == len(other)
    for first, second in zip(one, other):
        for key in first.keys() | second.keys():
            assert first.get(key, 0.0) == pytest.approx(second.get(key, 0.0), rel=rel, abs=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_trigflow_of_order_one_is_ddim(name):
    one, other = (solvers.plan(s, schedules.get(name), 6, prediction="v") for s in ("trigflow", "ddim"))
    same(maps(one), maps(other))


def test_trigflow_is_the_papers_rotation():
    """x' = cos(t - t') x - sin(t - t') sigma_data F, with F of the paper's sign; here F's sign is turned."""
    schedule = schedules.get("trigflow")
    plan = solvers.plan("trigflow", schedule, 5, prediction="edm")
    for stage in plan.stages:
        row, d = stage.row("x"), stage.time - stage.target
        assert row["x"] == pytest.approx(math.cos(d), rel=1e-12)
        assert row["cond"] == pytest.approx(0.5 * math.sin(d), rel=1e-12)


def test_the_second_order_is_the_trapezoid_of_a_rotation():
    schedule = schedules.get("trigflow")
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def net(scaled, told):
        return torch.tanh(scaled @ mix) + told[:, None]

    times = [1.4, 0.9, 0.3]
    plan = solvers.plan("trigflow", schedule, 2, grid=times, prediction="edm", order=2, initial_scale=1.0)
    state = x
    for t, s in ((1.4, 0.9), (0.9, 0.3)):

        def slope(y, at):  # sigma_data F of the paper
            told = torch.full((4,), math.log(0.5 * math.tan(at)) / 4.0, dtype=torch.float64)
            return -0.5 * net(y / 0.5, told)

        first = slope(state, t)
        ahead = math.cos(s - t) * state + math.sin(s - t) * first
        state = state + math.tan((s - t) / 2) * (first + slope(ahead, s))
    torch.testing.assert_close(solvers.sample(net, plan, x), state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_scm_is_consistency_on_scms_times(name):
    schedule = schedules.get(name)
    for steps in (1, 2, 4):
        one = solvers.plan("scm", schedule, steps, prediction="v")
        other = solvers.plan("consistency", schedule, steps, prediction="v", grid="scm")
        assert one.stages == other.stages
    middle = solvers.plan("scm", schedule, 2, prediction="v").times[1]
    scale = getattr(schedule, "sigma_data", 0.5)
    assert math.atan(schedule.ratio(middle) / scale) == pytest.approx(1.3, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in ALL if name != "flow"])
def test_rho_runge_kutta_of_order_two_is_heun(name):
    one = solvers.plan("rho_rk", schedules.get(name), 5, grid="karras", prediction="v", order=2)
    other = solvers.plan("heun", schedules.get(name), 5, grid="karras", prediction="v", coordinate="ratio")
    # one keeps noise estimates, the other clean ones: compared on a network
    start = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = [solvers.sample(lambda x, t: torch.sin(2.0 * x) + 0.1, plan, start) for plan in (one, other)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert one.evaluations == other.evaluations


@pytest.mark.parametrize(("order", "degree"), [(2, 1), (3, 2), (4, 3)])
def test_runge_kutta_integrates_noise_that_is_a_polynomial_in_rho_exactly(order, degree):
    """d(x/alpha)/d rho = rho^degree, whose integral is rho^(degree + 1)/(degree + 1); one degree more is not exact."""
    schedule = schedules.get("edm")
    grid, start = [3.0, 1.7, 0.2], torch.ones(1, 1, dtype=torch.float64)
    plan = solvers.plan("rho_rk", schedule, 2, grid=grid, prediction="eps", order=order, initial_scale=1.0)
    for power, exact in ((degree, True), (degree + 2, False)):
        found = float(solvers.sample(lambda x, t, p=power: t[:, None] ** p, plan, start))
        expected = 1.0 + (0.2 ** (power + 1) - 3.0 ** (power + 1)) / (power + 1)
        assert (found == pytest.approx(expected, rel=1e-12)) is exact


def test_a_mistake_is_one_sentence():
    schedule = schedules.get("vp")
    for solver, options, words in (
        ("trigflow", {"order": 3}, "order=3; choose one of: 1, 2"),
        ("trigflow", {"sigma_data": 0.0}, "sigma_data=0.0; give a number above 0"),
        ("rho_rk", {"order": 5}, "order=5; choose one of: 2, 3, 4"),
        ("rho_rk", {"order": 2, "place": 0.0}, "place=0.0; give a number above 0 and at most 1"),
        ("rho_rk", {"order": 4, "place": 0.5}, "only order 2 has a choice"),
    ):
        with pytest.raises(UserError, match=words):
            solvers.plan(solver, schedule, 4, **options)


def test_the_published_third_order_of_ipndm_v_is_right_only_where_steps_are_equal():
    """Steps of 3, 1 and 2 down in sigma: 2.333, -1.444, 0.111 in zju-pi/diff-sampler, 2.583, -1.778, 0.194 in truth."""
    edm = schedules.get("edm")

    def weights(grid, third):
        plan = solvers.plan("ipndm_v", edm, 3, grid=grid, prediction="eps", order=3, third=third)
        row = plan.stages[2].row("x")
        return [row[name] / (grid[3] - grid[2]) for name in ("cond", "d1", "d0")]

    uneven = [7.0, 4.0, 3.0, 1.0]
    assert weights(uneven, "misplaced_parenthesis") == pytest.approx([7 / 3, -13 / 9, 1 / 9])
    assert weights(uneven, "exact") == pytest.approx([31 / 12, -16 / 9, 7 / 36])
    even = [4.0, 3.0, 2.0, 1.0]
    assert weights(even, "misplaced_parenthesis") == pytest.approx(weights(even, "exact"))


def test_the_published_fourth_order_of_ipndm_v_is_not_the_integral_even_where_steps_are_equal():
    """Equal steps: 57, -65, 43, -11 over 24 in zju-pi/diff-sampler for Adams and Bashforth's 55, -59, 37, -9."""
    edm = schedules.get("edm")

    def weights(grid, fourth):
        plan = solvers.plan("ipndm_v", edm, 4, grid=grid, prediction="eps", fourth=fourth)
        row = plan.stages[3].row("x")
        return [24 * row[name] / (grid[4] - grid[3]) for name in ("cond", "d2", "d1", "d0")]

    even, uneven = [5.0, 4.0, 3.0, 2.0, 1.0], [9.7, 9.0, 6.0, 5.0, 3.0]
    assert weights(even, "exact") == pytest.approx([55, -59, 37, -9])
    assert weights(even, "unbalanced") == pytest.approx([57, -65, 43, -11])
    assert sum(weights(uneven, "exact")) == pytest.approx(24)
    # steps of 2, 1, 3 and 0.7, by hand
    slope, bend, spread = 1.0, 0.5 * (1 - 2 / 9 * 3 / 2), 4 / 3 / 3.7
    twist = (7 / 18 + 2 / 3 / 18) * 1.5 * 6 / 4.7
    by_hand = [1 + slope + bend + twist, -slope - 4 / 3 * bend - (4 / 3 + spread) * twist]
    by_hand += [bend / 3 + (1 / 3 + spread * (1 + 3 / 0.7)) * twist, -spread / 3 * twist]
    assert weights(uneven, "unbalanced") == pytest.approx([24 * w for w in by_hand])
    assert sum(by_hand) > 2.0
