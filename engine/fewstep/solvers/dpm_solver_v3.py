"""DPM-Solver-v3.  Zheng et al. 2023, 2310.13268, algorithm 1 and appendix.

In the parametrisation of `model_statistics` the path is x'/alpha' = e^{L - L'} (x/alpha - int e^{(L + S) - (L + S)_s}
(g + e^{S_s} (B - B_s)) d lambda), with L, S, B the integrals of l, s and e^{-S} b, and g = e^{S_s - S} f - e^{S_s} (B -
B_s) almost constant. Taken as a polynomial through past values this is one map per step, linear but with a coefficient
for every element, and a bias: not a plan. The tables are made once, on the host; a step is a network call and a few
multiply-adds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.linear import coefficient_dtype
from fewstep.errors import UserError, choose
from fewstep.solvers import grids, moments
from fewstep.solvers.grids import Grid
from fewstep.solvers.model_statistics import ModelStatistics

CORRECTORS = ("none", "same", "higher")
QUADRATURES = ("simpson", "trapezoid")


@dataclasses.dataclass(frozen=True)
class Move:
    """x' = of_x x + sum_j of_f[j] f_j + bias, elementwise; f_j in the order of `past`, steps counted from this one."""

    of_x: Tensor
    of_f: tuple[Tensor, ...]
    bias: Tensor
    past: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DpmSolverV3:
    """A compiled sampler: `times` N + 1; per step what makes f of x and x0_hat, the correction (or None), the move."""

    statistics: ModelStatistics
    times: tuple[float, ...]
    reads: tuple[Tensor, ...]
    corrections: tuple[Move | None, ...]
    moves: tuple[Move, ...]
    _cache: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def sample(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Any = None,
        uncond: Any = None,
        guidance: float | None = None,
    ) -> Tensor:
        """The state at the last time [B, ...], from standard normal noise [B, ...]; one evaluation a step."""
        schedule, shape = self.statistics.schedule, self.statistics.l.shape[1:]
        if not isinstance(denoiser, Denoiser) or denoiser.schedule != schedule:
            given = repr(denoiser.schedule) if isinstance(denoiser, Denoiser) else type(denoiser).__name__
            raise UserError(f"these statistics are of a denoiser on {schedule!r} and not of {given}; estimate its own.")
        if noise.shape[1:] != shape and shape.numel() != 1:
            raise UserError(f"noise has shape {list(noise.shape)} and the statistics are of samples {list(shape)}.")
        with torch.no_grad():
            reads, corrections, moves = self._on(noise)
            x = float(schedule.sigma(self.times[0])) * noise
            base, past = x, []
            for t, read, correction, move in zip(self.times, reads, corrections, moves):
                past.append(torch.addcmul(-denoiser.guided(x, t, cond, guidance, uncond), x, read))
                base = x if correction is None else _moved(correction, base, past)
                x = _moved(move, base, past)
            return x

    def _on(self, like: Tensor) -> tuple[Any, Any, Any]:
        """The tables on a device, in the dtype that accumulates."""
        dtype = coefficient_dtype(like)
        key = (like.device, dtype)
        if key not in self._cache:

            def sent(move: Move | None) -> Move | None:
                if move is None:
                    return None
                of_f = tuple(value.to(like.device, dtype) for value in move.of_f)
                return Move(move.of_x.to(like.device, dtype), of_f, move.bias.to(like.device, dtype), move.past)

            reads = [value.to(like.device, dtype) for value in self.reads]
            self._cache[key] = reads, [sent(m) for m in self.corrections], [sent(m) for m in self.moves]
        found: tuple[Any, Any, Any] = self._cache[key]
        return found


def _moved(move: Move, x: Tensor, past: Sequence[Tensor]) -> Tensor:
    total = torch.addcmul(move.bias, x, move.of_x)
    for weight, behind in zip(move.of_f, move.past):
        total = torch.addcmul(total, past[-1 - behind], weight)
    return total.to(x.dtype)


