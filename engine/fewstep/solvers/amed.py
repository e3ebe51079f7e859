"""AMED-Solver: midpoint steps whose middle, direction and told time a small network picks for every sample.

Zhou et al. 2023, 2312.00094, section 3; letters and order of steps as in zju-pi/diff-sampler. Not a plan: the
coefficients come from the samples. They stay on the device, and every move is a `lincomb` with a row per sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.linear import coefficient_dtype, combine
from fewstep.diffusion.real import isinf
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import grids, rows
from fewstep.solvers.grids import Grid

Pick = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor, Tensor]]


def amed(
    denoiser: Denoiser,
    noise: Tensor,
    steps: int,
    pick: Pick,
    *,
    grid: Grid | None = None,
    cond: Any = None,
    uncond: Any = None,
    guidance: float | Mapping[str, Any] | None = None,
    analytic_first_step: bool = False,
) -> Tensor:
    """Samples [B, ...] from standard normal noise [B, ...]; two evaluations a step.

    In tau = sigma/alpha: Euler from tau to the middle tau'^r tau^(1 - r), the slope d there with the network told a
    times that level, and x'/alpha' = x/alpha + c (tau' - tau) d. `pick(x, x0_hat, tau, tau')` -> (r in [0, 1], c, a),
    each [B]: the paper's network reads the bottleneck of the first evaluation, which a `pick` may keep by a hook, and
    keeps c within 1% of 1 and a at 1 by default (there `scale_dir` and `scale_time`). Constant 1/2, 1, 1 is dpm2; steps
    from pure noise and to sigma' = 0 are Euler's. `analytic_first_step`: the first evaluation is not made, its noise
    estimate being x/sqrt(alpha^2 + sigma^2) (there `afs`). Differentiable in what `pick` answers, which is how it is
    trained.
    """
    if not isinstance(denoiser, Denoiser):
        raise UserError(f"AMED-Solver needs a Denoiser and got {type(denoiser).__name__}; wrap the network.")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.ndim < 2:
        raise UserError("noise must be a floating-point tensor [B, ...] of standard normal numbers.")
    schedule = denoiser.schedule
    times = grids.times(grid, schedule, steps)
    if grids.is_rising(times):
        raise UserError("AMED-Solver got a rising grid; it only goes down, use ddim, euler or heun for inversion.")
    x = combine([noise], [(float(schedule.sigma(times[0])),)])[0]
    for t, s in itertools.pairwise(times):
        ratio, ratio_to = float(schedule.ratio(t)), float(schedule.ratio(s))
        if analytic_first_step and t == times[0]:
            clean = _as_noise(schedule, x, t)
        else:
            clean = denoiser.guided(x, t, cond, guidance, uncond)
        if grids.is_clean(schedule, s) or isinf(ratio):
            x = combine([x, clean], [rows.jump(schedule, t, s)])[0]
            continue
        place, push, told = _picked(pick(x, clean, ratio, ratio_to), x)
        level = ratio_to**place * ratio ** (1.0 - place)
        asked = schedule.time_of_ratio(told * level)
        alpha, alpha_to = float(schedule.alpha(t)), float(schedule.alpha(s))
        # the middle state, at the level the network is told: x/alpha moves, alpha is the told one's
        share = level / ratio
        scale = schedule.alpha(asked)
        state = combine([x, clean], [(scale * share / alpha, scale * (1.0 - share))])[0]
        answer = denoiser.guided(state, asked, cond, guidance, uncond)
        move = push * (ratio_to - ratio) / level
        row = (alpha_to / alpha * torch.ones_like(move), alpha_to * move / scale, -alpha_to * move)
        x = combine([x, state, answer], [row])[0]
    return x


def _as_noise(schedule: Schedule, x: Tensor, t: float) -> Tensor:
    """x0_hat where the noise estimate is x/sqrt(alpha^2 + sigma^2); 0 at pure noise."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    size = math.hypot(alpha, sigma)
    return combine([x], [(alpha / (size * (size + sigma)),)])[0]


def _picked(found: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(found, tuple) or [getattr(v, "shape", None) for v in found] != [x.shape[:1]] * 3:
        raise UserError(f"pick must answer three tensors [{len(x)}]: the middle's place, the push and the told level.")
    place, push, told = (value.to(coefficient_dtype(x)) for value in found)
    return place, push, told
