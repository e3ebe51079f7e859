"""Exact stand-ins: networks with a handful of parameters, and draws whose first and second moments are exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.methods import Batch

MEAN, STD = 0.3, 0.5


def time_column(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (x.dim() - 1))


class Affine(nn.Module):
    """slope x + intercept, whatever the time; scaled so that a standard normal start of std `scale` counts as unit."""

    def __init__(self, slope: float, intercept: float, schedule=None, prediction=None, scale: float = 1.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.intercept = nn.Parameter(torch.tensor(intercept, dtype=torch.float64))
        self.schedule, self.prediction, self.scale = schedule, prediction, scale

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        return self.slope * x / self.scale + self.intercept


class GaussianDenoiser(nn.Module):
    """The posterior mean, mean + alpha std^2 / (alpha^2 std^2 + sigma^2) (x - alpha mean), under N(mean, std^2).

    The law is a live function: the exact critic of a student that moves.
    """

    def __init__(self, law, schedule, prediction=None) -> None:
        super().__init__()
        self.law, self.schedule, self.prediction = law, schedule, prediction
        self.never_used = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        mean, std = self.law(cond)
        alpha, sigma = (time_column(v, x) for v in (self.schedule.alpha(t), self.schedule.sigma(t)))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean) + 0 * self.never_used

    def null(self, cond: Tensor) -> Tensor:
        return torch.full_like(cond, 2)


class Moments:
    """An `Rng` whose draws over the four samples have mean 0, variance 1 and no correlation between purposes, exactly.

    Sums of squares and products of two Gaussians have then their exact expectation, so gradients that are quadratic in
    the draws can be held to closed forms without Monte-Carlo error.
    """

    patterns = ((1.0, 1.0, -1.0, -1.0), (1.0, -1.0, 1.0, -1.0), (1.0, -1.0, -1.0, 1.0))

    def __init__(self, step: int = 0, order: tuple[str, ...] = (), quantile: float = 0.5) -> None:
        self.step, self.order, self.quantile = step, order, quantile

    def normal(self, like: Tensor, purpose: str) -> Tensor:
        pattern = torch.tensor(self.patterns[self.order.index(purpose)], dtype=torch.float64)
        return pattern[:, None].expand(like.shape).clone()

    def uniform(self, batch, purpose: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.full((4,), low + (high - low) * self.quantile, dtype=torch.float64)

    def same_for_all(self, low: int, high: int, purpose: str = "branch") -> int:
        return low

    def seeds(self, purpose: str) -> Tensor:
        return torch.arange(4)


def design_batch(mean: float = MEAN, std: float = STD, cond: Tensor | None = None) -> Batch:
    """Four data points of mean `mean` and variance `std`^2, in the first pattern."""
    x0 = mean + std * torch.tensor(Moments.patterns[0], dtype=torch.float64)[:, None]
    return Batch(index=torch.arange(4), x0=x0, cond=cond)


def gradients(loss: Tensor, module: nn.Module) -> Tensor:
    """d loss / d (parameters of `module`), flat."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found)])


def root_of_gradient(loss, module: nn.Module) -> Tensor:
    """Where an affine gradient vanishes: the minimiser of a quadratic loss, or of one with stopped targets."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().flatten() for p in parameters])

    def gradient(values: Tensor) -> Tensor:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(values, parameters)
        return gradients(loss(), module)

    constant = gradient(torch.zeros_like(flat))
    columns = [gradient(unit) - constant for unit in torch.eye(len(flat), dtype=flat.dtype)]
    root = torch.linalg.lstsq(torch.stack(columns, 1), -constant[:, None], driver="gelsd").solution[:, 0]
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(root, parameters)
    return root
