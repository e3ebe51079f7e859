"""How sure is a difference of two Frechet distances?  Paired bootstrap intervals (Efron and Tibshirani 1993, ch. 13).

Samples are drawn anew with replacement by multinomial weights. Two generated sets of one size get the same weights,
so sets made from the same noise and labels are resampled in pairs and what they share cancels. The reference set
stays as it is: intervals speak of this held-out set. Resampling adds a bias of its own, the same for each draw;
intervals are centred on the estimate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluate.frechet import Moments, distances, frechet_distance, moments, square_root

RESAMPLES = 200
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Resampled:
    """A set's distance to the reference, and the distances [R] of its resamples."""

    estimate: float
    draws: Tensor
    count: int
    seed: int


@dataclass(frozen=True)
class Comparison:
    """Distances of sets a and b, their difference a - b and ratio a / b, each with its interval."""

    a: float
    b: float
    difference: float
    difference_interval: list[float]
    ratio: float
    ratio_interval: list[float]
    confidence: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def resample(features: Tensor, reference: Moments | Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Distances of `resamples` bootstrap draws of features [N, D] to the reference."""
    reference = reference if isinstance(reference, Moments) else moments(reference)
    estimate = frechet_distance(features, reference)
    count, size = features.shape
    generator = torch.Generator().manual_seed(seed)
    centred = features.double() - features.double().mean(0)  # small numbers, so the second moments lose nothing
    weights = _multinomial(count, resamples, generator)  # [R, N]
    mean = weights @ centred / count
    rows, columns = torch.triu_indices(size, size)
    second = torch.zeros(resamples, len(rows), dtype=torch.float64)
    single = weights.float()  # whole numbers, exact; products in float32 err by 1e-7, far below the spread of the draws
    for start in range(0, count, 2000):
        chunk = centred[start : start + 2000].float()
        second += single[:, start : start + 2000] @ (chunk[:, rows] * chunk[:, columns])
    covariance = torch.empty(resamples, size, size, dtype=torch.float64)
    covariance[:, rows, columns] = covariance[:, columns, rows] = second / count
    covariance = (covariance - mean[:, :, None] * mean[:, None, :]) * (count / (count - 1))
    draws = distances(mean + features.double().mean(0), covariance, reference, square_root(reference.covariance))
    return Resampled(estimate, draws, count, seed)


def _multinomial(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    weights = torch.empty(resamples, count, dtype=torch.float64)
    for row in range(resamples):
        drawn = torch.randint(count, (count,), generator=generator)
        weights[row] = torch.bincount(drawn, minlength=count)
    return weights


def compare(a: Resampled, b: Resampled, confidence: float = CONFIDENCE) -> Comparison:
    """The paired comparison of two sets. Raises UserError where they were not resampled alike."""
    if (a.count, a.seed, len(a.draws)) != (b.count, b.seed, len(b.draws)):
        raise UserError(
            f"sets of {a.count} and {b.count} samples were not resampled alike; give equal sizes, seeds and resamples."
        )
    difference, ratio = a.estimate - b.estimate, a.estimate / max(b.estimate, 1e-12)
    return Comparison(
        a.estimate,
        b.estimate,
        difference,
        _interval(difference, a.draws - b.draws, confidence),
        ratio,
        _interval(ratio, a.draws / b.draws.clamp(min=1e-12), confidence),
        confidence,
    )


def _interval(estimate: float, draws: Tensor, confidence: float) -> list[float]:
    tail = (1 - confidence) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    shift = estimate - draws.mean().item()
    return [low + shift, high + shift]
