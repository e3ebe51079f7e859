"""The denoiser agrees with what is known about Gaussian data."""

from __future__ import annotations

import pytest
import torch

from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import Denoiser, schedules
from fewstep.diffusion.prediction import KINDS
from fewstep.errors import UserError

MEAN = torch.tensor([0.7, -0.3], dtype=torch.float64)
DATA = Gaussian(MEAN, 0.35)
PAIR = Mixture([0.5, 0.5], [[0.7, -0.3], [-0.2, 0.4]], [0.35, 0.35])


def states(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", schedules.names())
def test_every_read_out_is_the_gaussians(name, kind):
    schedule = schedules.get(name)
    teacher = DATA.teacher(schedule, kind)
    t = schedule.t_min + torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * (schedule.t_max - schedule.t_min)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x = alpha * MEAN + torch.sqrt(alpha**2 * 0.35**2 + sigma**2) * states()
    offset = (x - alpha * MEAN) / (alpha**2 * 0.35**2 + sigma**2)
    # 1e-10: the eps read-out divides by alpha and the x0 one by sigma, each as small as 0.01
    torch.testing.assert_close(teacher(x, t), MEAN + alpha * 0.35**2 * offset, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(teacher.eps(x, t), sigma * offset, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(teacher.score(x, t), -offset, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", schedules.names())
def test_velocity_is_the_slope_of_the_flow_map(name):
    schedule = schedules.get(name)
    teacher = DATA.teacher(schedule, "v")
    t = 0.5137 * (schedule.t_min + schedule.t_max)
    h = 1e-4 if name in ("sd", "sdxl") else 1e-5 * t
    x = states()
    slope = (DATA.flow_map(x, schedule, t, t + h) - DATA.flow_map(x, schedule, t, t - h)) / (2 * h)
    torch.testing.assert_close(teacher.velocity(x, t), slope, rtol=1e-6, atol=1e-8)  # central difference, h^2


def test_time_may_be_a_number_a_scalar_or_one_per_sample():
    teacher = DATA.teacher(schedules.get("edm"), "edm")
    x, t = states(), 1.7
    expected = teacher(x, torch.full((3,), t, dtype=torch.float64))
    torch.testing.assert_close(teacher(x, t), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(teacher(x, torch.tensor(t, dtype=torch.float64)), expected, rtol=0, atol=0)


def test_guidance_of_two_equal_width_gaussians_is_the_gaussian_of_the_extrapolated_mean():
    schedule, w = schedules.get("vp"), 2.5
    cond, uncond = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    guided = Gaussian(PAIR.means[1] + w * (PAIR.means[0] - PAIR.means[1]), 0.35)
    for kind in KINDS:
        found = PAIR.teacher(schedule, kind).guided(states(), 0.4, cond, w, uncond)
        torch.testing.assert_close(found, guided.teacher(schedule)(states(), 0.4), rtol=0, atol=1e-12)


def test_guidance_uses_the_networks_null_condition_and_may_differ_per_sample():
    teacher, cond = PAIR.teacher(schedules.get("vp"), "v"), torch.tensor([0, 1, 0])
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    of_cond, of_null = teacher(states(), 0.4, cond), teacher(states(), 0.4, torch.full((3,), 2))
    expected = of_null + w[:, None] * (of_cond - of_null)
    torch.testing.assert_close(teacher.guided(states(), 0.4, cond, w), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("w", [None, 1.0])
def test_guidance_of_one_is_no_guidance_bit_for_bit(w):
    teacher, cond = PAIR.teacher(schedules.get("vp"), "v"), torch.tensor([0, 1, 0])
    assert torch.equal(teacher.guided(states(), 0.4, cond, w), teacher(states(), 0.4, cond))


@pytest.mark.parametrize("name", schedules.names())
def test_forward_mode_in_time_keeps_its_tangent(name):
    schedule = schedules.get(name)
    teacher = DATA.teacher(schedule, "v")
    t = torch.full((3,), 0.3137 * (schedule.t_min + schedule.t_max), dtype=torch.float64)
    x, dx = states(), states(1)
    _, tangent = torch.func.jvp(teacher, (x, t), (dx, torch.ones_like(t)))
    h = 1e-4 if name in ("sd", "sdxl") else 1e-5 * float(t[0])
    difference = (teacher(x + h * dx, t + h) - teacher(x - h * dx, t - h)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)


def test_as_network_is_the_bare_network():
    class Doubler(torch.nn.Module):
        def forward(self, x, t, cond=None):
            return 2 * x + t[:, None]

    denoiser = Denoiser(Doubler(), schedules.get("edm"), "edm")
    x, t = states(), torch.ones(3, dtype=torch.float64)
    assert torch.equal(denoiser(x, t, as_network=True), 2 * x + 1)
    scale = denoiser.prediction.input_scale(denoiser.schedule, 5.0)
    told = denoiser.prediction.network_time(denoiser.schedule, 5.0)
    torch.testing.assert_close(denoiser.raw(x, 5.0), 2 * x * scale + told, rtol=0, atol=1e-14)


def test_mistakes_are_one_sentence():
    denoiser = Denoiser(torch.nn.Identity(), schedules.get("edm"), "x0")
    with pytest.raises(UserError, match=r"time has shape \[2\] for a batch of 3"):
        denoiser(states(), torch.ones(2))
    with pytest.raises(UserError, match="Identity has no null"):
        denoiser.guided(states(), 1.0, torch.zeros(3), 2.0)
    with pytest.raises(UserError, match="prediction 'sample' is not known"):
        Denoiser(torch.nn.Identity(), schedules.get("edm"), "sample")
