"""Diffusions that are linear but not isotropic: u_t = Psi(0, t) u_0 + R(t) eps, with matrices for alpha and sigma.

The state u of every number of the picture has n parts, mixed by n x n matrices: a position and a velocity, say; or one
part, in the basis where pictures blur, with a matrix for every frequency. Matrices are [n, n, ...] in float64 on the
CPU, and what follows n x n lies against a part [C, H, W] from the right. Time is 0 where the picture is clean.

R is the root of the covariance, R R^T = Sigma, that follows the probability flow of a point: dR/dt = (F + G G^T
Sigma^-1/2) R (gDDIM, 2206.05564, eq. 17). With it eps = -R^T score stays as it is along that flow, which is what a
network should predict here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError


def product(first: Tensor, second: Tensor) -> Tensor:
    """[n, n, ...] times [n, n, ...]."""
    return torch.einsum("ij...,jk...->ik...", first, second)


def apply(matrix: Tensor, parts: Tensor) -> Tensor:
    """[n, n, ...] to a state's parts [B, n, ...]."""
    return torch.einsum("ij...,bj...->bi...", matrix, parts)


@dataclasses.dataclass(frozen=True)
class Process:
    """What all processes share; `last_time` is the largest time at which it is defined."""

    last_time: ClassVar[float] = 1.0

    def transition(self, t: float, s: float) -> Tensor:
        """Psi: what the drift alone makes at time s of a state at time t; either may be the larger."""
        raise NotImplementedError

    def root(self, t: float, variance: float | Tensor = 0.0) -> Tensor:
        """R of the process; of pictures of this variance around a mean, if that is given."""
        raise NotImplementedError

    def lifted(self, x0: Tensor) -> Tensor:
        """The mean state of a clean picture [B, C, H, W]."""
        raise NotImplementedError

    def parts(self, x: Tensor) -> Tensor:
        """Parts [B, n, ...] of a state as networks see it [B, n C, H, W], in the basis of the matrices."""
        raise NotImplementedError

    def state(self, parts: Tensor) -> Tensor:
        """The inverse of `parts`."""
        raise NotImplementedError


