"""What holds for every solver that is registered, whatever the schedule, the prediction type and the grid."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import KINDS
from fewstep.solvers import Plan

MIXTURE = Mixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.2]], [0.35, 0.25])
EVERY = [(name, {}) for name in solvers.names(alone=True)]
EVERY += [
    ("ddim", {"eta": 0.6}),
    ("dpm2", {"eta": 1.0}),
    ("dpm_solver", {"order": 3}),
    ("dpm_solver", {"order": 3, "inner": "fast"}),
    ("dpmpp_2m_sde", {"eta": 0.5}),
    ("dpmpp_3s", {"variant": "taylor"}),
    ("dpmpp_sde", {"ratio": 0.7, "shared_noise": False}),
    ("deis", {"coordinate": "rho"}),
    ("deis", {"coordinate": "log_rho"}),
    ("euler", {"churn": 3.0}),
    ("euler_a", {"coordinate": "flow"}),
    ("exponential", {"order": 4, "form": "eps"}),
    ("heun", {"coordinate": "flow"}),
    ("heun", {"churn": 3.0, "churn_low": 0.05}),
    ("restart", {"intervals": [[3, 2, 0.3, 2.0]]}),
    ("rho_rk", {"order": 2, "place": 0.5}),
    ("rho_rk", {"order": 3}),
    ("sa", {"predictor": 2, "corrector": 3, "strength": 0.5}),
    ("trigflow", {"order": 2}),
    ("unipc", {"order": 3, "variant": "bh1"}),
    ("ddim", {"eta": 0.3, "analytic_first_step": True}),
    ("dpmpp_2m", {"analytic_first_step": True}),
]


def carried(plan: Plan, batch: int = 3) -> torch.Tensor:
    """[batch, 1 + S, 2] standard normal numbers."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 1 + plan.stochastic_stages, 2, dtype=torch.float64, generator=generator)


def falling(schedule: schedules.Schedule, steps: int, seed: int = 1) -> list[float]:
    """Random uneven times between lambda = -2.5 and 3, and the clean end."""
    draw = torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort().values
    return [*(float(schedule.time_of_half_log_snr(-2.5 + 5.5 * float(u))) for u in draw), schedule.t_clean]


@dataclasses.dataclass(frozen=True)
class Rescaled(schedules.Schedule):
    """Another schedule times c(t), c = 1 at t = 0: the same paths of x/c, at the same sigma/alpha."""

    name = "rescaled"
    base: schedules.Schedule = dataclasses.field(kw_only=True)

    def scale(self, t: Any) -> Any:
        return math.exp(0.8 * math.sin(2.5 * float(t) / self.t_max))

    def alpha(self, t: Any) -> Any:
        return self.scale(t) * self.base.alpha(t)

    def sigma(self, t: Any) -> Any:
        return self.scale(t) * self.base.sigma(t)

    def half_log_snr(self, t: Any) -> Any:
        return self.base.half_log_snr(t)

    def ratio(self, t: Any) -> Any:
        return self.base.ratio(t)

    def derivatives(self, t: Any) -> Any:
        slope = 2.0 / self.t_max * math.cos(2.5 * float(t) / self.t_max)  # of log c
        return tuple(
            self.scale(t) * (d + slope * value)
            for d, value in zip(self.base.derivatives(t), (self.base.alpha(t), self.base.sigma(t)))
        )

    def time_of_half_log_snr(self, half_log_snr: Any) -> Any:
        return self.base.time_of_half_log_snr(half_log_snr)


class Denoising(torch.nn.Module):
    """The mixture's network of kind x0 on a schedule, told its time."""

    def __init__(self, schedule: schedules.Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x, t, cond=None):
        time = float(t[0])
        return MIXTURE.denoise(x, self.schedule.alpha(time), self.schedule.sigma(time))


@pytest.mark.parametrize(("solver", "options"), EVERY)
@pytest.mark.parametrize("name", ["vp", "edm", "cosine"])
def test_a_rescaled_schedule_gives_the_rescaled_picture(name, solver, options):
    """Only sigma/alpha matters: x of (c alpha, c sigma) is c times x of (alpha, sigma)."""
    base = schedules.get(name)
    scaled = Rescaled(base.t_min, base.t_max, base=base)
    for end in (base.t_clean, base.time_of_half_log_snr(3.2)):
        grid = [*falling(base, 6)[:-1], end]
        plans = [solvers.plan(solver, on, 6, grid=grid, prediction="x0", **options) for on in (base, scaled)]
        found = [solvers.sample(Denoising(plan.schedule), plan, carried(plan)) for plan in plans]
        ends_at = plans[0].times[-1]
        torch.testing.assert_close(found[1], scaled.scale(ends_at) * found[0], rtol=1e-9, atol=1e-9)
        assert solver == "lcm" or abs(scaled.scale(grid[0]) - 1.0) > 0.1


