"""diffusers' further schedulers: inversions, parallel samplers, and those made for one model."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction
from tests.solvers.diffusers_runs import (
    COND,
    DRAWN,
    GUIDANCE,
    NAMES,
    SD,
    START,
    Net,
    apart,
    compare,
    diffusers,
    ours,
    planned,
    tabled,
    theirs,
    times_of,
)

SHELF = Path(__file__).parent


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddims_inversion_rises_and_tells_the_level_it_goes_to(kind, spacing, monkeypatch):
    for steps in (2, 5, 10, 50):
        scheduler = tabled(
            "DDIMInverseScheduler",
            prediction_type=NAMES[kind],
            clip_sample=False,
            set_alpha_to_one=False,
            timestep_spacing=spacing,
            steps_offset=1,
        )
        scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]
        scheduler.set_timesteps(steps)
        levels = [0.0, *(float(t) for t in scheduler.timesteps)]
        compare(planned("ddim", steps, levels, kind, told="target"), scheduler, monkeypatch)


@pytest.mark.parametrize(("order", "solver", "options"), [
    (1, "dpmpp_2m", {"order": 1}),
    (2, "dpmpp_2m", {}),
    (3, "dpmpp_3m", {"curvature": "half_weight"}),
])  # fmt: skip
def test_multistep_inversion(order, solver, options, monkeypatch):
    for steps in (1, 2, 3, 10, 24):
        scheduler = diffusers.DPMSolverMultistepInverseScheduler(**SD, solver_order=order)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()
        levels = times_of(schedules.get("sd"), scheduler.sigmas)
        plan = planned(solver, steps, levels, "eps", lower_order_final=True, **options)
        assert apart(ours(plan)[0], theirs(scheduler, START, monkeypatch)[0]) < (5e-5 if order == 3 else 1e-5)


def test_the_parallel_schedulers_take_the_same_steps(monkeypatch):
    for steps in (1, 10):
        scheduler = tabled("DDIMParallelScheduler", clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        compare(planned("ddim", steps, "trailing", "eps", eta=0.5), scheduler, monkeypatch, eta=0.5)
        scheduler = tabled("DDPMParallelScheduler", clip_sample=False)
        scheduler.set_timesteps(steps)
        compare(planned("ddpm", steps, {"name": "leading", "offset": 0}, "eps"), scheduler, monkeypatch)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("scheduler", "solver"), [("FlowMatchLCMScheduler", "consistency"), ("FlowMapEulerDiscreteScheduler", "euler")]
)
def test_few_steps_of_flow_models(scheduler, solver, shift, monkeypatch):
    """A flow map's mean velocity moves x as a velocity would: the network alone is asked with both times."""
    schedule, name = schedules.get("flow"), scheduler
    for steps in (1, 2, 4, 8):
        scheduler = getattr(diffusers, name)(shift=shift)
        scheduler.set_timesteps(steps)
        levels = times_of(schedule, scheduler.sigmas)
        plan = solvers.plan(
            solver, schedule, steps, grid=levels, prediction="flow", guidance=GUIDANCE, initial_scale=1.0
        )
        assert apart(ours(plan)[0], theirs(scheduler, START, monkeypatch)[0]) < 1e-5


@pytest.mark.parametrize("order", [1, 2])
def test_stable_audios_sampler(order, monkeypatch):
    """Its v is EDM's F of the other sign, at sigma_data 1; its network is told 2 atan(sigma)/pi."""
    # it draws from torchsde's Brownian tree, for which this test gives its own noise
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    schedule, kind = schedules.get("edm", t_min=0.3, t_max=500.0), Prediction("edm", sigma_data=1.0)
    for steps in (1, 2, 5, 10, 24):
        scheduler = module.CosineDPMSolverMultistepScheduler(solver_order=order)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()
        drawn = iter(DRAWN.unbind(1))
        scheduler.noise_sampler = lambda *_, drawn=drawn: next(drawn)
        levels = [*(float(sigma) for sigma in scheduler.sigmas[:-1]), 0.0]
        plan = solvers.plan(
            "dpmpp_2m_sde",
            schedule,
            steps,
            grid=levels,
            prediction=kind,
            guidance=GUIDANCE,
            initial_scale=1.0,
            lower_order_final=True,
            **({"order": 1} if order == 1 else {}),
        )
        expected, _ = theirs(scheduler, START, monkeypatch, convert=lambda out, x: -out)
        assert apart(ours(plan)[0], expected) < 1e-5


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_cogvideos_sampler_is_sde_2m(kind, monkeypatch):
    from diffusers.schedulers import scheduling_dpm_cogvideox

    for steps in (1, 2, 5, 10):
        scheduler = tabled(
            "CogVideoXDPMScheduler",
            prediction_type=NAMES[kind],
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=False,
        )
        scheduler.set_timesteps(steps)
        net, x, old, before = Net(), START, None, None
        with monkeypatch.context() as patch:
            for number, t in enumerate(scheduler.timesteps):
                drawn = DRAWN[:, number]
                patch.setattr(scheduling_dpm_cogvideox, "randn_tensor", lambda *_, drawn=drawn, **__: drawn)
                x, old = scheduler.step(net.guided(x, t, COND), old, t, before, x)
                before = t
        plan = planned("dpmpp_2m_sde", steps, "trailing", kind)
        found, told = ours(plan)
        assert apart(found, x) < 1e-9 and told == net.times


def test_the_schedulers_here_are_those_there_are():
    """What diffusers 0.42.1 has beside those held to our plans, and why it has none."""
    beside = {
        "AmusedScheduler": "discrete tokens",
        "BlockRefinementScheduler": "discrete tokens",
        "CogVideoXDDIMScheduler": "DDIM on shifted betas",
        "DPMSolverSDEScheduler": "draws from a Brownian tree",
        "DDPMWuerstchenScheduler": "a schedule of its own",
        "DiscreteDDIMScheduler": "discrete tokens",
        "EntropyBoundScheduler": "discrete tokens",
        "HeliosDMDScheduler": "one model's pyramid",
        "HeliosScheduler": "one model's pyramid",
        "KarrasVeScheduler": "deprecated",
        "LTXEulerAncestralRFScheduler": "another ancestral step, of ComfyUI",
        "MiniMaxH3Scheduler": "one model's",
        "PiflowScheduler": "policies of 128 inner steps",
        "RePaintScheduler": "inpainting",
        "RFD4ProteinaScheduler": "proteins",
        "ScoreSdeVeScheduler": "a Langevin corrector",
        "ScoreSdeVpScheduler": "deprecated",
        "UnCLIPScheduler": "DDPM with a learned variance",
        "VQDiffusionScheduler": "discrete tokens",
    }
    named = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith(("Flax", "PlanS"))}
    held = set()
    for page in ("", "_matrix", "_tables", "_grids", "_others"):
        text = (SHELF / f"test_diffusers{page}.py").read_text(encoding="utf-8")
        held |= {
            name
            for name in named
            if f'"{name}"' in text.partition("def test_the_schedulers_here")[0] or f".{name}(" in text
        }
    assert named - held <= beside.keys()
