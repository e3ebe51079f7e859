"""Time grids that diffusers has are diffusers' grids."""

from __future__ import annotations

import pytest

from fewstep import solvers
from fewstep.diffusion import schedules

diffusers = pytest.importorskip("diffusers", reason="comparison with diffusers needs: pip install diffusers")

LATENT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}  # Flux's


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
@pytest.mark.parametrize(
    ("made", "grid"),
    [
        ({"shift": 3.0}, {"shift": 3.0}),
        ({**LATENT}, {"image_length": 1024}),
        ({**LATENT}, {"image_length": 4096, "max_shift": 1.15}),
        ({**LATENT, "time_shift_type": "linear"}, {"image_length": 1024, "form": "linear"}),
        ({**LATENT, "max_shift": 2.05, "base_shift": 0.95, "shift_terminal": 0.1}, {"image_length": 2048}),
        ({"shift": 2.0, "shift_terminal": 0.2}, {"shift": 2.0}),
    ],
)
def test_shifts_by_image_size_and_to_a_terminal_level_are_its_sigmas(made, grid, steps):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**made)
    if "shift_terminal" in made and steps == 1:
        return
    grid = {"name": "flow_shift", "terminal": made.get("shift_terminal"), **grid}
    if "image_length" in grid:
        grid |= {"base_shift": made["base_shift"], "max_shift": made["max_shift"]}
    mu = None
    if theirs.config.use_dynamic_shifting:
        mu = calculate_shift(grid["image_length"], 256, 4096, made["base_shift"], made["max_shift"])
    theirs.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    for own in (1.0, 4.0):
        schedule = schedules.get("flow", shift=own)
        found = [schedule.sigma(t) for t in solvers.grids.times(grid, schedule, steps)]
        assert found == pytest.approx([float(sigma) for sigma in theirs.sigmas], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("steps", [2, 7, 30])
@pytest.mark.parametrize("grid", ["karras", "exponential", "beta"])
def test_grids_laid_in_the_level_of_flow_matching_are_its_schedulers(grid, steps):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**{f"use_{grid}_sigmas": True})
    theirs.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    for own in (1.0, 3.0):
        schedule = schedules.get("flow", shift=own)
        end = schedule.time_of_network_time(1 / steps)
        times = solvers.grids.times({"name": grid, "coordinate": "flow", "end": end}, schedule, steps)
        assert [schedule.sigma(t) for t in times] == pytest.approx([float(s) for s in theirs.sigmas], rel=1e-6)


@pytest.mark.parametrize("steps", [2, 7, 30])
def test_linear_quadratic_levels_are_mochis(steps):
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    schedule = schedules.get("flow")
    assert solvers.grids.times("linear_quadratic", schedule, steps)[:-1] == pytest.approx(
        linear_quadratic_schedule(steps, 0.025), rel=1e-12
    )


def test_few_step_students_times_are_their_schedulers():
    scm, trigflow = diffusers.SCMScheduler(), schedules.get("trigflow")
    for steps in (1, 2, 4):
        middle = {} if steps == 2 else {"intermediate_timesteps": None}
        scm.set_timesteps(steps, max_timesteps=trigflow.t_max, **middle)
        assert solvers.grids.times("scm", trigflow, steps) == pytest.approx([float(t) for t in scm.timesteps], rel=1e-6)
    cm, edm = diffusers.CMStochasticIterativeScheduler(), schedules.get("edm")
    for steps in (1, 2, 3, 4, 40):
        cm.set_timesteps(steps)
        theirs = [float(sigma) for sigma in cm.sigmas[:-1]]
        assert solvers.grids.times("cm", edm, steps)[:-1] == pytest.approx(theirs, rel=1e-6)
    cm.set_timesteps(timesteps=[22, 0])
    picked = solvers.grids.times({"name": "cm", "picked": [0, 22]}, edm, 2)
    assert picked[:-1] == pytest.approx([float(sigma) for sigma in cm.sigmas[:-1]], rel=1e-6)
