"""ERA-Solver, implicit Adams whose predictor picks its nodes by its own error.  Li et al. 2023, 2301.12935.

Not a plan: which past estimates a step combines depends on how far off the last prediction was. They are chosen on the
device, for every sample by itself, as weights of one `lincomb` over all past estimates; nothing is read by the host.
"""

from __future__ import annotations

import math
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

ADAMS_MOULTON = (9 / 24, 19 / 24, -5 / 24, 1 / 24)  # of the predicted next estimate, this one, and the two before


def era(
    denoiser: Denoiser,
    noise: Tensor,
    steps: int,
    *,
    grid: Grid | None = None,
    nodes: int = 4,
    error_scale: float = 5.0,
    cond: Any = None,
    uncond: Any = None,
    guidance: float | Mapping[str, Any] | None = None,
) -> Tensor:
    """Samples [B, ...] from standard normal noise in `steps` evaluations.

    After `nodes` - 1 steps of DDIM, each step predicts the next noise estimate by Lagrange's polynomial in t through
    `nodes` past ones (k, 3 to 6), takes the Adams-Moulton mean of it with the last three, and moves by DDIM's transfer.
    Of the estimates 0 .. i the m-th chosen is floor(i (m/k)^(d/error_scale)), d the norm of the difference between the
    last estimate and its prediction over all numbers of a sample (error_scale before there is one): small errors pick
    the newest, large ones spread towards the first, which err less. Where two indices coincide the older one moves
    down. error_scale: the paper's lambda, about 5 on pictures of 3 x 32 x 32; inf always picks the newest (Adams-
    Bashforth where steps are equal).
    The weights are those of equal steps: order 2 on smooth grids, 1 where neighbouring steps differ. The grid falls and
    defaults to the schedule's. Raises UserError for what it cannot use.
    """
    times = _times(denoiser, noise, steps, grid, nodes, error_scale)
    schedule, count = denoiser.schedule, len(times) - 1
    with torch.no_grad():
        dtype = coefficient_dtype(noise)
        placed = torch.tensor(times, dtype=torch.float64, device=noise.device)
        x = combine([noise], [(float(schedule.sigma(times[0])),)])[0]
        past: list[Tensor] = []
        predicted: Tensor | None = None
        for i in range(count):
            t, s = times[i], times[i + 1]
            clean = denoiser.guided(x, t, cond, guidance, uncond)
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            past.append(combine([x, clean], [(1.0 / sigma, -alpha / sigma)])[0])
            if i < nodes - 1 or alpha == 0.0:
                x = combine([x, clean], [rows.jump(schedule, t, s)])[0]
                continue
            if predicted is None:
                power = placed.new_full((len(x),), 1.0 if math.isfinite(error_scale) else 0.0)
            else:
                power = fk.l2(past[-1], predicted, reduction="sum").double().sqrt() / error_scale
            lagrange = _lagrange(placed[: i + 1], placed[i + 1], _chosen(i, nodes, power))
            mean = ADAMS_MOULTON[0] * lagrange
            for behind, weight in enumerate(ADAMS_MOULTON[1:]):
                mean[:, i - behind] += weight
            keep = float(schedule.alpha(s)) / alpha
            move = float(schedule.sigma(s)) - keep * sigma
            zero = torch.zeros_like(power)[:, None]
            table = torch.stack([torch.cat([zero + keep, move * mean], 1), torch.cat([zero, lagrange], 1)], 1)
            x, predicted = fk.lincomb([x, *past], table.to(dtype))
        return x


def _chosen(i: int, nodes: int, power: Tensor) -> Tensor:
    """Indices [B, nodes] of past estimates 0 .. i, rising, for powers [B]."""
    number = torch.arange(1, nodes + 1, dtype=torch.float64, device=power.device)
    # a rounding above a whole number must not fall below it
    wanted = torch.floor(i * (number / nodes) ** power[:, None] + 1e-9)
    # from the newest down each stays below the next; from the oldest up there is room for those before it
    below = torch.minimum(wanted, i - nodes + number).sub(number).flip(1).cummin(1).values.flip(1).add(number)
    return torch.maximum(below, number - 1).long()


def _lagrange(times: Tensor, at: Tensor, chosen: Tensor) -> Tensor:
    """[B, i + 1]: the weights of the estimates at `times` in the polynomial through the chosen ones, at time `at`."""
    picked = times[chosen]  # [B, k]
    apart = picked[:, :, None] - picked[:, None, :]  # t_m - t_l
    away = (at - picked)[:, None, :].expand_as(apart)
    own = torch.eye(picked.shape[1], dtype=torch.bool, device=times.device)
    weights = torch.where(own, 1.0, away / torch.where(own, 1.0, apart)).prod(2)
    return times.new_zeros((len(chosen), len(times))).scatter(1, chosen, weights)


def _times(
    denoiser: Any, noise: Any, steps: int, grid: Grid | None, nodes: int, error_scale: float
) -> tuple[float, ...]:
    if not isinstance(denoiser, Denoiser):
        raise UserError(f"ERA-Solver needs a Denoiser and got {type(denoiser).__name__}; wrap the network.")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.ndim < 2:
        raise UserError("noise must be a floating-point tensor [B, ...] of standard normal numbers.")
    if isinstance(nodes, bool) or nodes not in (3, 4, 5, 6):
        raise UserError(f"ERA-Solver got nodes={nodes!r}; choose one of: 3, 4, 5, 6.")
    if not error_scale > 0:
        raise UserError(f"ERA-Solver got error_scale={error_scale!r}; give a number above 0 (inf: the newest nodes).")
    times = grids.times(grid, denoiser.schedule, steps)
    if grids.is_rising(times):
        raise UserError("ERA-Solver got a rising grid; it only goes down, use ddim, euler or heun for inversion.")
    return times
