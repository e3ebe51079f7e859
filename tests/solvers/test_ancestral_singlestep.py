"""DPM++ 2S a and DPM++ SDE are k-diffusion's loops, and without what sets them apart other solvers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.errors import UserError

EDM = schedules.get("edm")
SIGMAS = [12.0, 4.0, 1.1, 0.3, 0.0]
MIX = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def denoised(x, sigma):
    return torch.tanh(x @ MIX / (1.0 + sigma)) + 0.1


def network(x, t):
    return denoised(x, float(t[0]))


def carried(plan):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 1 + plan.stochastic_stages, 3, dtype=torch.float64, generator=generator)


def ancestral(sigma, sigma_to, eta):
    up = min(sigma_to, eta * (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_dpmpp_2s_a_is_its_loop(eta):
    plan = solvers.plan("dpmpp_2s_a", EDM, 4, grid=SIGMAS, prediction="x0", eta=eta, noise_scale=1.01)
    noise = carried(plan)
    assert (plan.evaluations, plan.stochastic_stages) == (7, 3)
    x, draws = SIGMAS[0] * noise[:, 0], iter(noise[:, 1:].unbind(1))
    for sigma, sigma_to in itertools.pairwise(SIGMAS):
        down, up = ancestral(sigma, sigma_to, eta)
        d = denoised(x, sigma)
        if down == 0:
            x = d
            continue
        t, t_to = -math.log(sigma), -math.log(down)
        h = t_to - t
        inner = math.exp(-(t + 0.5 * h))
        ahead = inner / sigma * x - math.expm1(-0.5 * h) * d
        x = down / sigma * x - math.expm1(-h) * denoised(ahead, inner) + 1.01 * up * next(draws)
    torch.testing.assert_close(solvers.sample(network, plan, noise), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("eta", "ratio"), [(1.0, 0.5), (0.6, 0.7)])
def test_dpmpp_sde_is_its_loop_on_a_brownian_path(eta, ratio, shared):
    options = {"eta": eta, "ratio": ratio, "shared_noise": shared, "noise_scale": 0.98}
    plan = solvers.plan("dpmpp_sde", EDM, 4, grid=SIGMAS, prediction="x0", **options)
    noise = carried(plan)
    assert (plan.evaluations, plan.stochastic_stages) == (7, 6)
    x, draws = SIGMAS[0] * noise[:, 0], iter(noise[:, 1:].unbind(1))
    for sigma, sigma_to in itertools.pairwise(SIGMAS):
        d = denoised(x, sigma)
        if sigma_to == 0:
            x = d
            continue
        t, t_to = -math.log(sigma), -math.log(sigma_to)
        inner = math.exp(-(t + ratio * (t_to - t)))
        # a path W over [sigma_to, sigma]: its increments to `inner` and from there on are independent
        one, two = next(draws), next(draws)
        if shared:
            parts = (sigma - inner) ** 0.5 * one, (inner - sigma_to) ** 0.5 * two
            one, two = parts[0] / (sigma - inner) ** 0.5, (parts[0] + parts[1]) / (sigma - sigma_to) ** 0.5
        down, up = ancestral(sigma, inner, eta)
        ahead = down / sigma * x - math.expm1(t + math.log(down)) * d + 0.98 * up * one
        late = 1.0 / (2.0 * ratio)
        mean = (1.0 - late) * d + late * denoised(ahead, inner)
        down, up = ancestral(sigma, sigma_to, eta)
        x = down / sigma * x - math.expm1(t + math.log(down)) * mean + 0.98 * up * two
    torch.testing.assert_close(solvers.sample(network, plan, noise), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in schedules.names() if name != "flow"])
def test_what_they_are_without_noise_and_with_independent_draws(name):
    schedule = schedules.get(name)

    def pictures(solver, **options):
        plan = solvers.plan(solver, schedule, 5, grid="karras", prediction="x0", **options)
        return solvers.sample(network, plan, carried(plan))

    plain = pictures("dpmpp_2s")
    for solver in ("dpmpp_2s_a", "dpmpp_sde"):
        torch.testing.assert_close(pictures(solver, eta=0.0), plain, rtol=1e-9, atol=1e-9)
    independent = pictures("dpmpp_sde", shared_noise=False)
    torch.testing.assert_close(independent, pictures("dpmpp_2s", strength=1.0), rtol=1e-9, atol=1e-9)
    assert float((pictures("dpmpp_sde") - independent).abs().max()) > 1e-3


def test_a_mistake_is_one_sentence():
    for solver, options, words in (
        ("dpmpp_2s_a", {"eta": 1.5}, "eta=1.5; give a number from 0"),
        ("dpmpp_sde", {"ratio": 0.0}, "ratio=0.0; give a number above 0 and at most 1"),
        ("dpmpp_sde", {"grid": [0.1, 1.0, 3.0]}, "got a rising grid; inversion is deterministic, give eta=0"),
    ):
        with pytest.raises(UserError, match=words):
            solvers.plan(solver, EDM, 2, **options)
