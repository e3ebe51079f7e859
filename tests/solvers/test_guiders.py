"""Forms of guidance, run by a plan, are diffusers' guiders in a pipeline's loop."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers==0.42.1")

from diffusers import guiders

VP = schedules.get("vp")
STEPS = 8
NOISE = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COND = torch.tensor([1.0, -0.6, 0.3], dtype=torch.float64)
LAYERS = {"skip_layer_guidance_layers": [0]}


def net(x, t, cond):
    return torch.sin(1.3 * x + cond[:, None, None, None]) + (0.4 * torch.cos(3.0 * t))[:, None, None, None] * x.flip(3)


def other(x, t, cond=None):
    """A weaker network: the same with a layer perturbed, say."""
    return 0.7 * net(x, t, COND) + 0.1 * x.flip(2)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Every guider warns that guiders are experimental."""
    monkeypatch.setattr(logging.getLogger("diffusers.guiders.guider_utils"), "disabled", True)


def theirs(guider, roles, times):
    """DDIM on the guider's answer, which asks for as many predictions as the step needs."""
    x = float(VP.sigma(times[0])) * NOISE
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        guider.set_state(step, STEPS, None)
        if getattr(guider, "adaptive_projected_guidance_momentum", None) is not None:
            guider.prepare_inputs({})  # makes its running difference
        told = torch.full((3,), float(VP.network_time(t)), dtype=torch.float64)
        every = {"cond": net(x, told, COND), "uncond": net(x, told, 0 * COND), "other": other(x, told)}
        # diffusers 0.42.1 takes mambo_g's norm over two dimensions or fails
        eps = guider.forward(*(every[role].flatten(2) for role in roles)).pred.view_as(x)
        clean = (x - VP.sigma(t) * eps) / VP.alpha(t)
        x = VP.alpha(s) * clean + VP.sigma(s) * eps
    return x


PLAIN, WEAK, THREE = ("cond", "uncond"), ("cond", "other"), ("cond", "uncond", "other")
APG = {"name": "apg", "scale": 4.0, "base": "uncond", "of": "output"}
SOME = {"name": "perturbed", "scale": 3.0, "perturbed_scale": 2.8}
# diffusers' windows of a third answer leave out their own first step: 0.1 to 0.6 of 8 steps is 1, 2, 3
WINDOW = [3.0, SOME, SOME, SOME, 3.0, 3.0, 3.0, 3.0]
CASES = {
    "cfg": (lambda: guiders.ClassifierFreeGuidance(3.0), PLAIN, 3.0),
    "its original formulation": (
        lambda: guiders.ClassifierFreeGuidance(2.0, use_original_formulation=True),
        PLAIN,
        3.0,
    ),
    "interval": (
        lambda: guiders.ClassifierFreeGuidance(3.0, start=0.25, stop=0.75),
        PLAIN,
        {"name": "interval", "scale": 3.0, "start": 2, "stop": 6},
    ),
    "rescale": (
        lambda: guiders.ClassifierFreeGuidance(5.0, guidance_rescale=0.7),
        PLAIN,
        {"name": "rescale", "scale": 5.0, "rescale": 0.7},
    ),
    "zero star": (
        lambda: guiders.ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=2),
        PLAIN,
        {"name": "cfg_zero_star", "scale": 4.0, "zero_steps": 2},
    ),
    "apg": (
        lambda: guiders.AdaptiveProjectedGuidance(4.0, None, 3.0, eta=0.2),
        PLAIN,
        {**APG, "radius": 3.0, "parallel": 0.2},
    ),
    "apg with momentum": (
        lambda: guiders.AdaptiveProjectedGuidance(4.0, -0.5, 3.0, eta=0.2),
        PLAIN,
        {**APG, "radius": 3.0, "parallel": 0.2, "momentum": -0.5},
    ),
    "apg as published": (
        lambda: guiders.AdaptiveProjectedGuidance(3.0, None, 3.0, eta=0.0, use_original_formulation=True),
        PLAIN,
        {**APG, "radius": 3.0, "base": "cond"},
    ),
    "apg after cfg": (
        lambda: guiders.AdaptiveProjectedMixGuidance(
            3.0, 0.0, 6.0, None, 2.0, eta=0.1, adaptive_projected_guidance_start_step=2
        ),
        PLAIN,
        [3.0] * 3 + [{**APG, "scale": 6.0, "radius": 2.0, "parallel": 0.1}] * 5,
    ),
    "mambo_g": (
        lambda: guiders.MagnitudeAwareGuidance(4.0, alpha=0.8),
        PLAIN,
        {"name": "mambo_g", "scale": 4.0, "decay": 0.8},
    ),
    "tcfg": (lambda: guiders.TangentialClassifierFreeGuidance(4.0), PLAIN, {"name": "tcfg", "scale": 4.0}),
    "autoguidance": (
        lambda: guiders.AutoGuidance(2.0, auto_guidance_layers=[0], dropout=1.0),
        WEAK,
        {"name": "autoguidance", "scale": 2.0},
    ),
    "perturbed attention": (
        lambda: guiders.PerturbedAttentionGuidance(3.0, 2.8, 0.1, 0.6, perturbed_guidance_layers=[0]),
        THREE,
        WINDOW,
    ),
    "skipped layers": (lambda: guiders.SkipLayerGuidance(3.0, 2.8, 0.1, 0.6, **LAYERS), THREE, WINDOW),
    "smoothed energy": (
        lambda: guiders.SmoothedEnergyGuidance(
            3.0, 2.8, seg_guidance_start=0.1, seg_guidance_stop=0.6, seg_guidance_layers=[0]
        ),
        THREE,
        WINDOW,
    ),
    "skipped layers alone": (
        lambda: guiders.SkipLayerGuidance(1.0, 2.8, 0.1, 0.6, **LAYERS),
        THREE,
        [None, *[{"name": "autoguidance", "scale": 2.8}] * 3, *[None] * 4],
    ),
    "ltx2": (lambda: guiders.LTX2Guidance(3.0, stg_scale=2.8), THREE, SOME),
}


@pytest.mark.parametrize("case", CASES)
def test_a_form_is_diffusers_guider(case):
    make, roles, guidance = CASES[case]
    plan = solvers.plan("ddim", VP, STEPS, prediction="eps", guidance=guidance)
    others = dict.fromkeys(plan.roles, other)
    found = solvers.sample(net, plan, NOISE, COND, uncond=0 * COND, others=others)
    expected = theirs(make(), roles, plan.times)
    plain = solvers.sample(net, solvers.plan("ddim", VP, STEPS, prediction="eps"), NOISE, COND)
    # float64, but for cfg_zero_star's scale and tcfg's svd, which diffusers takes in float32
    rtol = 1e-5 if case in ("zero star", "tcfg") else 1e-11
    assert (found - expected).abs().max() <= rtol * expected.abs().max() < 0.1 * (found - plain).abs().max()
