"""Samplers whose coefficients come from the samples: Langevin corrections and AMED's midpoints."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import solvers
from fewstep.analytic import Gaussian
from fewstep.diffusion import Denoiser, schedules
from fewstep.errors import UserError
from fewstep.solvers.amed import amed
from fewstep.solvers.langevin import predictor_corrector
from fewstep_kernels import normal

ALL = ["vp", "edm", "sd", "trigflow"]
NOISE = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SEEDS = torch.tensor([3, 1, 4, 1, 5])


class Net(torch.nn.Module):
    def forward(self, x, t, cond=None):
        shift = 0.0 if cond is None else cond[:, None]
        return torch.tanh(x + shift) + 0.1 * torch.sin(t)[:, None]

    def null(self, cond):
        return torch.zeros_like(cond)


class Reads(TorchDispatchMode):
    """Counts what reads the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("corrections", [0, 2])
def test_predictor_corrector_is_its_algorithm(name, corrections):
    schedule = schedules.get(name)
    denoiser = Denoiser(Net(), schedule, "v")
    times = solvers.grids.times(None, schedule, 4)
    x, draws = schedule.sigma(times[0]) * NOISE, itertools.count(1)

    def drawn():
        return normal(SEEDS, (8,), stream=next(draws), dtype=torch.float64)

    for t, s in itertools.pairwise(times):
        ratio = (schedule.alpha(t) * schedule.sigma(s)) / (schedule.alpha(s) * schedule.sigma(t))
        std = schedule.sigma(s) * math.sqrt(1.0 - ratio**2)
        eps = denoiser.eps(x, t)
        x = schedule.alpha(s) * denoiser(x, t) + math.sqrt(schedule.sigma(s) ** 2 - std**2) * eps + std * drawn()
        for _ in range(corrections if schedule.sigma(s) > 0 else 0):
            z, score = drawn(), denoiser.score(x, s)
            step = 2.0 * (0.16 * z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)) ** 2
            x = x + step * score + torch.sqrt(2.0 * step) * z
    found = predictor_corrector(denoiser, NOISE, 4, seeds=SEEDS, corrections=corrections)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_corrections_mend_the_law_of_too_few_steps():
    """Five ancestral steps on Gaussian data end too narrow by ten standard errors and more; Langevin steps widen it."""
    schedule, data, count = schedules.get("vp"), Gaussian(torch.zeros(64, dtype=torch.float64), 0.35), 400
    noise = torch.randn(count, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    last = schedule.time_of_half_log_snr(1.0)
    grid = {"name": "log_snr", "end": last, "zero": "none"}
    exact = math.hypot(schedule.alpha(last) * 0.35, schedule.sigma(last))
    off = []
    for corrections in (0, 1, 8):
        found = predictor_corrector(
            data.teacher(schedule, "v"),
            noise,
            5,
            seeds=torch.arange(count),
            grid=grid,
            corrections=corrections,
            snr=0.2,
        )
        off.append((float(found.std()) / exact - 1.0) * math.sqrt(2.0 * noise.numel()))  # in standard errors
    assert abs(off[0]) > 10.0 and abs(off[1]) < 0.9 * abs(off[0]) and abs(off[2]) < 0.5 * abs(off[0])


def constant(place, push, told):
    return lambda x, clean, ratio, ratio_to: tuple(torch.full((len(x),), v, dtype=x.dtype) for v in (place, push, told))


@pytest.mark.parametrize("name", ALL)
def test_amed_at_the_even_middle_is_dpm2(name):
    schedule = schedules.get(name)
    denoiser, cond = Denoiser(Net(), schedule, "v"), torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    plan = solvers.plan("dpm2", schedule, 5, grid="karras", prediction="v", guidance=2.0)
    expected = solvers.sample(denoiser, plan, NOISE, cond)
    found = amed(denoiser, NOISE, 5, constant(0.5, 1.0, 1.0), grid="karras", cond=cond, guidance=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("analytic", [False, True])
def test_amed_is_its_step_for_every_sample_by_itself(analytic):
    """The sampler of zju-pi/diff-sampler, derived again: r, scale_dir c and scale_time a; its afs asks one less."""
    schedule = schedules.get("edm")
    denoiser = Denoiser(Net(), schedule, "edm")
    places, pushes, levels = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.5], [1.1, 0.9], [0.95, 1.2]))
    asked, hook = [], denoiser.net.register_forward_hook(lambda *_: asked.append(1) and None)
    options = {"grid": [10.0, 2.0, 0.5], "analytic_first_step": analytic}
    found = amed(denoiser, NOISE[:2], 2, lambda *_: (places, pushes, levels), **options)
    hook.remove()
    assert len(asked) == (3 if analytic else 4)
    for i in range(2):
        x = 10.0 * NOISE[i : i + 1]
        for sigma, sigma_to in ((10.0, 2.0), (2.0, 0.5)):
            r, c, a = (float(v[i]) for v in (places, pushes, levels))
            middle = sigma_to**r * sigma ** (1 - r)
            slope = (x - denoiser(x, sigma)) / sigma
            if analytic and sigma == 10.0:
                slope = x / math.sqrt(1.0 + sigma**2)
            ahead = x + (middle - sigma) * slope
            x = x + c * (sigma_to - sigma) * (ahead - denoiser(ahead, a * middle)) / middle
        torch.testing.assert_close(found[i : i + 1], x, rtol=1e-10, atol=1e-10)


def test_amed_learns_its_middle():
    """One parameter, by gradient: the best place of one step's middle on Gaussian data is not the even one."""
    schedule, data = schedules.get("edm"), Gaussian(torch.zeros(8, dtype=torch.float64), 0.5)
    teacher, grid = data.teacher(schedule, "x0"), [8.0, 0.2]
    exact = data.flow_map(8.0 * NOISE, schedule, 8.0, 0.2)
    place = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    optimizer, losses = torch.optim.Adam([place], 0.1), []
    for _ in range(60):
        ones = torch.ones(len(NOISE), dtype=torch.float64)
        found = amed(teacher, NOISE, 1, lambda *_, o=ones: (torch.sigmoid(place) * o, o, o), grid=grid)
        loss = (found - exact).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-2 * losses[0]


def test_nothing_is_read_by_the_host():
    denoiser = Denoiser(Net(), schedules.get("vp"), "v")
    with Reads() as reads, torch.no_grad():
        predictor_corrector(denoiser, NOISE, 4, seeds=SEEDS)
        amed(denoiser, NOISE, 4, constant(0.4, 1.0, 1.0))
    assert reads.seen == 0


def test_a_mistake_is_one_sentence():
    denoiser = Denoiser(Net(), schedules.get("vp"), "v")
    for options, words in (
        ({"seeds": None}, r"seeds must be an int64 tensor with one seed per sample, \[5\]"),
        ({"corrections": -1}, "corrections=-1; give a whole number of at least 0"),
        ({"snr": 0.0}, "snr=0.0 and eta=1.0; give snr above 0"),
        ({"grid": [0.1, 0.2, 0.3]}, "got a rising grid"),
    ):
        with pytest.raises(UserError, match=words):
            predictor_corrector(denoiser, NOISE, 2, **{"seeds": SEEDS, **options})
    with pytest.raises(UserError, match=r"pick must answer three tensors \[5\]"):
        amed(denoiser, NOISE, 2, lambda *_: (0.5, 1.0, 1.0))
    with pytest.raises(UserError, match="AMED-Solver needs a Denoiser and got Net"):
        amed(Net(), NOISE, 2, constant(0.5, 1.0, 1.0))
