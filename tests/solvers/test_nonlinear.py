"""Bounds as diffusers has them, shaped noise, splitting, where a jump lands: what stands between network and map."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from fewstep.nets.read_out import Jump
from fewstep.solvers import Plan

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers==0.42.1")

SD = schedules.get("sd")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACED = {"timestep_spacing": "leading", "steps_offset": 1}
N = 10
NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def net(x, t, cond=None):
    return torch.sin(1.3 * x) + 0.4 * torch.cos(0.01 * t)[:, None, None, None] * x


def twice(x, t, cond=None):
    """C channels of prediction, C of variance in [-1, 1]."""
    return torch.cat([net(x, t), torch.sin(2.0 * x + 0.01 * t[:, None, None, None])], 1)


def theirs(scheduler, network, steps=N, **options):
    scheduler.set_timesteps(steps)
    x, draws = NOISE * scheduler.init_noise_sigma, []
    generator = torch.Generator().manual_seed(7)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        keep, module.randn_tensor = (
            module.randn_tensor,
            lambda shape, **_: draws.append(torch.randn(NOISE.shape, generator=generator)) or draws[-1],
        )
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, torch.full((3,), float(t))), t, x, **options).prev_sample
    finally:
        if hasattr(module, "randn_tensor"):
            module.randn_tensor = keep
    return x, draws


def close(found, expected, rtol=1e-5):
    assert (found - expected).abs().max() <= rtol * expected.abs().max()


BOUNDS = [
    ({"clip": 1.0}, {"clip_sample": True, "clip_sample_range": 1.0}),
    (
        {"threshold": {"quantile": 0.9, "most": 1.5}},
        {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    ),
]


@pytest.mark.parametrize("kind", [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("own_noise", [True, False])
@pytest.mark.parametrize(("ours", "options"), BOUNDS)
def test_ddim_with_bounds_is_diffusers(ours, options, own_noise, kind):
    scheduler = diffusers.DDIMScheduler(**BETAS, **SPACED, **options, prediction_type=kind[1], set_alpha_to_one=False)
    expected, _ = theirs(scheduler, net, use_clipped_model_output=not own_noise)
    grid = [float(t) for t in scheduler.timesteps] + [0.0]
    plan = solvers.plan(
        "ddim", SD, N, grid=grid, prediction=kind[0], initial_scale=1.0, unbounded_noise=own_noise, stride=100, **ours
    )
    assert Plan.from_json(plan.to_json()) == plan
    close(solvers.sample(net, plan, NOISE), expected)
    free = solvers.plan("ddim", SD, N, grid=grid, prediction=kind[0], initial_scale=1.0, stride=100)
    assert (solvers.sample(net, free, NOISE) - expected).abs().max() > 0.05


def test_dpmpp_2m_with_thresholding_is_diffusers():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        **SPACED,
        thresholding=True,
        dynamic_thresholding_ratio=0.9,
        sample_max_value=1.5,
        final_sigmas_type="zero",
        lower_order_final=False,
    )
    expected, _ = theirs(scheduler, net)
    grid = [float(t) for t in scheduler.timesteps] + [SD.t_clean]
    plan = solvers.plan("dpmpp_2m", SD, N, grid=grid, initial_scale=1.0, threshold={"quantile": 0.9, "most": 1.5})
    close(solvers.sample(net, plan, NOISE), expected)


@pytest.mark.parametrize("bounds", [({}, {"clip_sample": False}), BOUNDS[0]])
@pytest.mark.parametrize("variance", ["learned_range", "learned"])
def test_a_learned_variance_is_diffusers(variance, bounds):
    def answer(x, t, cond=None):
        both = twice(x, t)
        return both if variance == "learned_range" else torch.cat([both[:, :2], 0.01 * both[:, 2:].abs()], 1)

    scheduler = diffusers.DDPMScheduler(**BETAS, **SPACED, variance_type=variance, **bounds[1])
    _, draws = theirs(scheduler, answer)
    # diffusers adds noise where t > 0: leading with offset 1 ends at t = 1, its target is before index 0
    grid = [float(t) for t in scheduler.timesteps] + [SD.t_clean]
    plan = solvers.plan("ddpm", SD, N, grid=grid, initial_scale=1.0, variance=variance, final_noise=True, **bounds[0])
    assert Plan.from_json(plan.to_json()) == plan
    carried = torch.stack([NOISE, *draws[: plan.stochastic_stages]], 1)
    found = solvers.execute(plan, answer, carried, record=("x",))
    # diffusers' last step is noisy too: compare the state before it
    again, _ = before_last(scheduler, answer)
    close(found.recorded["x"][N - 1], again)


def before_last(scheduler, network):
    scheduler.set_timesteps(N)
    stamps = scheduler.timesteps
    generator, x = torch.Generator().manual_seed(7), NOISE
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    keep, module.randn_tensor = module.randn_tensor, lambda shape, **_: torch.randn(NOISE.shape, generator=generator)
    try:
        for t in stamps[:-1]:
            x = scheduler.step(network(x, torch.full((3,), float(t))), t, x).prev_sample
    finally:
        module.randn_tensor = keep
    return x, None


def test_seeds_and_carried_noise_agree_where_noise_is_shaped():
    from fewstep_kernels import normal

    plan = solvers.plan("ddpm", SD, 4, variance="learned_range")
    seeds = torch.arange(3)
    streams = [normal(seeds, (2, 4, 4), stream=k) for k in range(1 + plan.stochastic_stages)]
    torch.testing.assert_close(
        solvers.sample(twice, plan, streams[0], seeds=seeds), solvers.sample(twice, plan, torch.stack(streams, 1))
    )


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("variance", ["second_moment", "residual"])
def test_extended_analytic_noise_is_the_analytic_one_where_the_moment_is_a_number(variance, eta):
    """Gaussian data: E[(eps - eps_hat)^2 | x] = 1 - Gamma for every x."""
    data, vp = Gaussian(torch.zeros(2, dtype=torch.float64), 0.35), schedules.get("vp")
    grid = {"name": "log_snr", "zero": "none"}
    plan = solvers.plan("ddpm", vp, 5, grid=grid, prediction="eps", variance=variance, eta=eta, final_noise=True)
    gammas = [
        float(vp.sigma(t)) ** 2 / (float(vp.alpha(t)) ** 2 * 0.35**2 + float(vp.sigma(t)) ** 2) for t in plan.times[:-1]
    ]
    table = solvers.plan(
        "ddpm", vp, 5, grid=grid, prediction="eps", variance="analytic", eta=eta, final_noise=True, noise_moments=gammas
    )
    teacher = data.teacher(vp, "eps")

    def moment(x, t):
        gamma = torch.tensor(gammas, dtype=x.dtype)[
            (torch.tensor([float(vp.network_time(s)) for s in plan.times[:-1]])[None] - t[:, None]).abs().argmin(1)
        ][:, None].expand_as(x)
        eps = teacher(x, t, as_network=True)
        return (1 - gamma) + (eps * eps if variance == "second_moment" else 0.0)

    start = torch.randn(
        4, 1 + plan.stochastic_stages, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(
        solvers.sample(teacher, plan, start, others={"moment": moment}),
        solvers.sample(teacher, table, start),
        rtol=1e-7,
        atol=1e-7,
    )


def test_splitting_without_guidance_is_ipndm_and_with_it_of_order_one():
    vp, data = schedules.get("vp"), Gaussian(torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35)
    first, last = vp.time_of_half_log_snr(-3.0), vp.time_of_half_log_snr(2.5)
    for name in ("ltsp", "stsp"):
        one, other = (solvers.plan(s, vp, 6, prediction="v") for s in (name, "ipndm"))
        for a, b in zip(one.stages, other.stages, strict=True):
            for key, value in b.row("x").items():
                assert a.row("x").get(key, 0.0) == pytest.approx(value, rel=1e-12, abs=1e-12)

    target = Gaussian(torch.tensor([0.2, 0.4], dtype=torch.float64), 0.25)
    teacher = data.teacher(vp, "eps")

    def score(law, x, t):
        return law.teacher(vp, "eps").score(x, t)

    def gradient(x, t):  # the difference of two Gaussians' scores: guided by it, the model is the other Gaussian
        return score(target, x, float(t[0])) - score(data, x, float(t[0]))

    noise = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = target.flow_map(vp.sigma(first) * noise, vp, first, last)
    for solver, order in itertools.product(("ltsp", "stsp"), (1, 2, 4)):
        found = []
        for steps in (96, 192):
            ratios = [
                vp.ratio(first) ** 0.5 + (vp.ratio(last) ** 0.5 - vp.ratio(first) ** 0.5) * i / steps
                for i in range(steps + 1)
            ]
            grid = [float(vp.time_of_ratio(r * r)) for r in ratios]
            plan = solvers.plan(
                solver,
                vp,
                steps,
                grid=grid,
                prediction="eps",
                order=order,
                guidance={"name": "classifier", "scale": 1.0},
            )
            assert plan.evaluations == steps * (2 if solver == "ltsp" else 3)
            got = solvers.sample(teacher, plan, noise, others={"gradient": gradient})
            found.append(float((got - exact).abs().max()))
        assert math.log2(found[0] / found[1]) > 0.85


def test_a_two_time_student_is_told_where_it_lands():
    edm, kind = schedules.get("edm"), Prediction("edm")

    class Two(torch.nn.Module):
        def forward(self, x, t, cond=None, s=None):
            told.append(float(s[0]))
            return torch.tanh(x) + s[:, None] - t[:, None]

    told: list[float] = []
    jump = Jump(Two(), edm, kind)
    grid = [80.0, 5.0, 0.5, 0.002]
    plan = solvers.plan("ctm", edm, 3, grid=grid, prediction=kind, gamma=0.0, two_times=True)
    assert Plan.from_json(plan.to_json()) == plan
    start = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = 80.0 * start
    for t, s in itertools.pairwise(grid):
        x = jump(x, torch.full((4,), t, dtype=x.dtype), torch.full((4,), s, dtype=x.dtype))
    expected, told[:] = list(told), []
    torch.testing.assert_close(solvers.sample(jump, plan, start), x, rtol=1e-12, atol=1e-12)
    assert told == pytest.approx(expected)
    noisy = solvers.plan("ctm", edm, 3, grid=grid, prediction=kind, gamma=0.6, two_times=True)
    assert noisy.stages[0].landing == pytest.approx(math.log(0.8 * 5.0) / 4)
    with pytest.raises(UserError, match="two_times=True"):
        solvers.sample(jump, solvers.plan("ctm", edm, 3, grid=grid, prediction=kind, gamma=0.0), start)


class Sampler(torch.nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.plan, self.mix = plan, torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, noise, cond):
        def call(x, t, c):
            return torch.tanh(self.mix(x) + c[:, None, None, None] + 0.01 * t[:, None, None, None])

        return solvers.sample(call, self.plan, noise, cond, uncond=torch.zeros_like(cond))


def test_a_plan_with_parts_is_one_graph_of_any_batch(tmp_path):
    """Guidance by inner products and a quantile, exported; test_export_onnx.py has what is linear."""
    torch.manual_seed(0)
    plan = solvers.plan(
        "ddim",
        schedules.get("vp"),
        2,
        prediction="v",
        guidance={"name": "apg", "scale": 3.0, "radius": 2.0},
        threshold={"quantile": 0.9, "most": 2.0},
    )
    sampler = Sampler(plan).eval()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    given = (NOISE, torch.arange(3.0))
    program = torch.onnx.export(
        sampler, given, dynamo=True, dynamic_shapes=(batch, batch), input_names=["noise", "cond"]
    )
    assert not [node for node in program.exported_program.graph.nodes if "fewstep" in str(node.target)]
    path = tmp_path / "graph.onnx"
    program.save(path)
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    for b in (1, 5):
        start, cond = torch.randn(b, 2, 4, 4, generator=torch.Generator().manual_seed(b)), torch.arange(float(b))
        (found,) = session.run(None, {"noise": start.numpy(), "cond": cond.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), sampler(start, cond), rtol=1e-4, atol=1e-4)
