"""Frechet distance between Gaussians fitted to features.  Heusel et al. 2017, arXiv:1706.08500, equation (6).

    d(a, b) = |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2

All in float64; the trace comes from the eigenvalues of the symmetric product, so no complex square root appears. A
distance on few samples is mostly bias (arXiv:1911.07023): compare sets of one size only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Mean [..., D] and covariance [..., D, D] in float64, and how many rows they are of."""

    mean: Tensor
    covariance: Tensor
    count: int


def moments(features: Tensor) -> Moments:
    """Moments of features [N, D], with the unbiased covariance. Raises UserError for N < 2 or values not finite."""
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"features of shape {list(features.shape)} have no covariance; give [N, D] with N at least 2.")
    features = features.double()
    if not features.isfinite().all():
        raise UserError("the features hold values that are not finite; look at the images they come from.")
    return Moments(features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1), len(features))


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of [..., D, D]; eigenvalues below zero by rounding count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT


def frechet_distance(a: Moments | Tensor, b: Moments | Tensor) -> float:
    """The distance between two sets, each given as features [N, D] or as Moments; 0 for equal moments."""
    a, b = (each if isinstance(each, Moments) else moments(each) for each in (a, b))
    return float(distances(a.mean, a.covariance, b, square_root(b.covariance)))


def distances(mean: Tensor, covariance: Tensor, reference: Moments, root: Tensor) -> Tensor:
    """Distances [...] of moments, mean [..., D] and covariance [..., D, D], to one reference with its square root."""
    product = root @ covariance @ root
    values = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0)
    traces = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + reference.covariance.trace()
    distance = (mean - reference.mean).square().sum(-1) + traces - 2 * values.sqrt().sum(-1)
    return distance.clamp(min=0)
