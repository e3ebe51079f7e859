"""A pi-Flow policy's rollout is one row, and the row is the rollout."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian
from fewstep.diffusion import Denoiser, schedules
from fewstep.errors import UserError
from fewstep.solvers import Plan

FLOW = schedules.get("flow", shift=3.2)
HALF_LAST = {"name": "uniform", "end": 1 / 7, "zero": "append"}  # four steps, the last of them half as long
NOISE = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GAUSSIAN = Gaussian(torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35)


def policy(points):
    """A nonlinear network of several answers, all different, as shares of its channels."""

    def net(x, t, cond=None):
        shift = 0.0 if cond is None else cond.reshape(-1, 1, 1, 1)
        return torch.cat(
            [torch.sin((1.0 + 0.3 * k) * x + t.reshape(-1, 1, 1, 1) + shift + k) for k in range(points)], 1
        )

    return net


def literal(schedule, kind, times, points, substeps, segment=None):
    """The paper's loop: a velocity from the interpolated estimate in every substep, Euler in sigma/alpha of x/alpha
    (in sigma on flow, where alpha = 1 - sigma, the same step)."""
    x, net = schedule.sigma(times[0]) * NOISE, policy(points)
    denoiser = Denoiser(torch.nn.Identity(), schedule, kind)
    for t, s in itertools.pairwise(times):
        told = torch.full((3,), float(denoiser.prediction.network_time(schedule, t)), dtype=torch.float64)
        of_x, of_output = denoiser.prediction.coefficients(schedule, t)
        estimates = [of_x * x + of_output * one for one in net(x, told).split(2, 1)]
        end = s if segment is None else max(t - segment, 0.0)
        count = max(1, round((t - s) * substeps))
        for now in (t + (s - t) * i / count for i in range(count)):
            then = now + (s - t) / count
            place = min(max((now - end) / (t - end), 0.0), 1.0) * (points - 1)
            below = min(int(place), points - 2)
            clean = (below + 1 - place) * estimates[below] + (place - below) * estimates[below + 1]
            sigma, sigma_to = schedule.sigma(now), schedule.sigma(then)
            alpha, alpha_to = schedule.alpha(now), schedule.alpha(then)
            noise = (x - alpha * clean) / sigma
            x = alpha_to * clean + sigma_to * noise
    return x


@pytest.mark.parametrize(
    ("schedule", "kind"), [(FLOW, "flow"), (schedules.get("vp"), "v"), (schedules.get("cosine"), "eps")]
)
@pytest.mark.parametrize("options", [{"points": 2}, {"points": 10}, {"points": 5, "substeps": 40, "segment": 0.4}])
def test_the_row_is_the_rollout(schedule, kind, options):
    times = [0.99, 0.7, 0.45, 0.2, 0.01]
    plan = solvers.plan("piflow", schedule, 4, grid=times, prediction=kind, **options)
    assert plan.evaluations == 4 and Plan.from_json(plan.to_json()) == plan
    whole = schedule.t_max
    expected = literal(
        schedule, kind, times, options["points"], options.get("substeps", 128) / whole, options.get("segment")
    )
    torch.testing.assert_close(solvers.sample(policy(options["points"]), plan, NOISE), expected, rtol=1e-12, atol=1e-12)


def test_the_row_is_diffusers_scheduler():
    """PiflowScheduler of diffusers in float32, whose grid ends at t = 1e-6."""
    from diffusers import PiflowScheduler

    theirs = PiflowScheduler(shift=3.2, n_grid=10)
    theirs.set_timesteps(4)
    raw = [*(1.0 - i / 3.5 for i in range(4)), 1e-6]
    plan = solvers.plan("piflow", FLOW, 4, grid=raw, prediction="flow", points=10)
    x, net = NOISE.float().movedim(1, -1), policy(10)
    for step, t in enumerate(theirs.timesteps):
        told = (t / 1000.0).expand(3)
        assert float(told[0]) == pytest.approx(plan.stages[step].network_time, rel=1e-6)
        x = theirs.step(net(x.movedim(-1, 1), told).movedim(1, -1), t, x).prev_sample
    found = solvers.sample(net, plan, NOISE.float())
    # the loop rounds in float32 128 times; it was exact to 1e-12 in float64 above
    torch.testing.assert_close(x.movedim(-1, 1), found, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["flow", "vp", "edm", "sd", "trigflow"])
def test_one_answer_is_ddim(name):
    schedule = schedules.get(name)
    grid = {"name": "karras", "start": schedule.t_max - 0.01 * (schedule.t_max - schedule.t_clean)}
    one, ddim = (solvers.plan(solver, schedule, 5, grid=grid, prediction="v") for solver in ("piflow", "ddim"))
    for ours, theirs in zip(one.stages, ddim.stages):
        assert ours.row("x") == pytest.approx(theirs.row("x"), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("points", [2, 7])
def test_point_masses_are_reached_exactly(points):
    point = torch.tensor([[0.4, -1.1]], dtype=torch.float64)
    for schedule, last in ((FLOW, 0.3), (FLOW, 0.0), (schedules.get("edm"), 0.5)):
        grid = {"name": "uniform", "end": last} if last else {"name": "uniform"}
        plan = solvers.plan("piflow", schedule, 3, grid=grid, prediction="x0", points=points)
        found = solvers.sample(lambda x, t: (point.expand_as(x),) * points, plan, NOISE[:, 0].flatten(1)[:, :2])
        start = schedule.sigma(schedule.t_max) * NOISE[:, 0].flatten(1)[:, :2]
        noise = (start - schedule.alpha(schedule.t_max) * point) / schedule.sigma(schedule.t_max)
        expected = schedule.alpha(last) * point + schedule.sigma(last) * noise
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_more_substeps_converge_to_the_policys_path_at_order_one():
    """x/sigma changes by D(t) d(-1/sigma) sigma on flow's path dx/dsigma = (x - D)/sigma; D is linear between knots,
    where Gauss's rule of 40 points is exact to rounding.
    """
    t, s, points = 0.9, 0.3, 4
    nodes, parts = numpy.polynomial.legendre.leggauss(40)
    knots = numpy.linspace(s, t, points)
    exact = numpy.zeros(points)  # weights of the estimates
    for k, (low, high) in enumerate(itertools.pairwise(knots)):
        for node, part in zip(nodes, parts):
            at = 0.5 * (low + high + (high - low) * node)
            slope = FLOW.derivatives(at)[1] * 0.5 * (high - low) * part / FLOW.sigma(at) ** 2 * FLOW.sigma(s)
            share = (at - low) / (high - low)
            exact[k] += (1.0 - share) * slope
            exact[k + 1] += share * slope
    errors = []
    for substeps in (100, 200, 400):
        plan = solvers.plan("piflow", FLOW, 1, grid=[t, s], prediction="x0", points=points, substeps=substeps)
        row = plan.stages[0].row("x")
        assert row["x"] == pytest.approx(FLOW.sigma(s) / FLOW.sigma(t), rel=1e-12)
        found = [row["cond"], *(row[f"point {k}"] for k in range(1, points))]
        errors.append(float(abs(numpy.array(found) - exact).max()))
    assert [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)] == pytest.approx(
        [1.0, 1.0], abs=0.05
    )


@pytest.mark.parametrize("kind", ["v", "x0", "edm"])
def test_a_policy_that_follows_the_teachers_path_jumps_as_far_as_the_path_goes(kind):
    """The answers of a perfect policy are the teacher's own along its path; ten of them a step leave little error."""
    schedule = schedules.get("vp")
    times = [schedule.time_of_half_log_snr(value) for value in (-2.0, -0.5, 1.0)]
    teacher = GAUSSIAN.teacher(schedule, "x0")
    start = schedule.sigma(times[0]) * NOISE.flatten(1)[:, :2]
    exact = GAUSSIAN.flow_map(start, schedule, times[0], times[-1])
    denoiser = Denoiser(torch.nn.Identity(), schedule, kind)

    def errors(points):
        def net(scaled, told):
            t = float(denoiser.prediction.time_of_network_time(schedule, told)[0])
            s = next(time for time in times if time < t - 1e-6)
            x = scaled / denoiser.prediction.input_scale(schedule, t)
            of_x, of_output = denoiser.prediction.coefficients(schedule, t)
            places = [s + (t - s) * k / (points - 1) for k in range(points)] if points > 1 else [t]
            clean = [teacher(GAUSSIAN.flow_map(x, schedule, t, at), at) for at in places]
            return [(one - of_x * x) / of_output for one in clean]

        plan = solvers.plan("piflow", schedule, 2, grid=times, prediction=kind, points=points, substeps=2000)
        return float((solvers.sample(net, plan, NOISE.flatten(1)[:, :2]) - exact).abs().max())

    one, three, ten = (errors(points) for points in (1, 3, 10))
    assert ten < 0.2 * three < 0.2 * 0.5 * one


