"""Predictor-corrector sampling: ancestral steps, each settled by Langevin dynamics at its level.

Song et al. 2021, 2011.13456, section 4.2 and algorithms 2 to 5. Not a plan: a Langevin step is as long as the score's
size says, for every sample by itself. Its size is a reduction on the device, then a `lincomb`; nothing is read back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import fewstep_kernels as fk
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.linear import coefficient_dtype, combine
from fewstep.errors import UserError
from fewstep.solvers import grids, rows
from fewstep.solvers.grids import Grid


def predictor_corrector(
    denoiser: Denoiser,
    noise: Tensor,
    steps: int,
    *,
    seeds: Tensor,
    grid: Grid | None = None,
    corrections: int = 1,
    snr: float = 0.16,
    eta: float = 1.0,
    cond: Any = None,
    uncond: Any = None,
    guidance: float | Mapping[str, Any] | None = None,
) -> Tensor:
    """Samples [B, ...] from standard normal noise [B, ...] in steps + corrections (steps - 1) evaluations.

    Each step goes down by DDIM(eta) (1: ancestral, 0: the ODE), then `corrections` times x <- x + e score + sqrt(2 e) z
    at the level reached, e = 2 (snr |z|/|score|)^2 (2011.13456, algorithm 4; algorithm 5's factor alpha_i is left out,
    it is 1 but for the last digits). Norms are of each sample; the published code takes their mean over the batch. The
    last level is not corrected where sigma is zero. seeds: int64 [B]; the k-th draw is Philox stream k. snr: 0.16 on
    CIFAR-10, 0.01 to 0.17 in the paper. The grid falls and defaults to the schedule's.
    """
    times = _times(denoiser, noise, steps, seeds, grid, corrections, snr, eta)
    schedule, dtype = denoiser.schedule, coefficient_dtype(noise)
    streams = itertools.count(1)
    with torch.no_grad():
        x = combine([noise], [(float(schedule.sigma(times[0])),)])[0]
        for t, s in itertools.pairwise(times):
            clean = denoiser.guided(x, t, cond, guidance, uncond)
            of_x, of_clean, of_noise = rows.noisy_jump(schedule, t, s, eta)
            row = torch.tensor([[of_x, of_clean, of_noise]], dtype=dtype, device=x.device)
            x = fk.lincomb([x, clean], row, dtypes=[x.dtype], noise_seeds=seeds, noise_stream=next(streams))[0]
            if grids.is_clean(schedule, s):
                continue
            alpha, sigma = float(schedule.alpha(s)), float(schedule.sigma(s))
            for _ in range(corrections):
                clean = denoiser.guided(x, s, cond, guidance, uncond)
                eps = combine([x, clean], [(1.0 / sigma, -alpha / sigma)])[0]
                z = fk.normal(seeds, x.shape[1:], stream=next(streams), dtype=dtype)
                sizes = (fk.l2(v, torch.zeros_like(v), reduction="sum") for v in (z, eps))
                root = snr * sigma * torch.sqrt(next(sizes) / next(sizes))  # sqrt(e/2); the score is -eps/sigma
                x = combine([x, eps, z], [(1.0, -2.0 / sigma * root * root, 2.0 * root)])[0].to(x.dtype)
        return x


def _times(
    denoiser: Any, noise: Any, steps: int, seeds: Any, grid: Grid | None, corrections: int, snr: float, eta: float
) -> tuple[float, ...]:
    if not isinstance(denoiser, Denoiser):
        raise UserError(f"predictor-corrector sampling needs a Denoiser and got {type(denoiser).__name__}; wrap it.")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.ndim < 2:
        raise UserError("noise must be a floating-point tensor [B, ...] of standard normal numbers.")
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.shape != noise.shape[:1]:
        raise UserError(f"seeds must be an int64 tensor with one seed per sample, [{noise.shape[0]}].")
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
        raise UserError(f"corrections={corrections!r}; give a whole number of at least 0.")
    if not snr > 0.0 or not 0.0 <= eta <= 1.0:
        raise UserError(f"snr={snr!r} and eta={eta!r}; give snr above 0 (0.16 is usual) and eta from 0 to 1.")
    times = grids.times(grid, denoiser.schedule, steps)
    if grids.is_rising(times):
        raise UserError("predictor-corrector sampling got a rising grid; use ddim, euler or heun for inversion.")
    return times