@hypothesis.settings(max_examples=120, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=strategies.data())
def test_any_schedule_and_solver_give_one_picture_for_all_prediction_types(data):
    draw = data.draw
    schedule = schedules.get(draw(strategies.sampled_from(schedules.names())))
    solver, options = draw(strategies.sampled_from(EVERY))
    kinds = draw(strategies.permutations(KINDS))[:2]
    steps, seed = draw(strategies.integers(4, 9)), draw(strategies.integers(0, 99))
    guidance = draw(strategies.sampled_from([None, 1.7, 6.0]))
    times = falling(schedule, steps, seed)
    if draw(strategies.booleans()):
        times[-1] = float(schedule.time_of_half_log_snr(3.5))
    cond, found = torch.tensor([0, 1, 0]), []
    for kind in kinds:
        plan = solvers.plan(solver, schedule, steps, grid=times, prediction=kind, guidance=guidance, **options)
        found.append(solvers.sample(MIXTURE.teacher(schedule, kind), plan, carried(plan), cond))
    # conversions divide by alpha and sigma, as small as 0.03, in rounding of 2e-16; guidance of 6 and uneven
    # multistep weights multiply it
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9 * float(found[0].abs().max().clamp(min=1.0)))


@pytest.mark.parametrize(("solver", "options"), EVERY)
def test_guidance_of_one_is_no_guidance(solver, options):
    for name, steps in (("vp", 5), ("edm", 8)):
        one, none = (
            solvers.plan(solver, schedules.get(name), steps, prediction="edm", guidance=w, **options)
            for w in (1.0, None)
        )
        assert one.stages == none.stages
        assert not any(stage.guided for stage in one.stages)