def test_guidance_is_folded_into_every_answer():
    plan = solvers.plan("piflow", FLOW, 2, grid=HALF_LAST, prediction="flow", points=3, guidance=2.5)
    cond = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    net = policy(3)

    def guided(x, t):
        return net(x, t, 0 * cond) + 2.5 * (net(x, t, cond) - net(x, t, 0 * cond))

    plain = solvers.plan("piflow", FLOW, 2, grid=HALF_LAST, prediction="flow", points=3)
    found = solvers.sample(net, plan, NOISE, cond, uncond=0 * cond)
    torch.testing.assert_close(found, solvers.sample(guided, plain, NOISE), rtol=1e-12, atol=1e-12)


def test_the_diffusers_scheduler_runs_it():
    from fewstep.solvers.diffusers import PlanScheduler

    scheduler = PlanScheduler(
        prediction_type="flow_prediction", shift=3.2, solver="piflow", grid=HALF_LAST, options={"points": 10}
    )
    scheduler.set_timesteps(4)
    x, net = NOISE, policy(10)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, (t / 1000.0).double().expand(3)), t, x).prev_sample
    plan = solvers.plan("piflow", FLOW, 4, grid=HALF_LAST, prediction="flow", points=10)
    # the scheduler's times are float32
    torch.testing.assert_close(x, solvers.sample(net, plan, NOISE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"points": 0}, "points=0; give a whole number of at least 1"),
        ({"substeps": 0}, "substeps=0; give a whole number of at least 1"),
        ({"segment": 0.0}, "segment=0.0; give a span of time above 0"),
        ({"points": 3, "clip": 1.0}, "clip and threshold bound one clean-sample estimate"),
        ({"points": 3, "analytic_first_step": True}, "cannot be analytic"),
        ({"points": 3, "prediction": "eps"}, "says nothing about the picture where alpha is zero"),
    ],
)
def test_a_mistake_is_one_sentence(options, words):
    with pytest.raises(UserError, match=words):
        solvers.plan("piflow", FLOW, 4, **{"prediction": "flow", **options})
