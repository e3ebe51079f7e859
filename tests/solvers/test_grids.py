"""Time grids are the published ones, in float64."""

from __future__ import annotations

import itertools
import math

import pytest

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.errors import UserError
from fewstep.solvers import grids, spacing

ALL = schedules.names()


TABLES = {"leading", "trailing", "linspace", "lcm", "cm", "align_your_steps", "searched"}  # these have their own start
TABLES |= {"flow_shift", "linear_quadratic"}


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


def test_tables_of_indices_are_the_published_ones():
    sd = schedules.get("sd")
    assert grids.times("leading", sd, 4) == (751, 501, 251, 1, -1)
    assert grids.times({"name": "leading", "offset": 0}, sd, 3) == (666, 333, 0, -1)
    assert grids.times("trailing", sd, 4) == (999, 749, 499, 249, -1)
    assert grids.times("linspace", sd, 4) == pytest.approx((999, 666, 333, 0, -1))
    assert grids.times({"name": "linspace", "drop_last": True}, sd, 4) == (999, 749, 500, 250, -1)
    assert grids.times("lcm", sd, 4) == (999, 759, 499, 259, -1)


def test_align_your_steps_interpolates_log_sigma_between_its_ten_levels():
    schedule = schedules.get("sdxl")
    ten, nineteen = (grids.times("align_your_steps", schedule, steps) for steps in (10, 19))
    assert nineteen[:-1:2] == pytest.approx(ten[:-1], rel=1e-9)
    for i in range(9):
        middle = math.sqrt(schedule.ratio(ten[i]) * schedule.ratio(ten[i + 1]))
        assert schedule.ratio(nineteen[2 * i + 1]) == pytest.approx(middle, rel=1e-4)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (2.0, 5.0)])
def test_beta_quantiles_have_their_share_below_them(a, b):
    points = 20_001
    for share in (0.03, 0.4, 0.9):
        found = spacing.beta_quantile(share, a, b)
        # the integral up to the quantile, in x = u^4 so that the density's pole at 0 is integrable by midpoints
        step = found**0.25 / points
        places = [(i + 0.5) * step for i in range(points)]
        mass = sum(4 * u**3 * u ** (4 * (a - 1)) * (1 - u**4) ** (b - 1) for u in places) * step
        mass *= math.gamma(a + b) / math.gamma(a) / math.gamma(b)
        assert mass == pytest.approx(share, rel=1e-5)


def test_the_beta_grid_is_dense_at_both_ends():
    times = grids.times("beta", schedules.get("vp"), 9)
    steps = [a - b for a, b in itertools.pairwise(times[:-1])]
    assert steps == pytest.approx(steps[::-1], rel=1e-6) and steps[0] < 0.5 * steps[4]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("grid", ["cm", "flow_shift", "linear_quadratic", "scm"])
def test_few_step_grids_fall_from_the_first_time_to_the_clean_end_on_any_schedule(grid, name):
    schedule = schedules.get(name)
    for steps in (1, 2, 3, 10):
        times = grids.times(grid, schedule, steps)
        assert times[0] == schedule.t_max and times[-1] == schedule.t_clean and len(times) == steps + 1


def test_consistency_models_are_sampled_at_the_levels_they_are_trained_at():
    schedule = schedules.get("edm")
    trained = grids.times({"name": "karras", "zero": "none"}, schedule, 39)
    assert grids.times({"name": "cm", "picked": [0, 22]}, schedule, 2) == (trained[0], trained[22], 0.0)
    assert grids.times("cm", schedule, 4) == (*(trained[i] for i in (0, 10, 20, 30)), 0.0)


def test_scm_is_even_in_the_angle_but_for_its_middle():
    schedule = schedules.get("trigflow")
    assert grids.times("scm", schedule, 2) == pytest.approx((math.atan(160), 1.3, 0.0))
    assert grids.times({"name": "scm", "middle": 1.1}, schedule, 2)[1] == pytest.approx(1.1)
    assert grids.times({"name": "scm", "middle": None}, schedule, 2) == grids.times("uniform", schedule, 2)
    assert grids.times("scm", schedule, 5) == pytest.approx(grids.times("uniform", schedule, 5))
    edm, same = schedules.get("edm"), grids.times("scm", schedule, 3)
    assert grids.times("scm", edm, 3)[1:] == pytest.approx([0.5 * math.tan(t) for t in same[1:]])


