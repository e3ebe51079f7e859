"""Time grids by diffusers' names are its schedulers' times."""

from __future__ import annotations

import pytest

from fewstep import solvers
from fewstep.diffusion import schedules
from tests.solvers.diffusers_runs import SD, diffusers


def ratios(grid, name: str, steps: int) -> list[float]:
    """sigma/alpha at a grid's times."""
    schedule = schedules.get(name)
    return [schedule.ratio(t) for t in solvers.grids.times(grid, schedule, steps)]


@pytest.mark.parametrize("steps", [2, 7, 10, 50])
def test_stable_diffusions_spacings_are_its_schedulers(steps):
    sd = schedules.get("sd")
    for scheduler, grid, made in (
        ("EulerDiscreteScheduler", "linspace", {"timestep_spacing": "linspace"}),
        ("DDIMScheduler", "trailing", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", "leading", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"name": "leading", "offset": 0}, {"timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", {"name": "linspace", "drop_last": True}, {"timestep_spacing": "linspace"}),
        ("LCMScheduler", "lcm", {}),
    ):
        theirs = getattr(diffusers, scheduler)(**SD, **made)
        theirs.set_timesteps(steps)
        ours = solvers.grids.times(grid, sd, steps)
        assert ours == pytest.approx([*(float(t) for t in theirs.timesteps), -1.0], rel=1e-6)


@pytest.mark.parametrize("steps", [2, 7, 10, 50])
@pytest.mark.parametrize(
    ("grid", "switch"),
    [
        ("karras", "use_karras_sigmas"),
        ("exponential", "use_exponential_sigmas"),
        ({"name": "beta", "coordinate": "ratio"}, "use_beta_sigmas"),
    ],
)
def test_grids_laid_in_sigma_are_its_schedulers(steps, grid, switch):
    theirs = diffusers.EulerDiscreteScheduler(**SD, **{switch: True})
    theirs.set_timesteps(steps)
    # theirs ends at sqrt(1 - alphas_cumprod[0]) in float32: 6e-8 of 8.5e-4
    assert ratios(grid, "sd", steps) == pytest.approx([float(sigma) for sigma in theirs.sigmas], rel=5e-5)


def test_align_your_steps_are_its_tables():
    from diffusers.schedulers import AysSchedules

    for name, table in (("sd", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("edm", "StableDiffusionVideo")):
        grid = {"name": "align_your_steps"} if name != "edm" else {"name": "align_your_steps", "model": "svd"}
        schedule = schedules.get(name, t_max=700.0) if name == "edm" else schedules.get(name)
        found = [schedule.ratio(t) for t in solvers.grids.times(grid, schedule, 10)]
        assert found == pytest.approx(AysSchedules[f"{table}Sigmas"], rel=1e-4)
        if name != "edm":  # the published indices are those levels, rounded
            told = solvers.grids.times(grid, schedule, 10)[:-1]
            assert all(abs(a - b) < 1.0 for a, b in zip(told, AysSchedules[f"{table}Timesteps"]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_flow_times_are_its_sigmas(shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    schedule = schedules.get("flow", shift=shift)
    found = [schedule.sigma(t) for t in solvers.grids.times("uniform", schedule, 8)]
    assert found == pytest.approx([float(sigma) for sigma in theirs.sigmas], rel=1e-6)