def dpm_solver_v3(
    statistics: ModelStatistics,
    steps: int,
    *,
    grid: Grid = "log_snr",
    order: int = 3,
    corrector: str = "none",
    pseudo: bool = False,
    pseudo_corrector: bool = False,
    lower_order_final: bool = False,
    quadrature: str = "simpson",
) -> DpmSolverV3:
    """Compiles the sampler from the first to the last level of the statistics, at the nearest of its levels to `grid`.

    order: 1 to 3, reached by a warm-up. corrector: before each further step the state is corrected from the same
    evaluations, its own new one among them: by as many values as the prediction took ("same"), one more ("higher": one
    order above), or not at all ("none"). pseudo, pseudo_corrector: divided differences stand for derivatives, as in the
    published code's p_pseudo and c_pseudo, which leaves order 2 at most. lower_order_final: the last steps are of
    orders .., 2, 1. quadrature: of the integrals between levels, "simpson", or "trapezoid" as published.
    """
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise UserError(f"DPM-Solver-v3 got order={order!r}; choose one of: 1, 2, 3.")
    if corrector not in CORRECTORS:
        raise choose("corrector of DPM-Solver-v3,", corrector, CORRECTORS)
    if quadrature not in QUADRATURES:
        raise choose("quadrature of DPM-Solver-v3,", quadrature, QUADRATURES)
    indices = _indices(statistics, steps, grid)
    integrals = _Integrals(statistics, quadrature)
    corrections: list[Move | None] = []
    moves, used = [], 0
    for step, (i, j) in enumerate(itertools.pairwise(indices)):
        correction = None
        nodes = {"none": 0, "same": used, "higher": used + 1}[corrector]
        if step > 0 and nodes > 1:
            # from the step before, its own value and the new one first, then older ones
            behind = [1, 0, *range(2, nodes)]
            at = [indices[step - k] for k in behind]
            correction = integrals.move(indices[step - 1], i, at, behind, pseudo_corrector)
        corrections.append(correction)
        used = min(order, step + 1, *([steps - step] if lower_order_final else []))
        behind = list(range(used))
        moves.append(integrals.move(i, j, [indices[step - k] for k in behind], behind, pseudo))
    schedule = statistics.schedule
    times = tuple(float(schedule.time_of_half_log_snr(float(statistics.lambdas[i]))) for i in indices)
    # f = (sigma eps - l x)/alpha = (1 - l) x/alpha - x0_hat
    reads = tuple((1.0 - statistics.l[i]) / float(schedule.alpha(t)) for i, t in zip(indices[:-1], times))
    return DpmSolverV3(statistics, times, reads, tuple(corrections), tuple(moves))


def _indices(statistics: ModelStatistics, steps: int, grid: Grid) -> list[int]:
    schedule, lambdas = statistics.schedule, statistics.lambdas
    first, last = (float(schedule.time_of_half_log_snr(float(value))) for value in (lambdas[0], lambdas[-1]))
    if isinstance(grid, str):
        grid = {"name": grid, "start": first, "end": last, "zero": "none"}
    times = grids.times(grid, schedule, steps)
    share = (len(lambdas) - 1) / float(lambdas[-1] - lambdas[0])
    places = [(float(schedule.half_log_snr(t)) - float(lambdas[0])) * share for t in times]
    indices = [round(place) if math.isfinite(place) else -1 for place in places]
    inside = indices[0] >= 0 and indices[-1] < len(lambdas)
    if not inside or any(after <= before for before, after in itertools.pairwise(indices)):
        raise UserError(
            f"a grid of {steps} steps does not fall from t={first:g} to t={last:g} over {len(lambdas)} levels of the "
            "statistics; take fewer steps, or estimate them at more points."
        )
    return indices


