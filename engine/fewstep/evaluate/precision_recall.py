"""Fidelity and diversity as two numbers.  Kynkaanniemi et al. 2019, arXiv:1904.06991, equations (1) and (2).

Precision: the share of generated samples inside the real manifold; recall: the share of real samples inside the
generated one. A manifold is the union of balls around its points reaching to their k-th neighbour, so both depend
on the number of points: the sets are compared at equal sizes, in as many disjoint folds of the generated set as
there are, and averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import UserError

NEIGHBOURS = 3
MOST_FOLDS = 10


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall) of generated features [N, D] against real ones [M, D], N >= M; the mean over folds of M."""
    size = len(real)
    folds = min(len(generated) // size, MOST_FOLDS)
    if not folds or size <= neighbours:
        raise UserError(
            f"precision and recall need as many generated as real samples and more than {neighbours}; "
            f"got {len(generated)} and {size}."
        )
    real_radius = _radius(real, neighbours)
    precision = recall = 0.0
    for fold in generated[: folds * size].view(folds, size, -1):
        distance = torch.cdist(fold, real)  # [M generated, M real]
        precision += (distance <= real_radius[None]).any(1).float().mean().item()
        recall += (distance <= _radius(fold, neighbours)[:, None]).any(0).float().mean().item()
    return precision / folds, recall / folds


def _radius(points: Tensor, neighbours: int) -> Tensor:
    """Distance of each point [M, D] to its k-th nearest other one, [M]."""
    distance = torch.cdist(points, points).fill_diagonal_(float("inf"))
    return distance.kthvalue(neighbours, dim=1).values


def diversity(generated: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> float:
    """Variance of the features within a class, as a ratio to the real one, averaged over the classes; 1 is like life.

    generated [N, D] with labels [N], real [M, D] with real_labels [M]; classes with under two of either are left out.
    """
    ratios = []
    for label in real_labels.unique():
        ours, theirs = generated[labels == label], real[real_labels == label]
        if len(ours) > 1 and len(theirs) > 1:
            ratios.append((ours.double().var(0).sum() / theirs.double().var(0).sum()).item())
    if not ratios:
        raise UserError("no class has two generated and two real samples; draw more samples for each class.")
    return sum(ratios) / len(ratios)
