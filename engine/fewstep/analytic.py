"""Gaussian and Gaussian-mixture data, where the optimal denoiser, the probability-flow map and the consistency
function are known.

Oracles for this package's tests and for anyone who writes a method. Data are [B, D] or [B, C, H, W]; `cond` is int64
[B] naming a component of the mixture, and its null (= the number of components) means the whole mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion import prediction as predictions
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.processes import Process, apply
from fewstep.diffusion.real import Real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError


def _spread(value: Real, x: Tensor) -> Tensor:
    """A number or [B] as [B or 1, 1, ...] against x [B, ...]."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return value.reshape(-1, *(1,) * (x.ndim - 1))


class _Data:
    """What Gaussian and Mixture share: everything that follows from `denoise` and `flow_map`."""

    components: int

    def denoise(self, x: Tensor, alpha: Real, sigma: Real, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x] for x = alpha x0 + sigma eps; alpha, sigma floats or [B]."""
        raise NotImplementedError

    def flow_map(self, x: Tensor, schedule: Schedule, t: Real, s: Real, cond: Tensor | None = None) -> Tensor:
        """The probability-flow ODE's state at time s from x at time t; t, s floats or [B], either may be the larger."""
        raise NotImplementedError

    def sample(self, count: int, generator: torch.Generator | None = None, cond: Tensor | None = None) -> Tensor:
        """[count, ...] draws in float64."""
        raise NotImplementedError

    def consistency(self, x: Tensor, schedule: Schedule, t: Real, cond: Tensor | None = None) -> Tensor:
        """The exact consistency function: where the path through x at time t is clean."""
        return self.flow_map(x, schedule, t, schedule.t_clean, cond)

    def null(self, cond: Tensor) -> Tensor:
        return torch.full_like(cond, self.components)

    def teacher(self, schedule: Schedule, prediction: str | Prediction = "x0") -> Denoiser:
        """The optimal denoiser as a Denoiser whose network answers in the given prediction type."""
        kind = predictions.get(prediction)
        if kind.boundary is not None:
            raise UserError(
                f"a teacher denoises and cannot have boundary={kind.boundary!r}; use student(), or boundary=None."
            )
        return Denoiser(AnalyticNetwork(self, schedule, kind, target=None), schedule, kind)

    def student(self, schedule: Schedule, prediction: str | Prediction = "x0") -> Denoiser:
        """The exact consistency function as a Denoiser: its read-out is the path's state at the prediction's
        boundary, or clean.
        """
        kind = predictions.get(prediction)
        target = schedule.t_clean if kind.boundary is None else kind.boundary
        return Denoiser(AnalyticNetwork(self, schedule, kind, target), schedule, kind)


class Gaussian(_Data):
    """N(mean, std^2 I). `mean` is a number or a tensor shaped like one sample; `cond` is accepted and changes
    nothing.
    """

    components = 1

    def __init__(self, mean: float | Tensor, std: float) -> None:
        if not std > 0:
            raise UserError(f"a Gaussian got std={std!r}; give a number above 0.")
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.std = float(std)

    def denoise(self, x: Tensor, alpha: Real, sigma: Real, cond: Tensor | None = None) -> Tensor:
        a, s, mean = _spread(alpha, x), _spread(sigma, x), self.mean.to(x)
        variance = a * a * self.std**2 + s * s
        return mean + a * self.std**2 / variance * (x - a * mean)

    def flow_map(self, x: Tensor, schedule: Schedule, t: Real, s: Real, cond: Tensor | None = None) -> Tensor:
        """alpha_s m + sqrt(q_s/q_t) (x - alpha_t m), q = alpha^2 std^2 + sigma^2."""
        at, st = _spread(schedule.alpha(t), x), _spread(schedule.sigma(t), x)
        to, so = _spread(schedule.alpha(s), x), _spread(schedule.sigma(s), x)
        ratio = torch.sqrt((to * to * self.std**2 + so * so) / (at * at * self.std**2 + st * st))
        mean = self.mean.to(x)
        return to * mean + ratio * (x - at * mean)

    def sample(self, count: int, generator: torch.Generator | None = None, cond: Tensor | None = None) -> Tensor:
        shape = self.mean.shape or (1,)
        return self.mean + self.std * torch.randn(count, *shape, generator=generator, dtype=torch.float64)


