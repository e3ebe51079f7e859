"""diffusers' further schedulers: inversions, parallel samplers, and those made for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from tests.solvers.diffusers_runs import (
    COND,
    DRAWN,
    NAMES,
    SD,
    START,
    STEPS,
    Net,
    apart,
    compare,
    diffusers,
    drawing_brownian,
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
    for steps in STEPS:
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
        stride = {"stride": 1000 // steps} if 1000 % steps else {}
        compare(planned("ddim", steps, levels, kind, told="target", **stride), scheduler, monkeypatch)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("grid", ["linspace", "leading", "trailing", "karras", "exponential", "beta", "flow"])
def test_multistep_inversion(grid, kind, monkeypatch):
    """On flow's levels it falls, as the sampler itself; laid in sigma its last level stands there twice."""
    if (grid == "flow") != (kind == "flow"):
        return
    schedule = schedules.get("flow" if grid == "flow" else "sd")
    laid = {"timestep_spacing": grid} if grid in ("linspace", "leading", "trailing") else {f"use_{grid}_sigmas": True}
    for number, steps in enumerate(STEPS):
        order = 1 + number % 3 if steps < 15 else 2  # from 15 steps the third order's last is not a number
        made = {**SD, **laid, "solver_order": order, "prediction_type": NAMES[kind]}
        scheduler = diffusers.DPMSolverMultistepInverseScheduler(**made)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()
        if grid != "flow":
            scheduler.sigmas.clamp_(schedule.ratio(0.0), schedule.ratio(999.0))
        levels = times_of(schedule, scheduler.sigmas)
        if len(levels) == 1:
            continue
        nowhere = len(levels) == steps
        solver = "dpmpp_3m" if order == 3 else "dpmpp_2m"
        options: dict[str, Any] = {"curvature": "half_weight"} if order == 3 else {"order": 1} if order == 1 else {}
        plan = planned(
            solver, len(levels) - 1, levels, kind, schedule, lower_order_final=2 if nowhere else True, **options
        )
        scheduler._step_index = 0  # of two equal times, which 20 exponential ones begin with, it starts at the second
        expected, _ = theirs(scheduler, START, monkeypatch)
        assert apart(ours(plan)[0], expected) < (5e-5 if order == 3 else 1e-5), steps


