"""How an average's decay runs with the number of updates: constant, warmed up, or the power functions of post-hoc EMA.

    constant    decay
    warm-up     min(decay, n / (n + 9)) at the n-th update, as most trainers have it
    power       (1 - 1/n)^(1 + gamma): the average's weights grow as n^gamma, so its width is a fixed share of the run
                (Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion
                models", arXiv:2312.02696, section 3.1)

`profile.at(n)`: n = 1, 2, ... as a number gives a float; as a 0-d tensor a float64 tensor on its device, with no
sync.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class DecayProfile(Protocol):
    def at(self, update: float | Tensor) -> float | Tensor: ...


def _check(decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1]; got {decay}.")


@dataclass(frozen=True)
class Constant:
    """The same decay at every update."""

    decay: float

    def __post_init__(self) -> None:
        _check(self.decay)

    def at(self, update: float | Tensor) -> float | Tensor:
        return self.decay


@dataclass(frozen=True)
class WarmUp:
    """min(decay, n / (n + 9)): 0.1 at the first update."""

    decay: float

    def __post_init__(self) -> None:
        _check(self.decay)

    def at(self, update: float | Tensor) -> float | Tensor:
        if isinstance(update, Tensor):
            update = update.double()
            return (update / (update + 9.0)).clamp(max=self.decay)
        return min(self.decay, update / (update + 9.0))


@dataclass(frozen=True)
class Power:
    """(1 - 1/n)^(1 + gamma); gamma > -1."""

    gamma: float

    def __post_init__(self) -> None:
        if not self.gamma > -1.0:
            raise ValueError(f"gamma must be above -1; got {self.gamma}.")

    @classmethod
    def of_width(cls, sigma_rel: float) -> Power:
        """The power whose weights have standard deviation sigma_rel as a share of the run; in (0, 0.288)."""
        return cls(gamma_of_width(sigma_rel))

    def at(self, update: float | Tensor) -> float | Tensor:
        if isinstance(update, Tensor):
            return (1.0 - 1.0 / update.double()) ** (1.0 + self.gamma)
        return (1.0 - 1.0 / update) ** (1.0 + self.gamma)


def width_of_gamma(gamma: float) -> float:
    """sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)): the width of the power function's weights."""
    return math.sqrt(gamma + 1.0) / ((gamma + 2.0) * math.sqrt(gamma + 3.0))


def gamma_of_width(sigma_rel: float) -> float:
    """The gamma >= 0 with width sigma_rel, by bisection: the width falls as gamma grows.

    Raises ValueError outside (0, 1/sqrt(12)], the widths of gamma >= 0.
    """
    if not 0.0 < sigma_rel <= width_of_gamma(0.0):
        raise ValueError(f"sigma_rel must be in (0, {width_of_gamma(0.0):.4f}]; got {sigma_rel}.")
    low, high = 0.0, 1.0
    while width_of_gamma(high) > sigma_rel:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        low, high = (middle, high) if width_of_gamma(middle) > sigma_rel else (low, middle)
    return high if abs(width_of_gamma(high) - sigma_rel) < abs(width_of_gamma(low) - sigma_rel) else low


def _products(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> Tensor:
    """Inner products of the weight functions of averages (update, gamma): [len(a), len(b)], float64."""
    (t, g), (s, h) = (torch.tensor(list(pairs), dtype=torch.float64).T for pairs in (a, b))
    t, g, s, h = t[:, None], g[:, None], s[None], h[None]
    power = torch.where(t < s, h, -g)
    return (g + 1) * (h + 1) * (t / s) ** power / ((g + h + 1) * torch.maximum(t, s))


def post_hoc_weights(stored: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> Tensor:
    """How to mix stored power averages into one that was never kept: weights [len(stored)], float64.

    stored: (update number, gamma) of each snapshot; wanted: the same of the average to make. Least squares between the
    weight functions (arXiv:2312.02696, section 3.2): `sum_i weights[i] * snapshot[i]` is the average.
    """
    if not stored:
        raise ValueError("post_hoc_weights takes at least one stored (update, gamma); got none.")
    return torch.linalg.lstsq(_products(stored, stored), _products(stored, [wanted]), driver="gelsd").solution[:, 0]
