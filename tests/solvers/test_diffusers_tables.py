"""diffusers' schedulers that read a table of alphas, jump between indices or follow schedules of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction
from tests.solvers.diffusers_runs import (
    NAMES,
    START,
    STEPS,
    apart,
    compare,
    diffusers,
    ours,
    planned,
    tabled,
    theirs,
)

SPACINGS = ("leading", "trailing", "linspace")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim(kind, to_one, spacing, monkeypatch):
    """Its target is a stride away, and not the next time: the grid's own only where the two are one."""
    for number, steps in enumerate(STEPS):
        scheduler = tabled(
            "DDIMScheduler",
            prediction_type=NAMES[kind],
            clip_sample=False,
            set_alpha_to_one=to_one,
            timestep_spacing=spacing,
            steps_offset=1,
        )
        scheduler.set_timesteps(steps)
        end = -1.0 if to_one else 0.0
        times = [float(t) for t in scheduler.timesteps]
        inner = times[:-1] if times[-1] == end else times  # from there it goes nowhere
        if not inner:
            continue
        grid: Any = {"name": spacing, **({} if to_one else {"end": 0.0})}
        stride = {}
        if 1000 % steps or spacing == "linspace":
            grid, stride = [*inner, end], {"stride": 1000 // steps}
        for eta in (0.0, (0.5, 1.0)[number % 2]):
            plan = planned("ddim", len(inner), grid, kind, eta=eta, **stride)
            compare(plan, scheduler, monkeypatch, eta=eta, evaluations=len(inner))


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 12)])
def test_ddims_stride_matters(spacing, steps, monkeypatch):
    scheduler = tabled("DDIMScheduler", clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    plain, _ = ours(planned("ddim", steps, [*(float(t) for t in scheduler.timesteps), -1.0], "eps"))
    assert apart(plain, theirs(scheduler, START, monkeypatch)[0]) > 1e-3


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm(spacing, variance, kind, monkeypatch):
    """Its last step draws noise wherever its time is above 0: an option here, and no small noise at sigma = 0."""
    for steps in STEPS:
        scheduler = tabled(
            "DDPMScheduler",
            prediction_type=NAMES[kind],
            clip_sample=False,
            variance_type=variance,
            timestep_spacing=spacing,
        )
        scheduler.set_timesteps(steps)
        trailing = spacing == "trailing"
        grid = [*(float(t) for t in scheduler.timesteps), -1.0]
        plan = planned("ddpm", steps, grid, kind, variance=variance, final_noise=trailing)
        compare(plan, scheduler, monkeypatch, tolerance=1e-5 if trailing else 1e-9)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_pndm(spacing, kind, skip, monkeypatch):
    """It mixes v as it comes. Runge-Kutta needs four steps of the grid; the target is a stride away, as DDIM's."""
    for steps in (*STEPS, 7):
        if steps < 4 and not skip:
            continue
        to_one = spacing == "linspace"  # whose last index is 0, from where index 0 is nowhere
        made = {"skip_prk_steps": skip, "steps_offset": 1, "set_alpha_to_one": to_one, "timestep_spacing": spacing}
        scheduler = tabled("PNDMScheduler", **made, prediction_type=NAMES[kind])
        scheduler.set_timesteps(steps)
        grid: Any = {"name": spacing, "end": 0.0}
        options: dict[str, Any] = {"mixed": "output"} if kind == "v" else {}
        if 1000 % steps or spacing == "linspace":
            grid = [*(float(t) for t in scheduler._timesteps[::-1]), -1.0 if to_one else 0.0]
            options["stride"] = 1000 // steps
        plan = planned("plms" if skip else "pndm", steps, grid, kind, **options)
        compare(plan, scheduler, monkeypatch)


def test_ipndm(monkeypatch):
    """Its schedule is TrigFlow's angle and its network a velocity; from alpha = 0 it would lose the first answer."""
    schedule = schedules.get("trigflow", sigma_data=1.0)
    for steps in STEPS:
        levels = [0.999 * (1 - i / steps) for i in range(steps)] + [0.0]
        scheduler = diffusers.IPNDMScheduler(trained_betas=levels)
        scheduler.set_timesteps(steps)
        grid = [float(torch.tensor(level, dtype=torch.float64).asin()) for level in scheduler.betas]
        plan = planned("ipndm", steps, grid, "v", schedule)
        expected, _ = theirs(scheduler, START, monkeypatch)
        assert apart(ours(plan)[0], expected) < 1e-5  # its alpha = sqrt(1 - beta^2) is float32


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_lcm(kind, monkeypatch):
    for steps in STEPS:
        scheduler = tabled("LCMScheduler", prediction_type=NAMES[kind])
        scheduler.set_timesteps(steps)
        compare(planned("lcm", steps, None, kind, timestep_scaling=10.0), scheduler, monkeypatch, tolerance=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_tcd(kind, eta, monkeypatch):
    for steps in STEPS:
        scheduler = tabled("TCDScheduler", prediction_type=NAMES[kind])
        scheduler.set_timesteps(steps)
        plan = planned("tcd", steps, {"name": "lcm", "end": 0.0}, kind, eta=eta)
        compare(plan, scheduler, monkeypatch, tolerance=1e-7, eta=eta)


def test_consistency_models(monkeypatch):
    schedule, kind = schedules.get("edm"), Prediction("edm", boundary=0.002)
    for steps in STEPS[:-1]:  # of its 40 levels
        scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
        scheduler.set_timesteps(steps)
        levels = [min(float(sigma), 80.0) for sigma in scheduler.sigmas[:steps]]
        plan = planned("consistency", steps, [*levels, 0.0], kind, schedule)
        expected, _ = theirs(scheduler, START, monkeypatch)
        assert apart(ours(plan)[0], expected) < 1e-5


def test_trigflow_consistency(monkeypatch):
    schedule = schedules.get("trigflow")
    for steps in STEPS:
        scheduler = diffusers.SCMScheduler(sigma_data=0.5)
        middle = {} if steps == 2 else {"intermediate_timesteps": None}
        scheduler.set_timesteps(steps, max_timesteps=1.56, **middle)
        grid = [float(t) for t in scheduler.timesteps]
        plan = planned("consistency", steps, grid, "edm", schedule)
        # it expects the paper's F, of the other sign, times sigma_data, and scales no input
        scheduler.scale_model_input = lambda x, t: x / 0.5
        expected, _ = theirs(scheduler, START, monkeypatch, convert=lambda out, x: -0.5 * out, evaluations=steps)
        assert apart(ours(plan)[0], expected) < 1e-5
