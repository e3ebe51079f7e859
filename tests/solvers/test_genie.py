"""GENIE's Taylor step is of order 2 with the right derivative, whoever gives it; a first step may ask nobody."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import Denoiser, schedules
from fewstep.errors import UserError
from fewstep.solvers import Plan
from fewstep.solvers.genie import DerivativeHead

MEAN, STD = torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35
GAUSSIAN = Gaussian(MEAN, STD)
MIXTURE = Mixture([0.4, 0.6], [[-0.5, 0.3], [0.4, -0.2]], [0.5, 0.35])
NOISE = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def closed_form(schedule, kind, told, x):
    """(d eps/d gamma, gamma) on N(m, s^2): eps = gamma (x/alpha - m)/(s^2 + gamma^2), and x/alpha moves by eps d gamma,
    so that the derivative along the path is s^2 (x/alpha - m)/(s^2 + gamma^2)^2.
    """
    t = Denoiser(torch.nn.Identity(), schedule, kind).prediction.time_of_network_time(schedule, told)[:, None]
    gamma = schedule.ratio(t)
    return STD**2 * (x / schedule.alpha(t) - MEAN) / (STD**2 + gamma**2) ** 2, gamma


def measured(data, name, kind, grid, of, steps=(64, 128, 256), **options):
    schedule = schedules.get(name)
    first, last = schedule.time_of_half_log_snr(-3.0), schedule.time_of_half_log_snr(2.5)
    exact = data.flow_map(schedule.sigma(first) * NOISE, schedule, first, last)
    found = []
    for count in steps:
        laid = {"name": grid, "start": first, "end": last, "zero": "none"}
        plan = solvers.plan("genie", schedule, count, grid=laid, prediction=kind, **options)
        assert plan.evaluations == 2 * count and plan.roles == ("head",)
        teacher = data.teacher(schedule, kind)
        found.append(float((solvers.sample(teacher, plan, NOISE, others={"head": of(teacher)}) - exact).abs().max()))
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(found)]


@pytest.mark.parametrize(("name", "kind", "grid"), [("vp", "v", "log_snr"), ("flow", "flow", "uniform")])
def test_the_closed_form_derivative_on_gaussian_data_gives_order_two(name, kind, grid):
    def derivative(teacher):
        return lambda x, told: closed_form(teacher.schedule, kind, told, x)[0]

    def mixed(teacher):
        def heads(x, told):
            slope, gamma = closed_form(teacher.schedule, kind, told, x)
            # -k1/gamma + k2 gamma/(1 + gamma^2) + k3/(gamma (1 + gamma^2)), in equal shares
            whole = 1.0 + gamma**2
            return -gamma * slope / 3.0, whole / gamma * slope / 3.0, gamma * whole * slope / 3.0

        return heads

    for head, options in ((derivative, {}), (mixed, {"head": "mixed"})):
        for order in measured(GAUSSIAN, name, kind, grid, head, **options):
            assert order == pytest.approx(2.0, abs=0.1)

    def half(teacher):
        return lambda x, told: 0.5 * derivative(teacher)(x, told)

    assert max(measured(GAUSSIAN, name, kind, grid, half)) < 1.1


@pytest.mark.parametrize(("name", "kind", "grid"), [("vp", "eps", "log_snr"), ("edm", "edm", "karras")])
def test_a_denoisers_own_derivative_gives_order_two_on_the_mixture(name, kind, grid):
    for order in measured(MIXTURE, name, kind, grid, DerivativeHead, steps=(32, 64)):
        assert order == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(("name", "kind"), [("vp", "eps"), ("edm", "edm"), ("flow", "flow"), ("trigflow", "v")])
def test_the_denoisers_own_derivative_is_the_closed_form(name, kind):
    schedule = schedules.get(name)
    teacher = GAUSSIAN.teacher(schedule, kind)
    for ratio in (5.0, 0.6, 0.05):
        t = torch.full((6,), float(schedule.time_of_ratio(ratio)), dtype=torch.float64)
        told = teacher.prediction.network_time(schedule, t)
        scaled = teacher.prediction.input_scale(schedule, t)[:, None] * NOISE
        expected, _ = closed_form(schedule, kind, told, NOISE)
        torch.testing.assert_close(DerivativeHead(teacher)(scaled, told), expected, rtol=1e-9, atol=1e-9)


def test_a_head_within_the_network_is_the_head_beside_it():
    schedule = schedules.get("vp")
    teacher = MIXTURE.teacher(schedule, "eps")
    head = DerivativeHead(teacher)
    beside, within = (solvers.plan("genie", schedule, 6, prediction="eps", within=inside) for inside in (False, True))
    expected = solvers.sample(teacher, beside, NOISE, others={"head": head})
    both = Denoiser(torch.nn.Identity(), schedule, "eps")
    both.net.forward = lambda x, t: torch.cat([teacher.net(x, t), head(x, t)], 1)
    torch.testing.assert_close(solvers.sample(both, within, NOISE), expected, rtol=0, atol=1e-12)
    assert (beside.evaluations, within.evaluations) == (11, 6)  # the step to sigma = 0 asks no head


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_the_picture_does_not_depend_on_the_prediction_type_and_the_plan_survives_json(guidance):
    schedule, cond, found = schedules.get("vp"), torch.tensor([0, 1, 0, 1, 1, 0]), []
    for kind in ("eps", "v", "edm"):
        teacher = MIXTURE.teacher(schedule, kind)
        plan = solvers.plan("genie", schedule, 6, prediction=kind, guidance=guidance, head="mixed", grid="karras")
        again = Plan.from_json(plan.to_json())
        assert again == plan
        head = DerivativeHead(teacher)
        mixed = {"head": lambda x, t, c, head=head: (0.0 * x, 0.0 * x, head(x, t, c))}
        found.append(solvers.sample(teacher, again, NOISE, cond, others=mixed))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_point_masses_are_reached_exactly():
    point = torch.tensor([[0.4, -1.1]], dtype=torch.float64)
    schedule = schedules.get("edm")
    plan = solvers.plan("genie", schedule, 4, prediction="x0", grid={"name": "karras", "zero": "none"})
    nothing = {"head": lambda x, t: torch.zeros_like(x)}  # eps is constant along a straight path
    found = solvers.sample(lambda x, t: point.expand_as(x), plan, NOISE, others=nothing)
    # the start, t_max * NOISE, is the point and t_max times this noise
    expected = point + schedule.t_min * (NOISE - point / schedule.t_max)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [name for name in solvers.names() if name not in ("consistency", "lcm", "scm")])
@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_an_analytic_first_step_is_the_solver_told_that_the_state_is_noise(solver, name):
    """Against the same plan whose network is told to answer x/sqrt(alpha^2 + sigma^2) the first time it is asked."""
    schedule = schedules.get(name)
    grid = {"name": "uniform", "start": 0.98 * schedule.t_max, "end": 0.1 * schedule.t_max, "zero": "none"}
    plans = [
        solvers.plan(solver, schedule, 4, grid=grid, prediction="x0", analytic_first_step=analytic)
        for analytic in (True, False)
    ]
    free, asked = plans
    assert free.options["analytic_first_step"] and free.evaluations == asked.evaluations - 1 - len(asked.roles)
    assert Plan.from_json(free.to_json()) == free
    calls = []

    class Network(torch.nn.Module):
        def forward(self, x, t):
            calls.append(t)
            return MIXTURE.denoise(x, schedule.alpha(t), schedule.sigma(t))

    class First(Network):
        def forward(self, x, t):
            if calls:
                return super().forward(x, t)
            calls.append(t)
            alpha, sigma = schedule.alpha(float(t[0])), schedule.sigma(float(t[0]))
            return x * (1.0 - sigma / math.hypot(alpha, sigma)) / alpha

    def head(x, t):
        return torch.zeros_like(x) if len(calls) == 1 else torch.sin(x)

    carried = torch.randn(
        3, 1 + asked.stochastic_stages, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    expected = solvers.sample(First(), asked, carried, others={"head": head} if asked.roles else None)
    calls.append(None)
    found = solvers.sample(Network(), free, carried, others={"head": head} if asked.roles else None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_mistake_is_one_sentence():
    schedule = schedules.get("vp")
    for options, words in (
        ({"head": "taylor"}, "head of solver 'genie', 'taylor' is not known"),
        ({"order": 2}, "option of solver 'genie', 'order' is not known"),
    ):
        with pytest.raises(UserError, match=words):
            solvers.plan("genie", schedule, 4, **options)
    with pytest.raises(UserError, match="asks a network in the role 'head' and got none"):
        solvers.sample(MIXTURE.teacher(schedule, "eps"), solvers.plan("genie", schedule, 4), NOISE)
    with pytest.raises(UserError, match="cannot be analytic"):
        solvers.plan("euler", schedule, 4, churn=2.0, late_churn=True, analytic_first_step=True)