@pytest.mark.parametrize(("solver", "options"), EVERY)
@pytest.mark.parametrize("name", schedules.names())
def test_a_plan_read_back_from_json_paints_the_same_bits(name, solver, options):
    schedule = schedules.get(name)
    plan = solvers.plan(
        solver, schedule, 5, grid=falling(schedule, 5), prediction="v", guidance=[2.5, None, 1.0, 0.1, 3.0], **options
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()
    teacher, cond = MIXTURE.teacher(schedule, "v"), torch.tensor([0, 1, 0])
    first, second = (solvers.sample(teacher, each, carried(plan), cond) for each in (plan, again))
    assert torch.equal(first, second)


FIRST_ORDER = [
    ("ddpm", {}),
    ("ddpm", {"final_noise": True}),
    ("ddpm", {"eta": 0.4}),
    ("euler_a", {}),
    ("euler_a", {"eta": 0.5}),
    ("euler_a", {"coordinate": "flow"}),
    ("dpmpp_2m_sde", {"order": 1}),
    ("dpmpp_2m_sde", {"order": 1, "eta": 0.3}),
    ("sa", {"predictor": 1, "corrector": 0}),
    ("sa", {"predictor": 1, "corrector": 0, "strength": 0.4}),
    ("consistency", {}),
    ("lcm", {}),
    ("scm", {}),
    ("tcd", {}),
    ("ctm", {}),
]


@pytest.mark.parametrize(("solver", "options"), FIRST_ORDER)
@pytest.mark.parametrize("name", schedules.names())
def test_stochastic_first_order_rows_keep_the_noise_level(name, solver, options):
    """(of x sigma)^2 + (of noise)^2 = sigma'^2 in every row (arXiv:2010.02502, lemma 1)."""
    schedule = schedules.get(name)
    plan = solvers.plan(solver, schedule, 7, grid=falling(schedule, 7), prediction="x0", **options)
    assert plan.stochastic_stages >= 6
    for stage in plan.stages:
        row = stage.row("x")
        level = (row.get("x", 0.0) * schedule.sigma(stage.time)) ** 2 + row.get("noise", 0.0) ** 2
        assert level == pytest.approx(schedule.sigma(stage.target) ** 2, rel=1e-12, abs=1e-18)


def test_fixed_large_variance_does_not_keep_the_noise_level():
    """By design (2006.11239, section 3.2): its noise is the forward kernel's and not the posterior's."""
    plan = solvers.plan("ddpm", schedules.get("vp"), 7, prediction="x0", variance="fixed_large")
    stage, schedule = plan.stages[5], plan.schedule
    row = stage.row("x")
    level = (row["x"] * schedule.sigma(stage.time)) ** 2 + row["noise"] ** 2
    assert level > 1.5 * schedule.sigma(stage.target) ** 2


MEAN, STD = torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35
SAMPLES, CONFIDENT = 6_000, 4.5  # a right sampler fails one comparison of these in 150 000
LAWS = [
    # solver, steps (so many that the law's own error is below one standard error of a variance, 1.8%), options
    ("ddim", 300, {"eta": 1.0}),
    ("ddim", 300, {"eta": 0.5}),
    ("ddpm", 300, {"final_noise": True}),
    ("ddpm", 300, {"variance": "fixed_large", "final_noise": True}),
    ("euler_a", 300, {}),
    ("euler", 300, {"churn": 5.0, "churn_low": 0.1, "churn_high": 15.0}),
    ("heun", 60, {"churn": 5.0, "churn_low": 0.1, "churn_high": 15.0}),
    ("restart", 60, {"intervals": [[15, 3, 0.3, 1.5]]}),
    ("dpm2", 60, {"eta": 1.0}),
    ("dpmpp_2s", 300, {"strength": 1.0}),
    ("dpmpp_2m_sde", 60, {}),
    ("dpmpp_2s_a", 60, {}),
    ("dpmpp_sde", 60, {}),
    ("dpmpp_3m_sde", 60, {}),
    ("sa", 60, {}),
    ("consistency", 4, {}),
    ("lcm", 4, {}),
    ("scm", 4, {}),
    ("ctm", 4, {"gamma": 1.0}),
    ("tcd", 4, {"eta": 1.0}),
]


def drawn(solver: str, steps: int, options: dict[str, Any]) -> tuple[torch.Tensor, float, float]:
    """Samples [SAMPLES, 2] of the plan on Gaussian data, started in the right law, and alpha and std of the truth."""
    schedule, data = schedules.get("vp"), Gaussian(MEAN, STD)
    first, last = (float(schedule.time_of_half_log_snr(value)) for value in (-2.6, 2.5))
    jumps = solver in ("consistency", "lcm", "scm", "ctm", "tcd")  # with the exact consistency function
    grid = {"name": "log_snr", "start": first, "end": last, "zero": "none"}
    if jumps:
        grid = {"name": "uniform", "start": first}
    plan = solvers.plan(solver, schedule, steps, grid=grid, prediction="x0", initial_scale=1.0, **options)
    generator = torch.Generator().manual_seed(11)
    start = schedule.alpha(first) * data.sample(SAMPLES, generator)
    start += schedule.sigma(first) * torch.randn(start.shape, generator=generator, dtype=torch.float64)
    network = (data.student if jumps else data.teacher)(schedule, "x0")
    found = solvers.sample(network, plan, start, seeds=torch.arange(SAMPLES))
    alpha, sigma = schedule.alpha(plan.times[-1]), schedule.sigma(plan.times[-1])
    return found, alpha, math.hypot(alpha * STD, sigma)


def off_by(found: torch.Tensor, alpha: float, std: float) -> list[float]:
    """Errors of both means, both variances and the covariance, in standard errors of SAMPLES draws."""
    offsets = (found - alpha * MEAN) / std
    covariance = offsets.T @ offsets / SAMPLES
    means = offsets.mean(0) * SAMPLES**0.5
    variances = (covariance.diagonal() - 1.0) * (SAMPLES / 2) ** 0.5
    return [abs(float(value)) for value in (*means, *variances, covariance[0, 1] * SAMPLES**0.5)]


@pytest.mark.parametrize(("solver", "steps", "options"), LAWS)
def test_drawn_samples_have_the_gaussians_mean_and_covariance(solver, steps, options):
    assert max(off_by(*drawn(solver, steps, options))) < CONFIDENT


def test_every_solver_that_draws_noise_is_among_them():
    drawing = {
        name
        for name in solvers.names(alone=True)
        if solvers.plan(name, schedules.get("vp"), 5, prediction="x0").stochastic_stages
    }
    assert drawing <= {name for name, _, _ in LAWS}


def test_too_much_noise_is_seen_in_the_samples():
    assert max(off_by(*drawn("dpmpp_2m_sde", 60, {"noise_scale": 1.07}))) > CONFIDENT
