"""The oracles are checked against each other and against draws."""

from __future__ import annotations

import pytest
import torch

from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import KINDS, Prediction
from fewstep.errors import UserError

MIXTURE = Mixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.2]], [0.35, 0.25])


def states(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_mixtures_denoiser_is_the_gradient_of_its_log_density():
    alpha, sigma = 0.8, 0.6
    x = states().requires_grad_()
    variances = alpha**2 * MIXTURE.stds**2 + sigma**2
    distances = (x[:, None] - alpha * MIXTURE.means).square().sum(-1)
    density = (MIXTURE.weights / variances * torch.exp(-0.5 * distances / variances)).sum(1)
    score = torch.autograd.grad(density.log().sum(), x)[0]
    tweedie = (x.detach() + sigma**2 * score) / alpha
    torch.testing.assert_close(MIXTURE.denoise(x.detach(), alpha, sigma), tweedie, rtol=0, atol=1e-13)
    torch.testing.assert_close(MIXTURE.noise(x.detach(), alpha, sigma), -sigma * score, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", schedules.names())
def test_a_mixture_of_one_has_the_gaussians_closed_form_flow_map(name):
    schedule = schedules.get(name)
    one, gaussian = (
        Mixture([1.0], [[0.7, -0.3]], [0.35]),
        Gaussian(torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35),
    )
    x = states() * schedule.sigma(schedule.t_max)
    exact = gaussian.flow_map(x, schedule, schedule.t_max, schedule.t_min)
    torch.testing.assert_close(
        one.flow_map(x, schedule, schedule.t_max, schedule.t_min, steps=400), exact, rtol=0, atol=1e-8
    )


def test_the_mixtures_flow_map_has_converged():
    schedule = schedules.get("edm")
    x = states() * 80
    coarse, fine = (MIXTURE.flow_map(x, schedule, 80.0, 0.0, steps=steps) for steps in (300, 600))
    assert (coarse - fine).abs().max() < 1e-8  # Runge-Kutta of order 4: the error left is about 1e-10


def test_flow_maps_compose_invert_and_take_one_time_per_sample():
    schedule = schedules.get("flow")
    t, s = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.2, 0.1, 0.3, 0.05]], dtype=torch.float64)
    for data in (Gaussian(0.4, 0.35), MIXTURE):
        x = states()
        there = data.flow_map(x, schedule, t, s)
        torch.testing.assert_close(data.flow_map(there, schedule, s, t), x, rtol=0, atol=1e-8)
        halfway = data.flow_map(x, schedule, t, 0.5)
        torch.testing.assert_close(data.flow_map(halfway, schedule, 0.5, s), there, rtol=0, atol=1e-8)
        torch.testing.assert_close(data.flow_map(x[1:2], schedule, 0.8, 0.1), there[1:2], rtol=0, atol=1e-12)


def test_conditions_select_components_and_null_means_all():
    cond = torch.tensor([0, 1, 2, 2])
    found = MIXTURE.denoise(states(), 0.8, 0.6, cond)
    for index in range(2):
        alone = Gaussian(MIXTURE.means[index], float(MIXTURE.stds[index]))
        torch.testing.assert_close(found[index], alone.denoise(states(), 0.8, 0.6)[index], rtol=0, atol=1e-14)
    torch.testing.assert_close(found[2:], MIXTURE.denoise(states(), 0.8, 0.6)[2:], rtol=0, atol=1e-15)
    assert torch.equal(MIXTURE.null(cond), torch.full((4,), 2))


def test_draws_have_the_mixtures_mean_and_variance():
    draws = MIXTURE.sample(40_000, torch.Generator().manual_seed(0))
    mean = (MIXTURE.weights[:, None] * MIXTURE.means).sum(0)
    second = (MIXTURE.weights[:, None] * (MIXTURE.means**2 + MIXTURE.stds[:, None] ** 2)).sum(0)
    # five standard errors of 40,000 draws with a std below 0.9
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=5 * 0.9 / 200)
    torch.testing.assert_close(draws.square().mean(0), second, rtol=0, atol=5 * 1.0 / 200)
    picked = MIXTURE.sample(4000, torch.Generator().manual_seed(0), torch.ones(4000, dtype=torch.int64))
    torch.testing.assert_close(picked.mean(0), MIXTURE.means[1], rtol=0, atol=5 * 0.25 / 63)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_answers_with_the_path_at_the_boundary(kind):
    schedule, data = schedules.get("edm"), Gaussian(0.4, 0.35)
    student = data.student(schedule, Prediction(kind, boundary=0.01))
    x = states() * 3
    torch.testing.assert_close(student(x, 3.0), data.flow_map(x, schedule, 3.0, 0.01), rtol=0, atol=1e-11)
    torch.testing.assert_close(student(x, 0.01), x, rtol=0, atol=1e-14)
    clean = data.student(schedule, kind)
    torch.testing.assert_close(clean(x, 3.0), data.consistency(x, schedule, 3.0), rtol=0, atol=1e-11)


def test_the_mixtures_student_is_its_flow_map():
    schedule = schedules.get("vp")
    student = MIXTURE.student(schedule, Prediction("v", boundary=0.01))
    torch.testing.assert_close(
        student(states(), 0.8), MIXTURE.flow_map(states(), schedule, 0.8, 0.01), rtol=0, atol=1e-12
    )


def test_images_are_data_too():
    data = Mixture([0.5, 0.5], torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)), [0.3, 0.2])
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = Mixture([0.5, 0.5], data.means.flatten(1), data.stds)
    torch.testing.assert_close(data.denoise(x, 0.7, 0.5).flatten(1), flat.denoise(x.flatten(1), 0.7, 0.5))
    assert data.teacher(schedules.get("vp"))(x.float(), 0.5).dtype == torch.float32


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="std=0"):
        Gaussian(0.0, 0.0)
    with pytest.raises(UserError, match=r"weights \[K\], means \[K, \.\.\.\] and stds \[K\]"):
        Mixture([0.5, 0.5], [[0.0]], [1.0, 1.0])
    with pytest.raises(UserError, match=r"boundary=0\.1"):
        MIXTURE.teacher(schedules.get("edm"), Prediction("edm", boundary=0.1))
