"""ERA-Solver is its paper's algorithm, of order 2, per sample and without reading the device."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import Denoiser, schedules
from fewstep.errors import UserError
from fewstep.solvers.era import era

DATA = {
    "gaussian": Gaussian(torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35),
    "mixture": Mixture([0.4, 0.6], [[-0.5, 0.3], [0.4, -0.2]], [0.5, 0.35]),
}
VP = schedules.get("vp")
FIRST, LAST = VP.time_of_half_log_snr(-3.0), VP.time_of_half_log_snr(2.5)
NOISE = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Rough(torch.nn.Module):
    """A network whose answers jump about, so that predictions miss."""

    def forward(self, x, t, cond=None):
        shift = 0.0 if cond is None else cond[:, None]
        return torch.tanh(x + shift) + 0.4 * torch.sin(40.0 * t)[:, None] * torch.cos(x)

    def null(self, cond):
        return torch.zeros_like(cond)


def literal(denoiser, noise, times, k, scale):
    """One sample at a time, as the algorithm is written; returns the samples and the indices each step chose."""
    schedule, samples, picked = denoiser.schedule, [], []
    for z in noise:
        x, estimates, predicted, chosen = schedule.sigma(times[0]) * z[None], [], None, []
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            estimates.append(denoiser.eps(x, t))
            mean = estimates[i]
            if i >= k - 1:
                power = 1.0 if predicted is None else float((estimates[i] - predicted).norm()) / scale
                indices = [math.floor(i * (m / k) ** power + 1e-9) for m in range(1, k + 1)]
                for m in reversed(range(k - 1)):
                    indices[m] = min(indices[m], indices[m + 1] - 1)
                indices = [max(index, m) for m, index in enumerate(indices)]
                predicted = sum(
                    estimates[a] * math.prod((s - times[b]) / (times[a] - times[b]) for b in indices if b != a)
                    for a in indices
                )
                mean = (9 * predicted + 19 * estimates[i] - 5 * estimates[i - 1] + estimates[i - 2]) / 24
                chosen.append(tuple(indices))
            keep = schedule.alpha(s) / schedule.alpha(t)
            x = keep * x + (schedule.sigma(s) - keep * schedule.sigma(t)) * mean
        samples.append(x)
        picked.append(chosen)
    return torch.cat(samples), picked


@pytest.mark.parametrize("k", [3, 4, 6])
@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_it_is_the_papers_algorithm(scale, k):
    denoiser = Denoiser(Rough(), VP, "eps")
    times = solvers.grids.times("uniform", VP, 14)
    expected, picked = literal(denoiser, NOISE, times, k, scale)
    torch.testing.assert_close(era(denoiser, NOISE, 14, nodes=k, error_scale=scale), expected, rtol=1e-9, atol=1e-9)
    if scale == 0.3 and k == 4:
        assert len({tuple(choices) for choices in picked}) > 1  # samples choose by themselves
        assert any(choices[-1] != tuple(range(14 - k, 14)) for choices in picked)


@functools.cache
def exact(data):
    return DATA[data].flow_map(VP.sigma(FIRST) * NOISE, VP, FIRST, LAST)


@pytest.mark.parametrize("grid", ["uniform", "log_snr", "karras"])
@pytest.mark.parametrize("data", DATA)
def test_its_order_is_two(data, grid):
    found = []
    for steps in (64, 128, 256):
        laid = {"name": grid, "start": FIRST, "end": LAST, "zero": "none"}
        end = era(DATA[data].teacher(VP, "v"), NOISE, steps, grid=laid)
        found.append(float((end - exact(data)).abs().max()))
    for coarse, fine in itertools.pairwise(found):
        assert math.log2(coarse / fine) >= 1.85


def test_with_equal_steps_and_the_newest_nodes_it_is_adams_bashforth():
    """The mean of a cubic's value ahead and three of its own is the cubic's integral: 55, -59, 37, -9 over 24."""
    denoiser, times = Denoiser(Rough(), VP, "eps"), solvers.grids.times("uniform", VP, 9)
    x, estimates = VP.sigma(times[0]) * NOISE, []
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        estimates.insert(0, denoiser.eps(x, t))
        weights = (55 / 24, -59 / 24, 37 / 24, -9 / 24) if i >= 3 else (1.0,)
        mean = sum(w * e for w, e in zip(weights, estimates))
        keep = VP.alpha(s) / VP.alpha(t)
        x = keep * x + (VP.sigma(s) - keep * VP.sigma(t)) * mean
    torch.testing.assert_close(era(denoiser, NOISE, 9, error_scale=math.inf), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["edm", "flow", "sd", "trigflow"])
def test_other_schedules_guidance_and_single_samples(name):
    schedule = schedules.get(name)
    denoiser, cond = Denoiser(Rough(), schedule, "v"), torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    whole = era(denoiser, NOISE, 8, cond=cond, guidance=3.0, error_scale=0.5)
    assert whole.isfinite().all()
    for i in range(6):
        one = slice(i, i + 1)
        alone = era(denoiser, NOISE[one], 8, cond=cond[one], guidance=3.0, error_scale=0.5)
        torch.testing.assert_close(alone, whole[one], rtol=1e-9, atol=1e-9)


class Reads(TorchDispatchMode):
    """Counts what reads the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_by_the_host():
    with Reads() as reads:
        era(Denoiser(Rough(), VP, "eps"), NOISE, 8)
    assert reads.seen == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 2}, "nodes=2; choose one of: 3, 4, 5, 6"),
        ({"error_scale": 0.0}, "error_scale=0.0; give a number above 0"),
        ({"grid": [0.1, 0.4, 0.9]}, "ERA-Solver got a rising grid"),
        ({"grid": "unifrom"}, "grid 'unifrom' is not known"),
    ],
)
def test_a_mistake_is_one_sentence(options, words):
    with pytest.raises(UserError, match=words):
        era(Denoiser(Rough(), VP, "eps"), NOISE, 2, **options)
    with pytest.raises(UserError, match="needs a Denoiser and got Rough"):
        era(Rough(), NOISE, 2)
