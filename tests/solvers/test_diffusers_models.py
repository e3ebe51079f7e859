"""diffusers' schedulers made for one model or one network are our plans too: their schedules, grids and quirks."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from tests.solvers.diffusers_runs import (
    COND,
    DRAWN,
    GUIDANCE,
    NAMES,
    START,
    Net,
    apart,
    cogvideos_final_state,
    compare,
    diffusers,
    drawing_brownian,
    ours,
    planned,
    tabled,
    theirs,
    times_of,
)

STEPS = (1, 2, 3, 5, 10, 20, 50)
FLOW = schedules.get("flow")
# x/sqrt(1 + sigma^2) on the angle atan(sigma) = t pi/2, from sigma 500 to 0.3: Stable Audio Open, 2407.14358
STABLE_AUDIO = schedules.get(
    "cosine", offset=0.0, t_min=2 / math.pi * math.atan(0.3), t_max=2 / math.pi * math.atan(500)
)


def flow_plan(solver: str, levels, **options) -> solvers.Plan:
    return planned(solver, len(levels) - 1, levels, "flow", FLOW, **options)


@pytest.mark.parametrize("kind", ["v", "edm"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize(("grid", "slope", "order"), [
    ("exponential", "midpoint", 2),
    ("exponential", "exact", 2),
    ("karras", "midpoint", 2),
    ("karras", "midpoint", 1),
])  # fmt: skip
def test_stable_audios_sampler_is_sde_2m_on_the_cosine_schedule(grid, slope, order, end, kind, monkeypatch):
    """At sigma_data 1 its v is the schedule's own, the network told 2 atan(sigma)/pi as here; its "epsilon" is EDM's F.

    It draws from a Brownian tree, for which both sides take the noise of this test.
    """
    schedule = STABLE_AUDIO
    for steps in STEPS:
        scheduler = drawing_brownian("cosine_dpmsolver_multistep", "CosineDPMSolverMultistepScheduler")(
            sigma_schedule=grid,
            solver_order=order,
            solver_type="heun" if slope == "exact" else slope,
            prediction_type="v_prediction" if kind == "v" else "epsilon",
            final_sigmas_type=end,
        )
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()
        drawn = iter(DRAWN.unbind(1))
        scheduler.noise_sampler = lambda *_, drawn=drawn: next(drawn)
        zero = "append" if end == "zero" else "none"
        count = steps if end == "zero" else steps - 1  # its last level stands there twice
        if count == 0:
            continue
        laid = {"name": grid, "zero": zero}
        plan = planned(
            "dpmpp_2m_sde",
            count,
            # one exponential step of theirs starts at the lowest level
            [schedule.t_min, 0.0] if steps == 1 and grid == "exponential" else laid,
            Prediction(kind, sigma_data=1.0),
            schedule,
            slope=slope,
            lower_order_final=True if end == "zero" else 2,
            **({"order": 1} if order == 1 else {}),
        )
        first, last = schedule.alpha(plan.times[0]), schedule.alpha(plan.times[-1])
        expected, told = theirs(scheduler, START / first, monkeypatch, evaluations=count)
        found, ours_told = ours(plan)
        assert apart(found, last * expected) < 1e-5, steps
        if kind == "v":
            assert ours_told == pytest.approx(told, abs=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_cogvideos_samplers_are_ddim_and_sde_2m(kind, spacing, monkeypatch):
    made = {
        "prediction_type": NAMES[kind],
        "snr_shift_scale": 1.0,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": False,
    }
    for steps in STEPS:
        scheduler = tabled("CogVideoXDDIMScheduler", **made, clip_sample=False)
        scheduler.set_timesteps(steps)
        grid, stride = {"name": spacing, "offset": 0} if spacing == "leading" else spacing, {}
        if 1000 % steps or spacing == "linspace":  # its target is t - 1000 // N, as DDIM's
            grid, stride = [*(float(t) for t in scheduler.timesteps), -1.0], {"stride": 1000 // steps}
        compare(planned("ddim", steps, grid, kind, **stride), scheduler, monkeypatch)
        scheduler = tabled("CogVideoXDPMScheduler", **made)
        scheduler.set_timesteps(steps)
        expected, told = cogvideos_final_state(scheduler, monkeypatch)
        found, ours_told = ours(planned("dpmpp_2m_sde", steps, grid, kind, **stride))
        assert apart(found, expected) < 1e-9 and ours_told == told


def test_cogvideos_shifted_snr_is_the_schedules(monkeypatch):
    schedule = schedules.get("sd", snr_shift=3.0)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=3.0, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )
    for steps in (2, 10):
        scheduler.set_timesteps(steps)
        plan = planned("ddim", steps, "trailing", "v", schedule)
        compare(plan, scheduler, monkeypatch)


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_eulers_log_linear_levels_are_log_snr_down_to_sigma_min(steps, monkeypatch):
    """Its network is told the times of even indices and not those of its levels: no option here."""
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", interpolation_type="log_linear"
    )
    scheduler.set_timesteps(steps)
    schedule = schedules.get("sd")
    plan = planned("euler", steps, {"name": "log_snr", "zero": "none"}, "eps")
    expected, _ = theirs(scheduler, START / schedule.alpha(999.0), monkeypatch)
    assert apart(ours(plan)[0], expected * schedule.alpha(0.0)) < 1e-5


@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
def test_ltx_videos_ancestral_step_goes_down_in_the_flows_own_coordinate(eta, monkeypatch):
    for steps in STEPS:
        scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=eta)
        levels = [1.0 - (i / steps) ** 1.3 for i in range(steps)] + [0.0]
        scheduler.set_timesteps(sigmas=levels)
        scheduler.timesteps = scheduler.timesteps[:-1]
        scheduler.sigmas = scheduler.sigmas.double()
        plan = flow_plan("euler_a", levels, eta=eta, coordinate="flow")
        expected, _ = theirs(scheduler, START, monkeypatch)
        assert apart(ours(plan)[0], expected) < 1e-5, steps
        if eta and steps == 10:
            assert apart(ours(flow_plan("euler_a", levels, eta=eta))[0], expected) > 1e-2


def test_minimaxs_sampler_is_euler_on_a_shifted_flow_of_the_other_sign(monkeypatch):
    schedule = schedules.get("flow", shift=12.0)
    for steps in STEPS:
        scheduler = diffusers.MiniMaxH3Scheduler(shift=12.0)
        scheduler.set_timesteps(steps + 1)  # it counts levels and not evaluations
        plan = solvers.plan("euler", schedule, steps, prediction="flow", guidance=GUIDANCE, initial_scale=1.0)
        expected, told = theirs(scheduler, START, monkeypatch, convert=lambda out, x: -out)
        found, ours_told = ours(plan)
        assert apart(found, expected) < 1e-5, steps
        assert [1.0 - t for t in ours_told] == pytest.approx(told, abs=1e-6)  # it tells how clean x is


def test_wuerstchens_ddpm_is_that_of_the_cosine_schedule_between_two_levels(monkeypatch):
    """alpha^2 is held between 1e-4 and 0.9999: it starts and ends there, and the network is told 1 at the start."""
    schedule = schedules.get("cosine", t_max=1.0)
    high, low = (float(schedule.time_of_ratio(math.sqrt((1 - bar) / bar))) for bar in (1e-4, 0.9999))
    for steps in STEPS:
        scheduler = diffusers.DDPMWuerstchenScheduler()
        scheduler.s = scheduler.s.double()
        scheduler._init_alpha_cumprod = torch.cos(scheduler.s / (1 + scheduler.s) * torch.pi * 0.5) ** 2
        times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
        scheduler.set_timesteps(timesteps=times)
        net, x = Net(), START
        with monkeypatch.context() as patch:
            module = "diffusers.schedulers.scheduling_ddpm_wuerstchen.randn_tensor"
            for number, t in enumerate(times[:-1]):
                patch.setattr(module, lambda *_, number=number, **__: DRAWN[:, number])
                x = scheduler.step(net.guided(x, t, COND), t.expand(len(x)), x).prev_sample
        plan = planned("ddpm", steps, [high, *(float(t) for t in times[1:-1]), low], "eps", schedule)
        found, told = ours(plan)
        assert apart(found, x) < 1e-9, steps
        assert told[1:] == net.times[1:] and net.times[0] == 1.0 and told[0] == high


@pytest.mark.parametrize(("made", "solver", "options"), [
    ({"scheduler_type": "unipc", "solver_order": 2}, "unipc", {"order": 2, "lower_order_final": True}),
    ({"scheduler_type": "unipc", "solver_order": 3}, "unipc", {"order": 3, "lower_order_final": True}),
    ({"scheduler_type": "euler"}, "euler", {}),
])  # fmt: skip
def test_helios_takes_unipc_or_euler_within_a_stage(made, solver, options, monkeypatch):
    """Between its stages the pipeline enlarges the video and adds noise."""
    for steps in STEPS:
        scheduler = diffusers.HeliosScheduler(stages=1, **made)
        scheduler.set_timesteps(steps, sigmas=numpy.linspace(0.999, 1 / steps if steps > 1 else 0.999, steps))
        scheduler.sigmas = scheduler.sigmas.double()
        given = {**options, "order": min(options["order"], steps)} if "order" in options else {}
        plan = flow_plan(solver, times_of(FLOW, scheduler.sigmas), **{**options, **given})
        expected, _ = theirs(scheduler, START, monkeypatch)
        assert apart(ours(plan)[0], expected) < 5e-5, steps


def test_helios_students_are_sampled_by_consistency():
    for steps in STEPS:
        scheduler = diffusers.HeliosDMDScheduler(stages=1)
        scheduler.set_timesteps(steps)
        levels = scheduler.sigmas.double()
        net, x = Net(), START
        for number, t in enumerate(scheduler.timesteps):
            x = scheduler.step(
                net.guided(x, t, COND)[:, :, None, None, None],
                t,
                x[:, :, None, None, None],
                cur_sampling_step=number,
                dmd_noisy_tensor=DRAWN[:, number, :, None, None, None],
                dmd_sigmas=levels,
                dmd_timesteps=scheduler.timesteps,
                all_timesteps=scheduler.timesteps,
            ).prev_sample[:, :, 0, 0, 0]
        plan = flow_plan("consistency", times_of(FLOW, levels))
        assert apart(ours(plan)[0], x.double()) < 1e-9, steps


def test_the_consistency_decoder_is_sampled_by_consistency(monkeypatch):
    from diffusers.schedulers import ConsistencyDecoderScheduler

    scheduler = ConsistencyDecoderScheduler()
    scheduler.set_timesteps(2)
    for name in ("c_skip", "c_out", "c_in", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
        setattr(scheduler, name, getattr(scheduler, name).double())
    schedule = schedules.get("cosine", t_max=1.0)
    ratios = scheduler.sqrt_one_minus_alphas_cumprod / scheduler.sqrt_alphas_cumprod
    levels = [float(schedule.time_of_ratio(float(ratios[t]))) for t in scheduler.timesteps]
    plan = planned("consistency", 2, [*levels, 0.0], "edm", schedule)
    expected, _ = theirs(scheduler, START, monkeypatch)
    assert apart(ours(plan)[0], expected) < 1e-5


@pytest.mark.parametrize("laid", ["karras", "exponential"])
def test_edms_and_stable_audios_configs_become_plan_schedulers(laid, monkeypatch):
    """`from_config` takes over their levels and what their networks predict; a wrong reading is refused."""
    from fewstep.solvers.diffusers import PlanScheduler

    made = drawing_brownian("cosine_dpmsolver_multistep", "CosineDPMSolverMultistepScheduler")
    audio = made(sigma_schedule=laid)
    edm = diffusers.EDMEulerScheduler(sigma_schedule=laid)
    for its, solver, options in ((audio, "dpmpp_2m_sde", {"lower_order_final": True}), (edm, "euler", {})):
        scheduler = PlanScheduler.from_config(its.config, solver=solver, options=options)
        for one in (its, scheduler):
            one.set_timesteps(6)
        drawn = iter(DRAWN.unbind(1))
        its.noise_sampler = lambda *_, drawn=drawn: next(drawn)
        first = scheduler.schedule.alpha(scheduler.plan.times[0])  # their states are x/alpha
        expected, told = theirs(its, START / first, monkeypatch)
        found, told_here = theirs(scheduler, START, monkeypatch)
        assert told_here == pytest.approx(told, abs=1e-6)
        assert apart(found, expected) < 1e-5
    with pytest.raises(UserError, match="'epsilon' and 0"):
        PlanScheduler.from_config(diffusers.EDMEulerScheduler(prediction_type="v_prediction").config)