def test_the_parallel_schedulers_take_the_same_steps(monkeypatch):
    for steps in STEPS:
        for spacing in ("leading", "trailing"):
            kind = ("eps", "x0", "v")[steps % 3]
            made = {"prediction_type": NAMES[kind], "clip_sample": False, "timestep_spacing": spacing}
            grid = {"name": "leading", "offset": 0} if spacing == "leading" else spacing
            scheduler = tabled("DDIMParallelScheduler", **made)
            scheduler.set_timesteps(steps)
            stride = 1000 // steps
            compare(planned("ddim", steps, grid, kind, eta=0.5, stride=stride), scheduler, monkeypatch, eta=0.5)
            scheduler = tabled("DDPMParallelScheduler", **made)
            scheduler.set_timesteps(steps)
            final = spacing == "trailing"
            compare(planned("ddpm", steps, grid, kind, final_noise=final), scheduler, monkeypatch, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("grid", ["linspace", "leading", "trailing", "karras", "exponential", "beta"])
def test_kdiffusions_dpmpp_sde(grid, kind, monkeypatch):
    """Two draws of one Brownian path a step, as our rows have them; the first goes to the even middle in lambda."""
    schedule = schedules.get("sd")
    for steps in STEPS:
        laid = {"timestep_spacing": grid} if grid[0] in "lt" else {f"use_{grid}_sigmas": True}
        made = {**SD, **laid, "prediction_type": NAMES[kind]}
        scheduler = drawing_brownian("dpmsolver_sde", "DPMSolverSDEScheduler")(**made)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double().clamp(max=schedule.ratio(schedule.last_time))
        levels = times_of(schedule, scheduler.sigmas)
        draws, path = iter(DRAWN.unbind(1)), {}

        def drawn(high, low, draws=draws, path=path):
            if path and path["high"] == high:
                share = (high - path["low"]) / (high - low)
                return share.sqrt() * path["noise"] + (1 - share).sqrt() * next(draws)
            path.update(high=high, low=low, noise=next(draws))
            return path["noise"]

        scheduler.noise_sampler = drawn
        expected, _ = theirs(scheduler, START / schedule.alpha(levels[0]), monkeypatch)
        assert apart(ours(planned("dpmpp_sde", steps, levels, kind))[0], expected) < 1e-9, steps


def test_karras_and_others_own_stochastic_heun(monkeypatch):
    """Its levels are the squares of those between its sigma_max and sigma_min; its churn comes before the network."""
    from diffusers.schedulers.deprecated import KarrasVeScheduler

    schedule = schedules.get("edm", t_max=1e4, t_min=4e-4)
    for steps in STEPS[1:]:
        scheduler = KarrasVeScheduler()
        scheduler.set_timesteps(steps)
        scheduler.schedule = scheduler.schedule.double()
        levels = [float(scheduler.schedule[t]) for t in scheduler.timesteps] + [0.0]
        net, x, draws = Net(), START, []
        module = "diffusers.schedulers.deprecated.scheduling_karras_ve.randn_tensor"
        for number, t in enumerate(scheduler.timesteps):
            sigma, lower = torch.tensor(levels[number : number + 2], dtype=torch.float64)
            with monkeypatch.context() as patch:
                patch.setattr(module, lambda *_, number=number, **__: DRAWN[:, number])
                hat, raised = scheduler.add_noise_to_input(x, sigma)
            draws += [DRAWN[:, number]] * bool(raised > sigma)
            step = scheduler.step(-net.guided(hat, t, COND), raised, lower, hat)
            x = step.prev_sample
            if lower > 0:
                again = -net.guided(x, t, COND)
                x = scheduler.step_correct(again, raised, lower, hat, x, step.derivative).prev_sample
        plan = planned(
            "heun", steps, levels, "eps", schedule, churn=80.0, churn_low=0.05, churn_high=50.0, churn_noise=1.007
        )
        assert plan.stochastic_stages == len(draws)
        assert apart(solvers.sample(Net(), plan, torch.stack([START, *draws], 1), COND), x) < 1e-9, steps


def test_the_predictor_of_score_sde_is_ddpm_with_the_forward_noise(monkeypatch):
    """Down to sigma = 0 and noise on the last step too. (Its corrector: fewstep.solvers.langevin, by sample.)"""
    schedule = schedules.get("edm", t_max=1348.0, t_min=0.01)
    for steps in STEPS[1:]:
        scheduler = diffusers.ScoreSdeVeScheduler()
        scheduler.set_timesteps(steps)
        scheduler.set_sigmas(steps)
        levels = [*scheduler.discrete_sigmas.double().flip(0).tolist(), 0.0]
        scheduler.discrete_sigmas = scheduler.discrete_sigmas.double()
        net, x = Net(), START
        module = "diffusers.schedulers.scheduling_sde_ve.randn_tensor"
        for number, t in enumerate(scheduler.timesteps):
            with monkeypatch.context() as patch:
                patch.setattr(module, lambda *_, number=number, **__: DRAWN[:, number])
                score = -net.guided(x, t, COND) / levels[number]
                x = scheduler.step_pred(score, t, x).prev_sample
        plan = planned("ddpm", steps, levels, "eps", schedule, variance="fixed_large", final_noise=True)
        assert apart(ours(plan)[0], x) < 1e-9, steps


@pytest.mark.parametrize("kind", ["eps", "x0"])
def test_unclips_sampler_is_ddpm(kind, monkeypatch):
    for steps in STEPS[1:]:
        scheduler = tabled_unclip(NAMES[kind])
        scheduler.set_timesteps(steps)
        times = [*scheduler.timesteps.tolist(), -1]
        net, x = Net(), START
        for number, t in enumerate(scheduler.timesteps):
            with monkeypatch.context() as patch:
                module = "diffusers.schedulers.scheduling_unclip.randn_tensor"
                patch.setattr(module, lambda *_, number=number, **__: DRAWN[:, number])
                x = scheduler.step(net.guided(x, t, COND), t, x, prev_timestep=times[number + 1]).prev_sample
        found, told = ours(planned("ddpm", steps, [float(t) for t in times], kind))
        assert apart(found, x) < 1e-9 and told == net.times, steps


def tabled_unclip(kind: str):
    """UnCLIPScheduler on Stable Diffusion's table, in float64: its own is not one of ours."""
    scheduler = diffusers.UnCLIPScheduler(prediction_type=kind, clip_sample=False)
    scheduler.alphas_cumprod = tabled("DDPMScheduler").alphas_cumprod
    ones = torch.ones(1, dtype=torch.float64)
    scheduler.alphas = scheduler.alphas_cumprod / torch.cat([ones, scheduler.alphas_cumprod[:-1]])
    scheduler.betas = 1.0 - scheduler.alphas
    return scheduler


def test_the_schedulers_here_are_those_there_are():
    """What diffusers 0.42.1 has beside those held to our plans, and why it has none."""
    beside = {
        "AmusedScheduler": "discrete tokens",
        "BlockRefinementScheduler": "discrete tokens",
        "DiscreteDDIMScheduler": "discrete tokens",
        "EntropyBoundScheduler": "discrete tokens",
        "RePaintScheduler": "mixes a known picture in, by the caller's mask",
        "RFD4ProteinaScheduler": "another law on purpose: it multiplies the score, between times of its own",
        "ScoreSdeVpScheduler": "deprecated; Euler-Maruyama in t, which does not keep the schedule's levels",
        "VQDiffusionScheduler": "discrete tokens",
    }
    named = {name for module in (diffusers, diffusers.schedulers) for name in dir(module)}
    named = {name for name in named if name.endswith("Scheduler") and not name.startswith(("Flax", "PlanS"))}
    held = set()
    for page in (*SHELF.glob("test_diffusers*.py"), SHELF / "test_piflow.py"):
        text = page.read_text(encoding="utf-8").partition("def test_the_schedulers_here")[0]
        held |= {name for name in named if f'"{name}"' in text or f"{name}(" in text}
    assert not held & beside.keys() and held | beside.keys() == named