class _Integrals:
    """l, s and e^{-S} b are taken as linear between levels, so that L, S and B are exact there and half way."""

    def __init__(self, statistics: ModelStatistics, quadrature: str) -> None:
        self.schedule, self.lambdas, self.quadrature = statistics.schedule, statistics.lambdas, quadrature
        self.width = float(self.lambdas[1] - self.lambdas[0])
        self.long, self.long_half = self._integrated(statistics.l)
        self.short, self.short_half = self._integrated(statistics.s)
        self.drift, self.drift_half = self._integrated(torch.exp(-self.short) * statistics.b)

    def _integrated(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """At the levels [T + 1, ...] and half way after them [T, ...]."""
        here, after = values[:-1], values[1:]
        whole = torch.cat([torch.zeros_like(values[:1]), (0.5 * self.width * (here + after)).cumsum(0)])
        return whole, whole[:-1] + 0.125 * self.width * (3.0 * here + after)

    def _rule(self, i: int, j: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(lambda - lambda_i, e^{(L + S) - (L + S)_i}, B - B_i, weights) at the points of the rule from i to j."""
        at, half = slice(i, j + 1), slice(i, j)
        weights = torch.full((j + 1 - i,), self.width, dtype=torch.float64)
        weights[0] = weights[-1] = 0.5 * self.width
        rise = self.lambdas[at] - self.lambdas[i]
        growth, drift = (self.long + self.short)[at], self.drift[at]
        if self.quadrature == "simpson":
            weights = torch.cat([weights / 3.0, torch.full((j - i,), 2.0 / 3.0 * self.width, dtype=torch.float64)])
            rise = torch.cat([rise, rise[:-1] + 0.5 * self.width])
            growth = torch.cat([growth, (self.long_half + self.short_half)[half]])
            drift = torch.cat([drift, self.drift_half[half]])
        origin = self.long[i] + self.short[i]
        return rise, torch.exp(growth - origin), drift - self.drift[i], weights

    def move(self, i: int, j: int, at: Sequence[int], behind: Sequence[int], pseudo: bool) -> Move:
        """From level i to level j by the polynomial through g at levels `at` (the first is i)."""
        rise, growth, drift, weights = self._rule(i, j)
        ones = (-1, *[1] * (growth.ndim - 1))
        weighed = growth * weights.view(ones)
        powers = [(weighed * rise.view(ones) ** n).sum(0) for n in range(len(at))]
        alpha, alpha_to = (self._alpha(k) for k in (i, j))
        scale = -alpha_to * torch.exp(self.long[i] - self.long[j])
        lift = torch.exp(self.short[i])
        bias = scale * lift * (weighed * drift).sum(0)
        of_f = []
        for k, row in zip(at, _polynomial([float(self.lambdas[k] - self.lambdas[i]) for k in at], pseudo)):
            weight = scale * sum(c * power for c, power in zip(row, powers))
            of_f.append(weight * torch.exp(self.short[i] - self.short[k]))
            bias = bias - weight * lift * (self.drift[k] - self.drift[i])
        of_x = alpha_to / alpha * torch.exp(self.long[i] - self.long[j])
        return Move(of_x, tuple(of_f), bias, tuple(behind))

    def _alpha(self, index: int) -> float:
        return float(self.schedule.alpha(self.schedule.time_of_half_log_snr(float(self.lambdas[index]))))


def _polynomial(nodes: Sequence[float], pseudo: bool) -> list[list[float]]:
    """c[j][n]: what the value at node j adds to the coefficient of u^n, nodes[0] being 0.

    pseudo: the n-th divided difference of the first n + 1 nodes stands for that coefficient.
    """
    if not pseudo:
        return moments.basis(nodes)
    rows = [[0.0] * len(nodes) for _ in nodes]
    for n in range(len(nodes)):
        for j in range(n + 1):
            rows[j][n] = 1.0 / math.prod(nodes[j] - nodes[k] for k in range(n + 1) if k != j)
    return rows