def test_kl_optimal_is_the_closed_form_for_gaussian_data():
    times = grids.times({"name": "kl_optimal", "zero": "none", "data_std": 0.5}, schedules.get("edm"), 6)
    high, low = math.atan(80 / 0.5), math.atan(0.002 / 0.5)
    assert times == pytest.approx([0.5 * math.tan(high + i / 6 * (low - high)) for i in range(7)], rel=1e-9)


def test_a_flow_shift_is_applied_once_whatever_the_schedules_own():
    expected = [3 * u / (1 + 2 * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)]
    for own in (1.0, 3.0, 7.0):
        schedule = schedules.get("flow", shift=own)
        times = grids.times({"name": "flow_shift", "shift": 3.0}, schedule, 4)
        assert [schedule.sigma(t) for t in times] == pytest.approx(expected)
        assert grids.times({"name": "flow_shift", "mu": math.log(3.0)}, schedule, 4) == pytest.approx(times)
    schedule = schedules.get("flow", shift=5.0)
    assert grids.times("flow_shift", schedule, 4) == pytest.approx(grids.times("uniform", schedule, 4))
    one, other = (grids.times({"name": "flow_shift", **o}, schedule, 4) for o in ({"image_length": 256}, {"mu": 0.5}))
    assert one == pytest.approx(other)


@pytest.mark.parametrize(
    ("grid", "steps", "words"),
    [
        (
            "karas",
            4,
            "grid 'karas' is not known (did you mean 'karras'?); choose one of: align_your_steps, beta, cm,",
        ),
        ("karras", 0, "steps is 0; give a whole number of at least 1"),
        ("karras", 2.5, "steps is 2.5"),
        ({"name": "karras", "rh": 3}, 4, "option of grid 'karras', 'rh' is not known (did you mean 'rho'?)"),
        ({"name": "karras", "rho": 0}, 4, "rho=0; give a number above 0"),
        ({"name": "karras", "zero": "yes"}, 4, "zero 'yes' is not known"),
        ({"name": "karras", "end": 0.0}, 4, "cannot end at t=0.0"),
        ({"rho": 7}, 4, "grid None is not known"),
        ("leading", 4, "grid 'leading' counts the indices of sd and sdxl, not 'edm'"),
        ({"name": "align_your_steps", "model": "sd2"}, 4, "model of grid 'align_your_steps', 'sd2' is not known"),
        ({"name": "karras", "rho": "x"}, 4, "rho of grid 'karras' is 'x'; give a number"),
        ({"name": "beta", "a": None}, 4, "a of grid 'beta' is None; give a number"),
        ({"name": "karras", "start": [1]}, 4, "start of grid 'karras' is [1]; give a number or None"),
        ({"name": "flow_shift", "mu": 1e9}, 4, "grid 'flow_shift' cannot use mu=1000000000.0"),
        ({"name": "karras", "start": math.nan}, 4, "start of grid 'karras' is nan; give a number"),
        ({"name": "karras", "coordinate": "t"}, 4, "coordinate of grid 'karras', 't' is not known"),
        ({"name": "cm", "picked": [0, 40]}, 2, "picked=[0, 40]; give 2 indices from 0 to 39"),
        ({"name": "cm", "picked": [22, 0]}, 2, "grid 'cm' must be strictly falling"),
        ({"name": "scm", "middle": 2.0}, 2, "middle=2.0; give an angle above 0 and below pi/2"),
        ({"name": "flow_shift", "shift": 3.0, "mu": 1.0}, 2, "got shift and mu; give one of"),
        ({"name": "flow_shift", "shift": 0.0}, 2, "got a shift of 0.0; give a number above 0"),
        ({"name": "flow_shift", "terminal": 0.1}, 1, "cannot end on a terminal level in 1 step"),
        ({"name": "linear_quadratic", "linear_steps": 4}, 4, "linear_steps=4 of 4 steps"),
        ({"name": "beta", "a": 0.0}, 4, "a=0.0 and b=0.6; give numbers above 0"),
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