@functools.lru_cache(maxsize=8)
def _cosines(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal discrete cosine transform (II), [frequency, place]."""
    with torch.inference_mode(False):  # a kept tensor may meet gradients later
        place = torch.arange(size, dtype=torch.float64) + 0.5
        basis = torch.cos(math.pi / size * torch.arange(size, dtype=torch.float64)[:, None] * place)
        basis *= math.sqrt(2.0 / size)
        basis[0] *= math.sqrt(0.5)
        return basis.to(device, dtype)


@dataclasses.dataclass(frozen=True)
class Blurring(Process):
    """Blurring diffusion (Hoogeboom and Salimans 2022, 2209.05557): pictures lose their high frequencies as they drown.

    In the cosine basis alpha of frequency (i, j) is the schedule's times (1 - least) e^{-w b(t)^2/2} + least, with w =
    (pi i/height)^2 + (pi j/width)^2 and b(t) = blur sin(pi t/2)^2 pixels; sigma is the schedule's at all of them. The
    state is the picture and a network predicts its noise as usual. With blur = 0 it is the schedule's diffusion.
    """

    schedule: Schedule
    height: int
    width: int
    blur: float = 20.0
    least: float = 0.001

    def __post_init__(self) -> None:
        if self.schedule.t_clean != 0.0 or not self.schedule.t_max <= 1.0:
            raise UserError(
                f"blurring takes a schedule whose times go from 0 to at most 1, such as cosine, vp or flow, and got "
                f"{self.schedule!r}."
            )
        if self.height < 1 or self.width < 1 or not self.blur >= 0.0 or not 0.0 < self.least <= 1.0:
            raise UserError(
                f"blurring got height={self.height!r}, width={self.width!r}, blur={self.blur!r} and "
                f"least={self.least!r}; give a size in pixels, blur of at least 0 and 0 < least <= 1."
            )

    def alpha(self, t: float) -> Tensor:
        """[height, width]."""
        across = (math.pi / self.width * torch.arange(self.width, dtype=torch.float64)).square()
        down = (math.pi / self.height * torch.arange(self.height, dtype=torch.float64)).square()
        blur = self.blur * math.sin(0.5 * math.pi * t) ** 2
        kept = self.least + (1.0 - self.least) * torch.exp(-0.5 * blur * blur * (down[:, None] + across))
        return kept * self.schedule.alpha(t)

    def transition(self, t: float, s: float) -> Tensor:
        return (self.alpha(s) / self.alpha(t))[None, None]

    def root(self, t: float, variance: float | Tensor = 0.0) -> Tensor:
        alpha, sigma = self.alpha(t), self.schedule.sigma(t)
        return torch.sqrt(alpha * alpha * variance + sigma * sigma)[None, None]

    def lifted(self, x0: Tensor) -> Tensor:
        return x0

    def parts(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.height, self.width):
            raise UserError(
                f"this process blurs pictures of {self.height} x {self.width} and got a state {list(x.shape)}; "
                "make one of that size."
            )
        down, across = (_cosines(size, x.device, x.dtype) for size in (self.height, self.width))
        return (down @ x @ across.T)[:, None]

    def state(self, parts: Tensor) -> Tensor:
        down, across = (_cosines(size, parts.device, parts.dtype) for size in (self.height, self.width))
        return down.T @ parts[:, 0] @ across


@functools.cache
def _gauss(count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre's points and weights on [0, 1]."""
    points, parts = map(torch.from_numpy, numpy.polynomial.legendre.leggauss(count))
    return 0.5 * (points + 1.0), 0.5 * parts


@dataclasses.dataclass(frozen=True)
class CriticallyDamped(Process):
    """Critically-damped Langevin diffusion (Dockhorn et al. 2021, 2112.07068): noise reaches the picture through a
    velocity, dx = beta v/M dt, dv = -beta (x + friction v/M) dt + sqrt(2 friction beta) dw, with M = friction^2/4.

    The state is picture and velocity, side by side in the channels [B, 2 C, H, W], and ends as N(0, 1) and N(0, M). The
    velocity starts as N(0, gamma M). `floor` is a variance that both have from the start besides: the published code of
    2206.05564 has 1e-6, and its networks predict by the R that starts there (0 is the process without, whose R ends
    a quarter of a radian apart).
    """

    beta: float = 4.0
    friction: float = 1.0
    gamma: float = 0.04
    floor: float = 1e-6

    def __post_init__(self) -> None:
        if not (self.beta > 0.0 and self.friction > 0.0 and self.gamma > 0.0 and self.floor >= 0.0):
            raise UserError(
                f"critically damped Langevin diffusion got beta={self.beta!r}, friction={self.friction!r}, gamma="
                f"{self.gamma!r} and floor={self.floor!r}; give numbers above 0 (floor: of at least 0)."
            )

    @property
    def rate(self) -> float:
        """Both eigenvalues of -drift/beta, at which everything decays."""
        return 2.0 / self.friction

    def transition(self, t: float, s: float) -> Tensor:
        # drift/beta + rate squares to zero
        rate, way = self.rate, self.beta * (s - t)
        turn = torch.tensor([[1.0 + rate * way, rate * rate * way], [-way, 1.0 - rate * way]], dtype=torch.float64)
        return math.exp(-rate * way) * turn

    def _covariance(self, way: Tensor, variance: float) -> tuple[Tensor, Tensor, Tensor]:
        """(xx, xv, vv) at `way` = beta t [K], of all noise so far, the first velocity and the first picture."""
        rate, reach = self.rate, way[:, None]
        points, parts = _gauss(32)
        behind = reach * torch.cat([points, torch.ones(2, dtype=torch.float64)])
        x, v = rate * rate * behind, 1.0 - rate * behind
        x[:, -1], v[:, -1] = 1.0 + rate * way, -way
        at_rest = 0.25 * self.gamma * self.friction**2 + self.floor, variance + self.floor
        start = torch.tensor(at_rest, dtype=torch.float64).expand(len(way), 2)
        weight = torch.cat([2.0 * self.friction * reach * parts, start], 1) * torch.exp(-2.0 * rate * behind)
        return (weight * x * x).sum(1), (weight * x * v).sum(1), (weight * v * v).sum(1)

    def root(self, t: float, variance: float | Tensor = 0.0) -> Tensor:
        """Cholesky's factor times the rotation by the integral of rate^2 L_vv/L_xx, which R's equation asks of it."""
        rate, way, given = self.rate, self.beta * t, float(variance)
        points, parts = _gauss(160)
        # in sqrt(way): L_xx is of the order of way where it starts at zero
        xx, xv, vv = self._covariance(way * torch.cat([points * points, torch.ones(1, dtype=torch.float64)]), given)
        free = torch.sqrt((xx * vv - xv * xv).clamp(min=0.0))  # the root of the determinant
        angle = 2.0 * way * rate * rate * float((free / xx)[:-1] @ (parts * points)) if way > 0.0 else 0.0
        first = math.sqrt(float(xx[-1]))
        if first > 0.0:
            lower = [[first, 0.0], [float(xv[-1]) / first, float(free[-1]) / first]]
        else:
            lower = [[0.0, 0.0], [0.0, math.sqrt(float(vv[-1]))]]
        turned = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        return torch.tensor(lower, dtype=torch.float64) @ torch.tensor(turned, dtype=torch.float64)

    def lifted(self, x0: Tensor) -> Tensor:
        return torch.cat([x0, torch.zeros_like(x0)], 1)

    def parts(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            raise UserError(
                f"this process has a picture and a velocity side by side and got a state {list(x.shape)}; "
                "give it twice the picture's channels."
            )
        return x.unflatten(1, (2, -1))

    def state(self, parts: Tensor) -> Tensor:
        return parts.flatten(1, 2)
