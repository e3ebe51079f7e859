"""Decays: on the device, and how profiles run."""

import math

import pytest
import torch

from fewstep_kernels import ema_update
from fewstep_kernels.decay_profiles import (
    Constant,
    Power,
    WarmUp,
    gamma_of_width,
    post_hoc_weights,
    width_of_gamma,
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("average_dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_a_decay_on_the_device_equals_the_number(dtype, average_dtype):
    decays = [0.75, 0.25]
    parameters = [torch.randn(63), torch.randn(8, 1030)]
    given, expected = ([[torch.zeros_like(p, dtype=average_dtype) for p in parameters] for _ in decays] for _ in "ab")
    ema_update(given, parameters, [torch.tensor(d, dtype=dtype) for d in decays])
    ema_update(expected, parameters, decays)
    assert all(torch.equal(a, b) for x, y in zip(given, expected) for a, b in zip(x, y))
    strided = [[torch.zeros(63, 2, dtype=average_dtype)[:, 0]] for _ in "ab"]
    ema_update(strided[0], parameters[:1], torch.tensor(0.75, dtype=dtype))
    ema_update(strided[1], parameters[:1], 0.75)
    torch.testing.assert_close(strided[0], strided[1], rtol=1e-6, atol=0)  # foreach and plain lerp


@pytest.mark.parametrize(
    ("decay", "words"),
    ((torch.tensor([0.5]), "must be 0-d"), (torch.tensor(0.5, dtype=torch.bfloat16), "must be 0-d, float32, float64")),
)
def test_other_decay_tensors_are_refused(decay, words):
    with pytest.raises(ValueError, match=words):
        ema_update([torch.zeros(2)], [torch.zeros(2)], decay)


def test_origins_must_be_multiples_of_eight():
    with pytest.raises(ValueError, match=r"multiple of 8 for each of 1 parameters; got \[4\]"):
        ema_update([torch.zeros(2)], [torch.zeros(2)], 0.5, origins=[4])


@pytest.mark.parametrize("profile", (Constant(0.99), WarmUp(0.9), Power(6.94), Power.of_width(0.1)))
def test_profiles_agree_on_numbers_and_tensors(profile):
    for n in (1, 2, 50, 10_000):
        found = profile.at(torch.tensor(n))
        assert 0.0 <= float(found) <= 1.0
        assert float(found) == pytest.approx(profile.at(n), rel=1e-15, abs=1e-300)


def test_warm_up_reaches_its_decay():
    profile = WarmUp(0.9)
    assert [profile.at(n) for n in (1, 11, 81, 10**6)] == [0.1, 0.55, 0.9, 0.9]


def test_gamma_and_width_are_inverse_and_match_the_paper():
    assert gamma_of_width(0.10) == pytest.approx(6.94, abs=5e-3)  # arXiv:2312.02696, section 3.1: gamma 6.94 and 16.97
    assert gamma_of_width(0.05) == pytest.approx(16.97, abs=5e-3)
    for width in (1e-3, 0.02, 0.15, 0.28, width_of_gamma(0.0)):
        assert width_of_gamma(gamma_of_width(width)) == pytest.approx(width, rel=1e-13)


def weights_of(gamma, updates):
    """What each past parameter weighs in a power average after `updates`."""
    weights = torch.zeros(updates, dtype=torch.float64)
    for n in range(1, updates + 1):
        decay = Power(gamma).at(n)
        weights *= decay
        weights[n - 1] += 1 - decay
    return weights


def test_power_weights_have_their_width_and_forget_the_start():
    width, updates = 0.1, 4000
    weights = weights_of(gamma_of_width(width), updates)
    times = (torch.arange(updates) + 0.5) / updates
    mean = (weights * times).sum()
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert ((weights * (times - mean) ** 2).sum().sqrt()).item() == pytest.approx(width, rel=2e-3)  # 1 / updates
    assert Power(3.0).at(1) == 0.0


def test_an_average_that_was_never_kept_is_rebuilt_from_snapshots():
    gammas = (gamma_of_width(0.05), gamma_of_width(0.10))
    stored = [(t, g) for t in range(512, 4097, 512) for g in gammas]
    wanted = (4096, gamma_of_width(0.075))
    weights = post_hoc_weights(stored, wanted)
    padded = [torch.nn.functional.pad(weights_of(g, t), (0, 4096 - t)) for t, g in stored]
    rebuilt = (weights[:, None] * torch.stack(padded)).sum(0)
    true = weights_of(wanted[1], wanted[0])
    assert weights.sum() == pytest.approx(1.0, abs=1e-2)
    assert (rebuilt - true).norm() < 0.02 * true.norm()
    exact = post_hoc_weights(stored, stored[3])
    torch.testing.assert_close(exact, torch.eye(len(stored), dtype=torch.float64)[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    (
        (lambda: Constant(1.5), r"\[0, 1\]; got 1.5"),
        (lambda: WarmUp(math.nan), r"\[0, 1\]; got nan"),
        (lambda: Power(-1.0), "above -1"),
        (lambda: Power.of_width(0.3), r"\(0, 0.2887\]; got 0.3"),
        (lambda: post_hoc_weights([], (1, 1.0)), "at least one"),
    ),
)
def test_what_does_not_fit_is_said(make, words):
    with pytest.raises(ValueError, match=words):
        make()
