"""diffusers' rescale_betas_zero_snr is `zero_snr` of the schedule: samplers start where alpha is zero."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Mixture
from fewstep.diffusion import schedules
from fewstep.errors import UserError
from tests.solvers.diffusers_runs import (
    COND,
    DRAWN,
    SD,
    SIZE,
    START,
    apart,
    cogvideos_final_state,
    compare,
    diffusers,
    ours,
    planned,
    theirs,
)

MIXTURE = Mixture([0.4, 0.6], [[-0.5] * SIZE, [0.4] * SIZE], [0.5, 0.35])
ZERO = schedules.get("sd", zero_snr=True)
STEPS = (1, 2, 5, 7, 50)
MADE = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}


def plan_of(solver: str, schedule: schedules.Schedule, grid, steps: int, **options) -> solvers.Plan:
    return planned(solver, steps, grid, "v", schedule, **options)


def trailing(scheduler, steps: int) -> tuple[list[float], dict[str, float]]:
    """The grid and, where N does not divide 1000, the target that diffusers jumps to."""
    stride = {"stride": 1000 // steps} if 1000 % steps else {}
    return [*(float(t) for t in scheduler.timesteps), -1.0], stride


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9])  # 1 is the square root of a rounding below zero there
def test_ddim(eta, monkeypatch):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    scheduler = diffusers.DDIMScheduler(**SD, **MADE, clip_sample=False)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scheduler.alphas_cumprod = torch.cumprod(1.0 - rescale_zero_terminal_snr(betas), 0)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    for steps in STEPS:
        scheduler.set_timesteps(steps)
        grid, stride = trailing(scheduler, steps)
        assert grid[0] == 999.0
        compare(plan_of("ddim", ZERO, grid, steps, eta=eta, **stride), scheduler, monkeypatch, eta=eta)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_cogvideos_samplers_shift_the_snr_before_they_rescale_it(shift, monkeypatch):
    schedule = schedules.get("sd", snr_shift=shift, zero_snr=True)
    made = {**MADE, "snr_shift_scale": shift}
    first, second = (
        diffusers.CogVideoXDDIMScheduler(**made, clip_sample=False),
        diffusers.CogVideoXDPMScheduler(**made),
    )
    found = schedule.alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    torch.testing.assert_close(found, first.alphas_cumprod, rtol=1e-9, atol=0.0)  # alpha loses 3 digits to the shift
    for steps in STEPS:
        for scheduler in (first, second):
            scheduler.set_timesteps(steps)
        grid, stride = trailing(first, steps)
        compare(plan_of("ddim", schedule, grid, steps, **stride), first, monkeypatch)
        expected, told = cogvideos_final_state(second, monkeypatch)
        found, ours_told = ours(plan_of("dpmpp_2m_sde", schedule, grid, steps, **stride))
        assert apart(found, expected) < 1e-9 and ours_told == told


@pytest.mark.parametrize(("name", "solver", "options", "exploding"), [
    ("EulerDiscreteScheduler", "euler", {}, True),
    ("EulerAncestralDiscreteScheduler", "euler_a", {}, True),
    ("DPMSolverMultistepScheduler", "dpmpp_2m", {"lower_order_final": True}, False),
    ("UniPCMultistepScheduler", "unipc", {"order": 2, "lower_order_final": True}, False),
])  # fmt: skip
def test_the_stand_in_for_zero_is_the_level_of_an_earlier_time(name, solver, options, exploding, monkeypatch):
    """These keep alpha at 2^-12 at index 999, which their network is told; the plan's is told the level's time."""
    first = float(ZERO.time_of_ratio(math.sqrt(2.0**24 - 1.0)))
    scheduler = getattr(diffusers, name)(**SD, **MADE)
    for steps in (2, 10):
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()
        grid = [first, *(float(t) for t in scheduler.timesteps[1:]), -1.0]
        start = START / ZERO.alpha(first) if exploding else START
        expected, told = theirs(scheduler, start, monkeypatch)
        found, ours_told = ours(plan_of(solver, ZERO, grid, steps, **options))
        assert apart(found, expected) < 1e-5, steps  # their tables are float32
        assert told[0] == 999.0 and ours_told == [first, *told[1:]]


def test_a_plan_scheduler_takes_it_over(monkeypatch):
    from fewstep.solvers.diffusers import PlanScheduler

    their = diffusers.CogVideoXDDIMScheduler(**MADE, snr_shift_scale=3.0, clip_sample=False)
    taken = PlanScheduler.from_config(their.config, solver="ddim", grid="trailing")
    assert taken.schedule == schedules.get("sd", snr_shift=3.0, zero_snr=True)
    for scheduler in (their, taken):
        scheduler.set_timesteps(5)
    expected, told = theirs(their, START, monkeypatch)
    found, ours_told = theirs(taken, START, monkeypatch)
    assert apart(found, expected) < 1e-9 and ours_told == told and taken.init_noise_sigma == 1.0
    with pytest.raises(UserError, match="'eps' says nothing about the picture where alpha is zero"):
        PlanScheduler.from_config(diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True).config)


@pytest.mark.parametrize("solver", solvers.names(alone=True))
def test_every_solver_paints_what_it_does_on_flow_from_alpha_zero_or_says_what_to_do(solver):
    """From the same levels."""
    flow = schedules.get("flow")
    levels = [999.0, 900.0, 700.0, 450.0, 200.0, 50.0, -1.0]
    found = []
    for schedule, grid in ((ZERO, levels), (flow, [float(flow.time_of_ratio(ZERO.ratio(t))) for t in levels])):
        try:
            plan = plan_of(solver, schedule, grid, 6)
        except UserError as error:
            assert solver in ("heun", "restart") and "use coordinate='flow', or start at a smaller t_max" in str(error)
            plan = plan_of(solver, schedule, grid, 6, coordinate="flow") if solver == "heun" else None
        if plan is None:
            return
        start = torch.stack([START, *DRAWN[:, : plan.stochastic_stages].unbind(1)], 1)
        found.append(solvers.sample(MIXTURE.teacher(schedule, "v"), plan, start, COND))
    in_time = solver in ("deis", "pndm", "tcd")  # their formulas are in t, which differs
    assert torch.isfinite(found[0]).all() and (in_time or apart(found[0], found[1]) < 1e-9)
