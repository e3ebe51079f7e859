"""Time grids are the published ones, in float64."""

from __future__ import annotations

import itertools
import math

import pytest

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.errors import UserError
from fewstep.solvers import grids

ALL = schedules.names()


TABLES = {"leading", "trailing", "linspace", "lcm", "align_your_steps"}  # these have their own start


@pytest.mark.parametrize("grid", [name for name in grids.names() if name not in TABLES])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("zero", ["append", "replace", "none"])
def test_a_grid_falls_from_the_start_to_the_end(grid, name, steps, zero):
    schedule = schedules.get(name, t_min=schedules.get(name).t_min + 0.01)
    times = grids.times({"name": grid, "end": schedule.t_min, "zero": zero}, schedule, steps)
    assert len(times) == steps + 1 and times[0] == schedule.t_max
    assert list(times) == sorted(set(times), reverse=True)
    assert times[-1] == (schedule.t_min if zero == "none" else schedule.t_clean)
    if zero == "append" and steps > 1:
        assert times[-2] == schedule.t_min


def test_karras_is_the_papers():
    times = grids.times("karras", schedules.get("edm"), 18)
    for i in range(18):
        expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert times[i] == pytest.approx(expected, rel=1e-12)
    assert times[18] == 0.0


def test_log_snr_is_even_in_lambda_and_exponential_in_sigma():
    schedule = schedules.get("vp")
    times = grids.times({"name": "log_snr", "zero": "none"}, schedule, 5)
    steps = [schedule.half_log_snr(b) - schedule.half_log_snr(a) for a, b in itertools.pairwise(times)]
    assert steps == pytest.approx([steps[0]] * 5)
    assert times == grids.times({"name": "exponential", "zero": "none"}, schedule, 5)


def test_uniform_on_stable_diffusion_is_trailing_spacing():
    assert grids.times("uniform", schedules.get("sd"), 4) == pytest.approx((999, 749, 499, 249, -1))


def test_quadratic_is_even_in_the_root_of_time():
    times = grids.times("quadratic", schedules.get("vp"), 4)
    assert [math.sqrt(t) for t in times] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_grids_laid_in_sigma_over_alpha_start_at_pure_noise_all_the_same():
    times = grids.times("karras", schedules.get("flow"), 4)
    assert times[0] == 1.0 and 0.5 < times[1] < 0.999


def test_the_default_is_karras_on_edm_and_uniform_elsewhere():
    assert grids.times(None, schedules.get("edm"), 5) == grids.times("karras", schedules.get("edm"), 5)
    assert grids.times(None, schedules.get("vp"), 5) == grids.times("uniform", schedules.get("vp"), 5)


def test_consistency_spends_no_evaluation_on_the_last_time():
    plan = solvers.plan("consistency", schedules.get("edm"), 2, prediction="edm")
    middle = (0.5 * (80 ** (1 / 7) + 0.002 ** (1 / 7))) ** 7
    assert plan.times == pytest.approx((80.0, middle, 0.0))


@pytest.mark.parametrize(
    ("grid", "steps", "words"),
    [
        (
            "karas",
            4,
            "grid 'karas' is not known (did you mean 'karras'?); choose one of: align_your_steps, beta, exponential",
        ),
        ("karras", 0, "steps is 0; give a whole number of at least 1"),
        ("karras", 2.5, "steps is 2.5"),
        ({"name": "karras", "rh": 3}, 4, "option of grid 'karras', 'rh' is not known (did you mean 'rho'?)"),
        ({"name": "karras", "rho": 0}, 4, "rho=0; give a number above 0"),
        ({"name": "karras", "zero": "yes"}, 4, "zero 'yes' is not known"),
        ({"name": "karras", "end": 0.0}, 4, "cannot end at t=0.0"),
        ({"rho": 7}, 4, "grid None is not known"),
        ([0.9, 0.5, 0.6, 0.1, 0.0], 4, "a custom grid must be strictly falling and goes from 0.5 to 0.6"),
        ([0.1, 0.5, 0.4, 0.6, 0.9], 4, "a custom grid must be strictly rising and goes from 0.5 to 0.4"),
        ([0.9, 0.5], 4, "a custom grid for 4 steps needs 5 times"),
        ([0.9, -0.5], 1, "outside the times 0 to inf of schedule 'edm'"),
        ([0.9, "x"], 1, "a custom grid holds numbers"),
    ],
)
def test_a_mistake_is_one_sentence(grid, steps, words):
    with pytest.raises(UserError) as error:
        grids.times(grid, schedules.get("edm"), steps)
    assert words in str(error.value)
