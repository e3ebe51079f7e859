"""Stochastic solvers give the data's law at their weak order, propagated exactly: on a Gaussian they are all affine.

No Monte Carlo: a plan is run on unit vectors of its 1 + S independent normals. The mean is right whatever the order,
since every row keeps alpha times a constant clean sample (test_rows.py), so the spread is what is measured.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian
from fewstep.diffusion import schedules
from fewstep.errors import UserError
from fewstep.solvers.ancestral import noise_moments

STD = 0.35
DATA = Gaussian(torch.zeros(1, dtype=torch.float64), STD)
FIRST, LAST = -2.6, 2.5  # lambda, inside every schedule
STEPS = (64, 128, 256)


def spread(schedule: schedules.Schedule, t: float) -> float:
    return math.hypot(schedule.alpha(t) * STD, schedule.sigma(t))


def ends(schedule: schedules.Schedule) -> tuple[float, float]:
    return schedule.time_of_half_log_snr(FIRST), schedule.time_of_half_log_snr(LAST)


def std(plan: solvers.Plan, networks) -> float:
    """The standard deviation of the output, exactly."""
    draws = 1 + plan.stochastic_stages
    answers = solvers.execute(plan, networks, torch.eye(draws, dtype=torch.float64)[:, :, None]).x
    return float(answers.square().sum().sqrt())


def error(solver: str, steps: int, grid: str = "log_snr", **options) -> float:
    schedule = schedules.get("vp")
    first, last = ends(schedule)
    laid = {"name": grid, "start": first, "end": last, "zero": "none"}
    plan = solvers.plan(
        solver, schedule, steps, grid=laid, prediction="x0", initial_scale=spread(schedule, first), **options
    )
    return abs(std(plan, DATA.teacher(schedule, "x0")) - spread(schedule, last))


CASES = [
    # solver, weak order by theory, options
    ("ddim", 1, {"eta": 0.5}),
    ("ddpm", 1, {"final_noise": True}),
    ("ddpm", 1, {"variance": "fixed_large", "final_noise": True}),
    ("euler_a", 1, {}),
    ("euler_a", 1, {"coordinate": "flow"}),
    ("euler", 1, {"churn": 5.0, "churn_low": 0.1, "churn_high": 15.0}),
    ("heun", 2, {"churn": 5.0, "churn_low": 0.1, "churn_high": 15.0}),
    ("dpm2", 2, {"eta": 1.0}),  # the way down is of order 2, and noise on top of an exact law keeps it
    ("dpmpp_2m_sde", 2, {}),
    ("dpmpp_2m_sde", 2, {"slope": "exact"}),
    ("dpmpp_2m_sde", 2, {"eta": 0.3}),
    ("dpmpp_2m_sde", 1, {"order": 1}),
    ("dpmpp_2m_sde", 2, {"form": "eps"}),
    ("dpmpp_2s", 1, {"strength": 1.0}),  # as published: the noise of the inner stage is not part of the step's
    ("dpmpp_3s", 1, {"strength": 1.0}),
    ("dpmpp_3s", 1, {"strength": 1.0, "variant": "taylor"}),
    ("dpmpp_3s", 0, {"strength": 1.0, "variant": "taylor", "curvature": "wrong_sign"}),  # diffusers': to another law
    ("dpmpp_2s_a", 2, {}),
    ("dpmpp_sde", 2, {}),
    ("dpmpp_sde", 2, {"eta": 0.5}),
    ("dpmpp_sde", 2, {"ratio": 0.7}),
    ("dpmpp_sde", 1, {"shared_noise": False}),
    ("dpmpp_3m_sde", 2, {}),
    ("dpmpp_3m_sde", 2, {"curvature": "half_weight"}),
    ("dpmpp_3m_sde", 1, {"curvature": "wrong_sign"}),  # as diffusers 0.42.1 has it
    ("sa", 2, {"predictor": 2, "corrector": 2}),
    ("sa", 2, {}),
    ("sa", 2, {"predictor": 2, "corrector": 0, "strength": 0.5}),
    ("restart", 2, {"intervals": [[0, 3, 0.3, 1.5]]}),
]


@functools.cache
def measured(number: int) -> tuple[float, float]:
    """log2 of the error's fall from 64 to 128 steps and from 128 to 256, of CASES[number]."""
    solver, _, options = CASES[number]

    def at(steps: int) -> float:
        if solver == "restart":  # the repeated stretch is refined with the grid
            return error(solver, steps, intervals=[[steps // 4, 3, 0.3, 1.5]])
        return error(solver, steps, **options)

    first, second = (math.log2(a / b) for a, b in itertools.pairwise([at(steps) for steps in STEPS]))
    return first, second


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: " ".join(map(str, CASES[number])))
def test_the_weak_order_is_the_theorys(number):
    order, (early, late) = CASES[number][1], measured(number)
    assert early >= order - 0.35 and late >= order - 0.15
    assert late <= order + 0.25


def test_a_return_without_its_noise_is_seen():
    """The law test can fail: noise scaled by 1.02 moves the spread by more than the error of 256 steps."""
    assert error("dpmpp_2m_sde", 256, noise_scale=1.02) > 100 * error("dpmpp_2m_sde", 256)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["vp", "cosine", "sd"])
def test_the_analytic_variance_is_exact_in_law_at_any_number_of_steps(name, steps, eta):
    schedule = schedules.get(name)
    first, last = ends(schedule)
    grid = [first + (last - first) * i / steps for i in range(steps)] + [last]
    moments = [schedule.sigma(t) ** 2 / spread(schedule, t) ** 2 for t in grid[:-1]]  # E eps_hat^2 on Gaussian data
    plan = solvers.plan(
        "ddpm",
        schedule,
        steps,
        grid=grid,
        prediction="eps",
        initial_scale=spread(schedule, first),
        variance="analytic",
        noise_moments=moments,
        eta=eta,
        final_noise=True,
    )
    assert std(plan, DATA.teacher(schedule, "eps")) == pytest.approx(spread(schedule, last), rel=1e-12)


def test_noise_moments_are_estimated_from_samples():
    schedule, generator = schedules.get("vp"), torch.Generator().manual_seed(0)
    samples = DATA.sample(40_000, generator)
    times = [0.8, 0.3, 0.05]
    found = noise_moments(DATA.teacher(schedule, "v"), samples, times, generator)
    exact = [schedule.sigma(t) ** 2 / spread(schedule, t) ** 2 for t in times]
    # a mean of 40000 squares of a normal has relative standard error sqrt(2 / 40000) = 0.7%
    assert found == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_analytic_dpms_published_clips(eta):
    """As its code has them for pictures in [-1, 1]: Cov[x0|x_t] at most 1, and little noise in the step before last."""
    schedule, grid = schedules.get("sd"), [999.0, 800.0, 500.0, 100.0, 0.0, -1.0]
    options = {"variance": "analytic", "noise_moments": [0.9, 0.5, 0.7, 0.3, 0.2], "eta": eta}
    plain, clipped = (
        solvers.plan("ddpm", schedule, 5, grid=grid, **options, **clips)
        for clips in ({}, {"covariance_clip": 1.0, "pixel_clip": 2.0})
    )
    seen = []
    for one, other, moment in zip(plain.stages[:-1], clipped.stages, options["noise_moments"]):
        kept, noise = (schedule.alpha(t) ** 2 for t in (one.time, one.target)), one.row("x")["noise"]
        bar, bar_to = kept  # alpha-bar at t and s
        posterior = eta**2 * (1 - bar_to) / (1 - bar) * (1 - bar / bar_to)
        bracket = bar_to**0.5 - ((1 - bar_to - posterior) * bar / (1 - bar)) ** 0.5
        covariance = (1 - bar) / bar * (1 - moment)
        assert noise**2 == pytest.approx(posterior + bracket**2 * covariance, rel=1e-9)
        expected = posterior + bracket**2 * min(covariance, 1.0)
        if one.target == 0.0:
            expected = min(expected, (2 * 2 / 255) ** 2 * math.pi / 2)
        assert other.row("x")["noise"] ** 2 == pytest.approx(expected, rel=1e-9)
        seen.append(expected < 0.99 * noise**2)
    assert seen == [True, True, False, True] and not clipped.stages[-1].noise


@pytest.mark.parametrize(("given", "words"), [
    ({"covariance_clip": 1.0}, "variance 'analytic'"),
    ({"pixel_clip": -1.0}, "at least 0"),
    ({"pixel_clip": 2.0, "variance": "learned"}, "'fixed_small'"),
    ({"pixel_clip": 2.0, "pixel_clip_steps": -1}, "pixel_clip_steps=-1"),
])  # fmt: skip
def test_clips_that_have_nothing_to_clip_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        solvers.plan("ddpm", schedules.get("sd"), 4, **given)


def exact_jump(schedule: schedules.Schedule, t: float, low: float):
    """A network of kind x0 whose deterministic jump from t to `low` is the exact flow map."""
    keep = schedule.sigma(low) / schedule.sigma(t)
    gain = schedule.alpha(low) - schedule.alpha(t) * keep
    return lambda x, told: (DATA.flow_map(x, schedule, t, low) - keep * x) / gain


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["vp", "edm", "flow", "sd"])
def test_jump_samplers_are_exact_in_law_with_the_exact_flow_map(name, steps, share):
    schedule = schedules.get(name)
    first = schedule.time_of_half_log_snr(FIRST)
    for solver, option in (("tcd", "eta"), ("ctm", "gamma")):
        plan = solvers.plan(
            solver,
            schedule,
            steps,
            grid={"name": "uniform", "start": first},
            prediction="x0",
            initial_scale=spread(schedule, first),
            **{option: share},
        )
        networks = []
        for t, s in itertools.pairwise(plan.times):
            if solver == "tcd":
                low = (1.0 - share) * s if name != "sd" or share == 0.0 else float(math.floor((1.0 - share) * s))
            else:
                low = schedule.time_of_ratio(math.sqrt(1.0 - share**2) * schedule.ratio(s)) if share < 1.0 else None
                low = schedule.t_clean if low is None else low
            networks.append(exact_jump(schedule, t, s if s == plan.times[-1] or share == 0.0 else low))
        assert plan.stochastic_stages == (0 if share == 0.0 else steps - 1)
        assert std(plan, networks) == pytest.approx(STD, rel=1e-11)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_is_exact_in_law_with_the_exact_consistency_function(steps):
    schedule = schedules.get("sd")
    plan = solvers.plan("lcm", schedule, steps, prediction="eps", initial_scale=spread(schedule, 999.0))
    assert std(plan, DATA.student(schedule, "eps")) == pytest.approx(STD, rel=1e-12)
    assert plan.times == ((999, 759, 499, 259, -1) if steps == 4 else plan.times)
