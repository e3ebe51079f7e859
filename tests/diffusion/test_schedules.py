"""Schedules are mutually consistent functions of time, for floats and for tensors."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.diffusion import schedules
from fewstep.errors import UserError

ALL = schedules.names()
FRACTIONS = (0.0, 0.03, 0.2, 0.5, 0.8, 0.97)


def inside(schedule: schedules.Schedule) -> list[float]:
    return [schedule.t_min + 0.4137e-3 + u * (schedule.t_max - schedule.t_min) for u in FRACTIONS]


@pytest.mark.parametrize("name", ALL)
def test_inverses_give_the_time_back(name):
    schedule = schedules.get(name)
    for t in inside(schedule):
        # lambda has slope of at least 0.01 per relative change of t everywhere, so rounding grows by 100 at most
        assert schedule.time_of_half_log_snr(schedule.half_log_snr(t)) == pytest.approx(t, rel=1e-12)
        assert schedule.time_of_ratio(schedule.ratio(t)) == pytest.approx(t, rel=1e-12)
        assert schedule.time_of_network_time(schedule.network_time(t)) == pytest.approx(t, rel=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_ratio_and_log_snr_are_those_of_alpha_and_sigma(name):
    schedule = schedules.get(name)
    for t in inside(schedule):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        assert schedule.ratio(t) == pytest.approx(sigma / alpha, rel=1e-13)
        assert schedule.half_log_snr(t) == pytest.approx(math.log(alpha / sigma), rel=1e-11, abs=1e-11)
        assert schedule.log_snr(t) == 2 * schedule.half_log_snr(t)


@pytest.mark.parametrize("name", ALL)
def test_derivatives_are_those_of_autograd(name):
    schedule = schedules.get(name)
    t = torch.tensor(inside(schedule), dtype=torch.float64, requires_grad=True)
    for value, rate in zip((schedule.alpha, schedule.sigma), schedule.derivatives(t)):
        result = value(t)
        found = torch.autograd.grad(result.sum(), t)[0] if result.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(rate, found, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_tensors_and_floats_agree_and_keep_their_kind(name):
    schedule = schedules.get(name)
    times = inside(schedule)
    for function in (schedule.alpha, schedule.sigma, schedule.ratio, schedule.half_log_snr, schedule.network_time):
        assert all(isinstance(function(t), float) for t in times)
        found = function(torch.tensor(times, dtype=torch.float64))
        assert found.dtype == torch.float64
        torch.testing.assert_close(
            found, torch.tensor([function(t) for t in times], dtype=torch.float64), rtol=1e-13, atol=1e-14
        )
        assert function(torch.tensor(times, dtype=torch.float32)).dtype == torch.float32
    values = torch.tensor([schedule.half_log_snr(t) for t in times], dtype=torch.float64)
    torch.testing.assert_close(
        schedule.time_of_half_log_snr(values), torch.tensor(times, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("name", ALL)
def test_there_is_no_noise_at_the_clean_time_and_more_of_it_later(name):
    schedule = schedules.get(name)
    assert schedule.sigma(schedule.t_clean) == 0.0 and schedule.alpha(schedule.t_clean) == 1.0
    assert schedule.half_log_snr(schedule.t_clean) == math.inf
    ratios = [schedule.ratio(t) for t in (schedule.t_clean, *inside(schedule))]
    assert ratios == sorted(ratios) and len(set(ratios)) == len(ratios)


@pytest.mark.parametrize("name", ["vp", "cosine", "sd", "sdxl"])
def test_variance_is_preserved(name):
    schedule = schedules.get(name)
    for t in inside(schedule):
        assert schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 == pytest.approx(1.0, abs=1e-14)


def test_stable_diffusion_has_its_published_alphas_at_whole_indices():
    schedule = schedules.get("sd")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    found = schedule.alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    torch.testing.assert_close(found, alpha_bar, rtol=1e-11, atol=0.0)
    # the largest and smallest sigma/alpha of diffusers' table for this schedule (14.6146 and 0.0292)
    assert schedule.ratio(999.0) == pytest.approx(14.6146, abs=1e-4)
    assert schedule.ratio(0.0) == pytest.approx(0.0292, abs=1e-4)


def test_stable_diffusion_is_log_linear_between_indices_and_ratio_linear_to_the_clean_time():
    schedule = schedules.get("sdxl")
    middle = 0.5 * (schedule.half_log_snr(400.0) + schedule.half_log_snr(401.0))
    assert schedule.half_log_snr(400.5) == pytest.approx(middle, rel=1e-13)
    assert schedule.ratio(-0.75) == pytest.approx(0.25 * schedule.ratio(0.0), rel=1e-13)
    assert schedule.time_of_ratio(0.25 * schedule.ratio(0.0)) == pytest.approx(-0.75, rel=1e-13)
    early = torch.tensor([-0.75, -0.25, 400.5], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(schedule.time_of_ratio(schedule.ratio(early)), early, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(schedule.alpha(early).sum(), early)[0]
    torch.testing.assert_close(schedule.derivatives(early)[0], found, rtol=1e-10, atol=1e-15)


ZERO = schedules.get("sd", zero_snr=True)
ENDING = (-0.5, 0.3, 400.5, 998.0, 998.25, 998.999, 999.0)


def test_zero_snr_shifts_and_scales_alpha_to_zero_at_the_last_index():
    """Algorithm 1 of 2305.08891; between the last two indices alpha/sigma is linear."""
    usual = schedules.get("sd").alpha(torch.arange(1000, dtype=torch.float64))
    expected = (usual - usual[-1]) * usual[0] / (usual[0] - usual[-1])
    found = ZERO.alpha(torch.arange(1000, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0.0)
    assert (ZERO.alpha(999.0), ZERO.sigma(999.0)) == (0.0, 1.0) and ZERO.alpha(0.0) == pytest.approx(float(usual[0]))
    assert ZERO.half_log_snr(999.0) == -math.inf and ZERO.ratio(999.0) == math.inf
    assert ZERO.ratio(998.75) == pytest.approx(4 * ZERO.ratio(998.0), rel=1e-12)
    for end in (-math.inf, torch.tensor(-math.inf)):
        assert float(ZERO.time_of_half_log_snr(end)) == 999.0
    assert float(ZERO.time_of_ratio(math.inf)) == 999.0


def test_zero_snr_is_one_function_of_floats_and_tensors_with_its_inverse():
    times = torch.tensor(ENDING, dtype=torch.float64)
    for function in (ZERO.alpha, ZERO.sigma, ZERO.ratio, ZERO.half_log_snr):
        expected = torch.tensor([function(t) for t in ENDING], dtype=torch.float64)
        torch.testing.assert_close(function(times), expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(ZERO.alpha(times) ** 2 + ZERO.sigma(times) ** 2, torch.ones_like(times))
    torch.testing.assert_close(ZERO.time_of_half_log_snr(ZERO.half_log_snr(times)), times, rtol=1e-12, atol=0.0)
    assert [ZERO.time_of_half_log_snr(ZERO.half_log_snr(t)) for t in ENDING] == pytest.approx(ENDING, rel=1e-12)


def test_zero_snrs_gradients_are_its_derivatives_up_to_the_end():
    t = torch.tensor(ENDING, dtype=torch.float64, requires_grad=True)
    for value, rate in zip((ZERO.alpha, ZERO.sigma), ZERO.derivatives(t.detach())):
        torch.testing.assert_close(torch.autograd.grad(value(t).sum(), t)[0], rate, rtol=1e-9, atol=1e-13)
    told = torch.autograd.grad(ZERO.half_log_snr(t).sum(), t)[0]
    assert torch.isfinite(told[:-1]).all() and told[-1] == -math.inf
    level = torch.tensor([-math.inf, -9.0, -1.0, 5.0], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(ZERO.time_of_half_log_snr(level).sum(), level)[0]
    assert torch.isfinite(found).all() and found[0] == 0.0 and (found[1:] < 0.0).all()
    for place, at in enumerate(ENDING):
        floats, tensors = ZERO.derivatives(at), ZERO.derivatives(torch.tensor(ENDING, dtype=torch.float64))
        assert [float(rate[place]) for rate in tensors] == pytest.approx(floats, rel=1e-12)


def test_cosine_is_the_published_alpha_bar():
    schedule = schedules.get("cosine")
    for t in (0.1, 0.5, 0.9):
        published = math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert schedule.alpha(t) ** 2 == pytest.approx(published, rel=1e-13)


def test_flow_shift_is_sd3s_and_the_network_is_told_the_shifted_time():
    schedule = schedules.get("flow", shift=3.0)
    assert schedule.sigma(0.5) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    assert schedule.alpha(0.5) == pytest.approx(1 - schedule.sigma(0.5))
    assert schedule.network_time(0.5) == schedule.sigma(0.5)
    assert schedule.time_of_ratio(math.inf) == 1.0 and schedule.ratio(1.0) == math.inf


def test_noise_is_added_per_sample():
    schedule = schedules.get("vp")
    x0, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = schedule.alpha(t).view(3, 1, 1, 1) * x0 + schedule.sigma(t).view(3, 1, 1, 1) * noise
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.add_noise(x0, noise, 0.5)[1], expected[1], rtol=0, atol=1e-15)


def test_a_table_first_used_in_inference_mode_still_serves_autograd():
    schedule = schedules.get("sd", beta_start=0.00086)
    with torch.inference_mode():
        schedule.alpha(torch.tensor([3.5]))
    t = torch.tensor([3.5], requires_grad=True)
    schedule.alpha(t).sum().backward()
    assert t.grad is not None and float(t.grad) != 0.0


@pytest.mark.parametrize("name", ALL)
def test_a_schedule_survives_its_description(name):
    schedule = schedules.get(name, t_min=schedules.get(name).t_min + 0.0123)
    assert schedules.from_dict(schedule.to_dict()) == schedule
    assert schedule != schedules.get(name)
    assert schedules.from_dict(ZERO.to_dict()) == ZERO != schedules.get("sd")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedules.get("edn"), "schedule 'edn' is not known (did you mean 'edm'?); choose one of: cosine, edm"),
        (
            lambda: schedules.get("flow", shfit=3.0),
            "option of schedule 'flow', 'shfit' is not known (did you mean 'shift'?)",
        ),
        (lambda: schedules.get("flow", shift=0.0), "shift=0.0; give a number above 0"),
        (lambda: schedules.get("edm", t_max="big"), "t_max='big'; give a finite number"),
        (lambda: schedules.get("edm", t_min=90.0), "t_min=90.0 and t_max=80.0; give 0 <= t_min < t_max"),
        (lambda: schedules.get("flow", t_max=2.0), "t_max <= 1"),
        (lambda: schedules.get("sd", zero_snr=1), "zero_snr=1; give True or False"),
        (lambda: schedules.get("sd", zero_snr=True, train_steps=2, t_max=1.0), "at least 3 train_steps"),
        (lambda: schedules.from_dict({"shift": 1.0}), "a schedule needs a name"),
    ],
)
def test_a_mistake_is_one_sentence(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value)
