"""What every compiled row must satisfy, whatever the schedule, and known equalities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import Denoiser, schedules
from fewstep.diffusion.prediction import KINDS
from fewstep.errors import UserError

ALL = schedules.names()
DETERMINISTIC = [
    ("ddim", {}),
    ("euler", {}),
    ("heun", {}),
    ("heun", {"coordinate": "flow"}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m", {"variant": "exact"}),
]
# a solver registered later is held to the same statements, with its default options
OTHERS = [(name, {}) for name in solvers.names(alone=True) if name not in {listed for listed, _ in DETERMINISTIC}]
DETERMINISTIC += [
    (name, options)
    for name, options in OTHERS
    if not solvers.plan(name, schedules.get("edm"), 4, prediction="x0", **options).stochastic_stages
]
DETERMINISTIC += [
    ("dpmpp_3m", {"curvature": "half_weight", "lower_order_final": True}),
    ("exponential", {"order": 4}),
    ("exponential", {"form": "eps"}),
    ("dpm_solver", {"order": 3}),
    ("dpm_solver", {"order": 3, "inner": "grid"}),
    ("dpm_solver", {"order": 3, "inner": "fast"}),
    ("dpmpp_2s", {"variant": "taylor", "ratio": 0.3}),
    ("dpmpp_3s", {"variant": "taylor", "inner": "grid"}),
    ("dpmpp_3s", {"inner": "fast"}),
    ("unipc", {"order": 3, "lower_order_final": True}),
    ("unipc", {"order": 2, "variant": "bh1", "disable_corrector": [1]}),
    ("unipc", {"order": 3, "form": "eps"}),
    ("deis", {"order": 4, "coordinate": "rho"}),
    ("deis", {"coordinate": "log_rho", "lower_order_final": True}),
    ("ipndm", {"order": 2}),
    ("sa", {"strength": 0.0, "lower_order_final": True}),
    ("tcd", {"eta": 0.0}),
    ("ctm", {"gamma": 0.0}),
]
STOCHASTIC = [("ddim", {"eta": 0.7}), ("dpmpp_2s", {"strength": 0.8}), ("dpmpp_3m_sde", {"curvature": "wrong_sign"})]
STOCHASTIC += [
    ("euler", {"churn": 3.0, "churn_noise": 1.01}),
    ("heun", {"churn": 3.0, "churn_low": 0.05, "churn_high": 50.0}),
    ("restart", {"intervals": [[3, 2, 0.5, 50.0], [2, 1, 2.0, 60.0]]}),
    ("dpm2", {"eta": 1.0}),
    ("ddpm", {"variance": "fixed_large", "final_noise": True}),
    ("sa", {"predictor": 2, "corrector": 2, "strength": 0.5}),
]
STOCHASTIC += [other for other in OTHERS if other not in DETERMINISTIC]
MIXTURE = Mixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.2]], [0.35, 0.25])


def uneven(schedule: schedules.Schedule, steps: int = 9) -> list[float]:
    """A random falling grid."""
    draw = torch.rand(steps + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).sort().values
    low = schedule.t_min + 0.01 * (schedule.t_max - schedule.t_min)
    return [float(low + u * (0.97 * schedule.t_max - low)) for u in draw.flip(0)]


def noise(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Point(torch.nn.Module):
    """The network of kind x0 for data that are one point."""

    def __init__(self, point: float) -> None:
        super().__init__()
        self.point = point

    def forward(self, x, t, cond=None):
        return torch.full_like(x, self.point)


@pytest.mark.parametrize(("solver", "options"), DETERMINISTIC)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("clean", [False, True])
def test_a_point_mass_is_solved_exactly_on_any_grid(name, solver, options, clean):
    schedule, point = schedules.get(name), 0.8
    times = uneven(schedule)
    if clean:
        times[-1] = schedule.t_clean
    first, last = times[0], times[-1]
    scale = schedule.sigma(first)
    plan = solvers.plan(solver, schedule, 9, grid=times, prediction="x0", **options)
    # the start alpha x0 + sigma eps, as unit noise for a plan that multiplies by sigma
    start = (schedule.alpha(first) * point + scale * noise()) / scale
    found = solvers.sample(Point(point), plan, start)
    expected = schedule.alpha(last) * point + schedule.sigma(last) * noise()
    # the noise form divides by sigma and extrapolates with growing weights over uneven steps
    noise_form = options.get("form") == "eps" or solver in ("deis", "ipndm_v")
    tolerance = 1e-11 if noise_form else 1e-13
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("solver", "options"), [*DETERMINISTIC, *STOCHASTIC])
@pytest.mark.parametrize("name", ALL)
def test_the_signal_after_every_stage_is_the_targets_alpha(name, solver, options):
    """With D = 1 and no noise, x = alpha stays x = alpha, through whatever registers a stage reads."""
    schedule = schedules.get(name)
    plan = solvers.plan(solver, schedule, 9, grid=uneven(schedule), prediction="x0", **options)
    state = {"x": schedule.alpha(plan.stages[0].time), "cond": 1.0, "noise": 0.0}
    for stage in plan.stages:
        after = {name: sum(v * state[key] for key, v in stage.row(name).items()) for name in stage.outputs}
        state.update(after)
        assert state["x"] == pytest.approx(schedule.alpha(stage.target), abs=1e-13)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_first_order_rows_keep_the_noise_level(name, eta):
    schedule = schedules.get(name)
    plan = solvers.plan("ddim", schedule, 9, grid=uneven(schedule), prediction="x0", eta=eta)
    for stage in plan.stages:
        row = stage.row("x")
        level = (row["x"] * schedule.sigma(stage.time)) ** 2 + row.get("noise", 0.0) ** 2
        assert level == pytest.approx(schedule.sigma(stage.target) ** 2, rel=1e-12)


def test_ddim_with_full_noise_is_ddpms_posterior():
    schedule = schedules.get("sd")
    plan = solvers.plan("ddim", schedule, 4, prediction="x0", eta=1.0)
    t, s = plan.stages[0].time, plan.stages[0].target
    a, b = schedule.alpha(t) ** 2, schedule.alpha(s) ** 2
    row = plan.stages[0].row("x")
    # 2006.11239, eq. 7, between any two steps: beta = 1 - a/b
    assert row["x"] == pytest.approx(math.sqrt(a / b) * (1 - b) / (1 - a), rel=1e-12)
    assert row["cond"] == pytest.approx(math.sqrt(b) * (1 - a / b) / (1 - a), rel=1e-12)
    assert row["noise"] ** 2 == pytest.approx((1 - b) / (1 - a) * (1 - a / b), rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_ddim_is_euler_and_both_are_euler_in_edm_time(name):
    schedule = schedules.get(name)
    ddim, euler = (
        solvers.plan(solver, schedule, 9, grid=uneven(schedule), prediction="x0") for solver in ("ddim", "euler")
    )
    assert ddim.stages == euler.stages
    for stage in ddim.stages:
        # x/alpha moves by (tau' - tau) (x/alpha - D)/tau (2206.00364, algorithm 1 without the correction)
        tau, tau_to = schedule.ratio(stage.time), schedule.ratio(stage.target)
        alpha, alpha_to = schedule.alpha(stage.time), schedule.alpha(stage.target)
        row = stage.row("x")
        assert row["x"] == pytest.approx(alpha_to / alpha * (1 + (tau_to - tau) / tau), rel=1e-12)
        assert row["cond"] == pytest.approx(-alpha_to * (tau_to - tau) / tau, rel=1e-12)


def test_flow_euler_moves_by_the_network_times_the_step():
    plan = solvers.plan("euler", schedules.get("flow"), 4, prediction="flow")
    for stage in plan.stages:
        row = stage.row("x")
        assert row["x"] == pytest.approx(1.0) and row["cond"] == pytest.approx(stage.target - stage.time)


@pytest.mark.parametrize("name", ALL)
def test_one_step_of_2m_is_ddim(name):
    schedule = schedules.get(name)
    multistep, ddim = (solvers.plan(solver, schedule, 1, prediction="v") for solver in ("dpmpp_2m", "ddim"))
    assert multistep.stages == ddim.stages


def test_heun_is_edms_algorithm_on_edms_schedule():
    schedule, teacher = schedules.get("edm"), MIXTURE.teacher(schedules.get("edm"), "edm")
    plan = solvers.plan("heun", schedule, 5, prediction="edm")
    times, x = [*plan.times[:9:2], 0.0], 80.0 * noise()
    for t, s in itertools.pairwise(times):
        d = (x - teacher(x, t)) / t
        ahead = x + (s - t) * d
        x = ahead if s == 0 else x + (s - t) * 0.5 * (d + (ahead - teacher(ahead, s)) / s)
    assert plan.evaluations == 9
    # 80 standard deviations at the start are rounded at 1e-14
    torch.testing.assert_close(solvers.sample(teacher, plan, noise()), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["vp", "cosine", "edm", "flow"])
@pytest.mark.parametrize(("solver", "options"), [*DETERMINISTIC, ("ddim", {"eta": 1.0}), *STOCHASTIC])
def test_the_picture_does_not_depend_on_the_prediction_type(name, solver, options):
    schedule = schedules.get(name)
    seeds, cond = torch.arange(3), torch.tensor([0, 1, 0])
    found = []
    for kind in KINDS:
        grid = {"name": "log_snr", "start": schedule.time_of_half_log_snr(-3.0)}
        plan = solvers.plan(solver, schedule, 6, grid=grid, prediction=kind, guidance=1.7, **options)
        found.append(solvers.sample(MIXTURE.teacher(schedule, kind), plan, noise(), cond, seeds=seeds))
    for other in found[1:]:
        # conversions divide by alpha or sigma, each as small as 0.002, in rounding of 2e-16
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_a_row_of_tensors_is_the_plans_row(name):
    schedule = schedules.get(name)
    times = uneven(schedule)
    for solver in ("ddim", "euler", "dpmpp_2m"):
        plan = solvers.plan(solver, schedule, 9, grid=times, prediction="x0")
        t, s = (torch.tensor(part, dtype=torch.float64) for part in (times[1:-1], times[2:]))
        history = [torch.tensor(times[:-2], dtype=torch.float64)] if solver == "dpmpp_2m" else []
        found = solvers.row(solver, schedule, t, s, history)
        planned = [[row.get(key, 0.0) for key in ("x", "cond", "d0")] for row in (s.row("x") for s in plan.stages[1:])]
        expected = torch.tensor(planned, dtype=torch.float64)[:, None, : found.shape[-1]]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_row_is_differentiable_in_its_times_and_fine_at_the_clean_end():
    schedule = schedules.get("vp")
    t = torch.tensor([0.9, 0.5], dtype=torch.float64, requires_grad=True)
    before, s = torch.tensor([0.95, 0.7]).double(), torch.tensor([0.4, 0.0]).double()
    row = solvers.row("dpmpp_2m", schedule, t, s, [before])
    gradient = torch.autograd.grad(row[:, 0, 1].sum(), t)[0]
    assert torch.isfinite(gradient).all()
    h = 1e-6
    ahead, behind = (solvers.row("dpmpp_2m", schedule, t.detach() + d, s, [before])[0, 0, 1] for d in (h, -h))
    assert float(gradient[0]) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-7)
    torch.testing.assert_close(row[1, 0], torch.tensor([0.0, 1.0, 0.0]).double())


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_a_step_with_one_time_per_sample_is_the_plans_step(name, solver):
    schedule = schedules.get(name)
    teacher = MIXTURE.teacher(schedule, "v")
    times = [(0.9, 0.4), (0.5, schedule.t_clean), (0.3, 0.1)]
    t, s = torch.tensor(times, dtype=torch.float64).T
    x = noise()
    found = solvers.step(solver, teacher, schedule, x, t, s)
    for index, pair in enumerate(times):
        plan = solvers.plan(solver, schedule, 1, grid=pair, prediction="v", initial_scale=1.0)
        expected = solvers.sample(teacher, plan, x[index : index + 1])
        torch.testing.assert_close(found[index : index + 1], expected, rtol=0, atol=1e-13)


def test_a_step_is_differentiable_in_state_and_network():
    schedule, weight = schedules.get("vp"), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x, t, s = noise().requires_grad_(), torch.full((3,), 0.8).double(), torch.full((3,), 0.3).double()
    assert torch.autograd.gradcheck(
        lambda x, weight: solvers.step("heun", lambda x, t: torch.tanh(weight * x), schedule, x, t, s), (x, weight)
    )


def test_an_exact_denoiser_gives_a_gaussians_ddim_composite():
    """One DDIM step from t to u turns (x - alpha m) by sqrt(q_u/q_t) cos(psi_t - psi_u), q = alpha^2 s^2 + sigma^2 and
    tan psi = sigma/(alpha s): arXiv:2010.02502, equation 12, with D = m + alpha s^2/q (x - alpha m).
    """
    schedule, data, s = schedules.get("vp"), Gaussian(0.7, 0.35), 0.35
    plan = solvers.plan("ddim", schedule, 5, grid=uneven(schedule, 5), prediction="eps")
    times, factor = plan.times, 1.0
    angle = [math.atan2(schedule.sigma(t), schedule.alpha(t) * s) for t in times]
    spread = [math.hypot(schedule.alpha(t) * s, schedule.sigma(t)) for t in times]
    for i in range(5):
        factor *= spread[i + 1] / spread[i] * math.cos(angle[i] - angle[i + 1])
    start = schedule.sigma(times[0]) * noise() - schedule.alpha(times[0]) * 0.7
    expected = schedule.alpha(times[-1]) * 0.7 + factor * start
    found = solvers.sample(data.teacher(schedule, "eps"), plan, noise())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "composite"),
    [("euler", 0.846086), ("heun", 1.055278)],
)
def test_the_steps_on_the_karras_grid_compose_to_the_known_share_of_the_exact_map(solver, composite):
    """18 nodes of arXiv:2206.00364, equation 5, data std s = 0.5: the product over the steps h from t to u of 1 + h k_t
    (Euler) or 1 + h/2 (k_t + k_u (1 + h k_t)) (Heun), k_t = t/(s^2 + t^2), over sqrt((s^2 + 0.002^2)/(s^2 + 80^2)).
    """
    schedule, data = schedules.get("edm"), Gaussian(0.0, 0.5)
    plan = solvers.plan(solver, schedule, 17, grid={"name": "karras", "zero": "none"}, prediction="edm")
    found = solvers.sample(data.teacher(schedule, "edm"), plan, torch.ones(1, 1, dtype=torch.float64))
    exact = data.flow_map(torch.full((1, 1), 80.0).double(), schedule, 80.0, 0.002)
    assert float(found / exact) == pytest.approx(composite, abs=1e-6)


def test_inversion_returns_to_where_it_came_from():
    schedule, teacher = schedules.get("vp"), MIXTURE.teacher(schedules.get("vp"), "eps")
    rising = [0.02 + 0.9 * (i / 200) for i in range(201)]
    x = MIXTURE.sample(3, torch.Generator().manual_seed(0))
    for solver in ("heun", "dpmpp_2m"):
        up = solvers.plan(solver, schedule, 200, grid=rising, prediction="eps")
        down = solvers.plan(solver, schedule, 200, grid=rising[::-1], prediction="eps", initial_scale=1.0)
        top = solvers.sample(teacher, up, x)
        torch.testing.assert_close(top, MIXTURE.flow_map(x, schedule, 0.02, 0.92), rtol=0, atol=4e-3)
        torch.testing.assert_close(solvers.sample(teacher, down, top), x, rtol=0, atol=4e-3)  # order 2


def test_unknown_rows_and_steps_are_refused():
    schedule, t = schedules.get("vp"), torch.ones(1)
    with pytest.raises(UserError, match="solver with a single row, 'heun' is not known"):
        solvers.row("heun", schedule, t, t / 2)
    with pytest.raises(UserError, match="'ddim' got 1 past times; it takes 0"):
        solvers.row("ddim", schedule, t, t / 2, [t])
    with pytest.raises(UserError, match="one-step solver 'dpmpp_2m' is not known"):
        solvers.step("dpmpp_2m", Denoiser(torch.nn.Identity(), schedule), schedule, noise(), t, t / 2)