class Mixture(_Data):
    """sum_k weights_k N(means_k, stds_k^2 I); means [K, ...]."""

    def __init__(
        self, weights: Sequence[float] | Tensor, means: Sequence[Any] | Tensor, stds: Sequence[float] | Tensor
    ) -> None:
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)
        self.components = len(self.weights)
        if self.weights.shape != self.stds.shape or len(self.means) != self.components or self.means.ndim < 2:
            raise UserError(
                f"a mixture needs weights [K], means [K, ...] and stds [K]; got {list(self.weights.shape)}, "
                f"{list(self.means.shape)} and {list(self.stds.shape)}."
            )
        if not (bool((self.weights > 0).all()) and bool((self.stds > 0).all())):
            raise UserError("a mixture's weights and stds must be above 0.")
        self.weights = self.weights / self.weights.sum()

    def posterior(
        self, x: Tensor, alpha: Real, sigma: Real, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(responsibilities [B, K], x - alpha mean_k [B, K, ...], variances of x [B, K])."""
        a, s = (torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, 1) for v in (alpha, sigma))
        means, stds, weights = self.means.to(x), self.stds.to(x), self.weights.to(x)
        offsets = x[:, None] - a.reshape(-1, 1, *(1,) * (x.ndim - 1)) * means
        variances = a * a * stds * stds + s * s
        numbers = math.prod(x.shape[1:])
        scores = weights.log() - 0.5 * numbers * variances.log() - 0.5 * offsets.flatten(2).square().sum(-1) / variances
        if cond is not None:
            kept = (cond[:, None] == torch.arange(self.components, device=x.device)) | (
                cond[:, None] == self.components
            )
            scores = scores.masked_fill(~kept, -math.inf)
        return torch.softmax(scores, dim=1), offsets, variances.expand(len(x), -1)

    def denoise(self, x: Tensor, alpha: Real, sigma: Real, cond: Tensor | None = None) -> Tensor:
        shares, offsets, variances = self.posterior(x, alpha, sigma, cond)
        gains = torch.as_tensor(alpha, dtype=x.dtype, device=x.device).reshape(-1, 1) * self.stds.to(x) ** 2 / variances
        means = self.means.to(x)
        inner = (None,) * (x.ndim - 1)
        return (shares[..., *inner] * (means + gains[..., *inner] * offsets)).sum(1)

    def noise(self, x: Tensor, alpha: Real, sigma: Real, cond: Tensor | None = None) -> Tensor:
        """E[eps | x], without dividing by sigma."""
        shares, offsets, variances = self.posterior(x, alpha, sigma, cond)
        inner = (None,) * (x.ndim - 1)
        return _spread(sigma, x) * ((shares / variances)[..., *inner] * offsets).sum(1)

    def flow_map(
        self, x: Tensor, schedule: Schedule, t: Real, s: Real, cond: Tensor | None = None, steps: int = 400
    ) -> Tensor:
        """Classical Runge-Kutta of order 4 in float64, in the angle theta = atan(sigma/(alpha scale)).

        There the ODE is dx/dtheta = -sin(theta) E[x0|x] + scale cos(theta) E[eps|x], smooth down to sigma = 0.
        """
        wide = x.double()
        scale = self._scale()

        def place(time: Real) -> tuple[Tensor, Tensor]:
            time = time.double() if isinstance(time, Tensor) else torch.tensor(float(time), dtype=torch.float64)
            alpha, sigma = schedule.alpha(time), schedule.sigma(time)
            assert isinstance(alpha, Tensor) and isinstance(sigma, Tensor)
            angle = torch.atan2(sigma, alpha * scale).to(x.device)
            return angle.expand(len(x)), torch.hypot(alpha, sigma / scale).to(x.device).expand(len(x))

        def slope(state: Tensor, theta: Tensor) -> Tensor:
            alpha, sigma = torch.cos(theta), scale * torch.sin(theta)
            return scale * _spread(alpha, state) * self.noise(state, alpha, sigma, cond) - _spread(
                torch.sin(theta), state
            ) * self.denoise(state, alpha, sigma, cond)

        (theta, norm), (theta_to, norm_to) = place(t), place(s)
        wide = wide / _spread(norm, wide)
        change = (theta_to - theta) / steps
        h = _spread(change, wide)
        for i in range(steps):
            now = theta + i * change
            k1 = slope(wide, now)
            k2 = slope(wide + 0.5 * h * k1, now + 0.5 * change)
            k3 = slope(wide + 0.5 * h * k2, now + 0.5 * change)
            k4 = slope(wide + h * k3, now + change)
            wide = wide + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        return (wide * _spread(norm_to, wide)).to(x.dtype)

    def sample(self, count: int, generator: torch.Generator | None = None, cond: Tensor | None = None) -> Tensor:
        picked = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        if cond is not None:
            picked = torch.where(cond == self.components, picked, cond)
        shape = self.means.shape[1:]
        noise = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        return self.means[picked] + self.stds[picked].reshape(-1, *(1,) * len(shape)) * noise

    def _scale(self) -> float:
        """The data's overall standard deviation per number."""
        weights = self.weights.reshape(-1, *(1,) * (self.means.ndim - 1))
        centre = (weights * self.means).sum(0)
        between = (weights * (self.means - centre).square()).sum(0).mean()
        return float((between + (self.weights * self.stds.square()).sum()).sqrt())


class AnalyticNetwork(nn.Module):
    """The network F(x_scaled, t_net, cond) whose read-out is exact: E[x0|x], or the flow map to time `target`."""

    def __init__(self, data: _Data, schedule: Schedule, prediction: Prediction, target: float | None) -> None:
        super().__init__()
        self.data, self.schedule, self.prediction, self.target = data, schedule, prediction, target

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        time = self.time(t)
        x = x / _spread(self.prediction.input_scale(self.schedule, time), x)
        if self.target is None:
            answer = self.data.denoise(x, self.schedule.alpha(time), self.schedule.sigma(time), cond)
        else:
            answer = self.data.flow_map(x, self.schedule, time, self.target, cond)
        of_x, of_output = self.prediction.coefficients(self.schedule, time)
        of_output = _spread(of_output, x)
        free = of_output == 0  # at the boundary the read-out is x whatever the network says
        return torch.where(
            free, torch.zeros_like(x), (answer - _spread(of_x, x) * x) / torch.where(free, 1.0, of_output)
        )

    def time(self, told: Tensor) -> Tensor:
        """Schedule time from the network's own."""
        time = self.prediction.time_of_network_time(self.schedule, told)
        assert isinstance(time, Tensor)
        return time

    def null(self, cond: Tensor) -> Tensor:
        return self.data.null(cond)


class ProcessTeacher:
    """Pictures N(mean, variance) under a process (fewstep.diffusion.processes): its score, its eps, its flow's map.

    mean [C, H, W] is of the picture, variance of its parts: one number, or [H, W] for the frequencies of `Blurring`.
    `score` and `eps` are networks as a sampler of `solvers.gddim` asks them, at one time for the whole batch.
    """

    def __init__(self, process: Process, mean: Tensor, variance: float | Tensor) -> None:
        self.process, self.mean, self.variance = process, mean.double(), variance

    def score(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """-P^-1 (u - Psi(0, t) u_0) with P = R R^T, R the root of the pictures' own covariance."""
        time = float(t.flatten()[0])
        return -self.process.state(apply(self._inverse(time).transpose(0, 1).to(x), self._whitened(x, time)))

    def eps(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """-R^T score, R the process's own (2206.05564, section 3)."""
        root = self.process.root(float(t.flatten()[0])).to(x)
        return -self.process.state(apply(root.transpose(0, 1), self.process.parts(self.score(x, t))))

    def flow_map(self, x: Tensor, t: float, s: float) -> Tensor:
        """The probability flow's state at time s from x at time t: R^-1 (u - Psi(0, t) u_0) stays as it is."""
        moved = apply(self.process.root(s, self.variance).to(x), self._whitened(x, t))
        return self.process.state(moved + self._centre(x, s))

    def _whitened(self, x: Tensor, t: float) -> Tensor:
        return apply(self._inverse(t).to(x), self.process.parts(x) - self._centre(x, t))

    def _inverse(self, t: float) -> Tensor:
        root = self.process.root(t, self.variance)
        return torch.linalg.inv(root.movedim((0, 1), (-2, -1))).movedim((-2, -1), (0, 1))

    def _centre(self, x: Tensor, t: float) -> Tensor:
        start = self.process.parts(self.process.lifted(self.mean.to(x)[None]))
        return apply(self.process.transition(0.0, t).to(x), start)
