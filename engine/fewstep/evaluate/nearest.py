"""Has the sampler replayed its training set?  A nearest-neighbour check, which a Frechet distance cannot replace.

Each sample x gets the ratio r(x) = d(x, nearest training image) / d(x, nearest held-out image), in pixels. Unseen
real images, the held-out ones with themselves left out, give the ratios to expect of a sampler that generalises:
the 1% quantile of theirs is the threshold below which a sample counts as copied. A replayed image has ratio 0, one
with a little noise nearly so, and an image typical of its class, close to both sets alike, is not accused. In the
spirit of Meehan et al. 2020, arXiv:2004.05675.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

QUANTILE = 0.01
ALLOWED = 0.05


@dataclass(frozen=True)
class Copying:
    """copied: share of samples below `threshold`; passes: no more than ALLOWED of them."""

    copied: float
    threshold: float
    median_ratio: float
    real_median_ratio: float
    passes: bool

    def to_dict(self) -> dict[str, float | bool]:
        return asdict(self)


def nearest_distance(points: Tensor, among: Tensor, *, leave_self_out: bool = False) -> Tensor:
    """Euclidean distance [N] of each of points [N, ...] to the nearest of `among` [M, ...], computed in chunks."""
    points, among = points.flatten(1).float(), among.flatten(1).float()
    nearest = []
    for start in range(0, len(points), 2000):
        chunk = points[start : start + 2000]
        distance = torch.cdist(chunk, among, compute_mode="use_mm_for_euclid_dist")
        if leave_self_out:
            rows = torch.arange(len(chunk))
            distance[rows, start + rows] = float("inf")
        # finding the neighbour by |x|^2 + |y|^2 - 2xy is fast but leaves 1e-3 where a copy must give 0: measure it anew
        nearest.append((chunk - among[distance.argmin(1)]).square().sum(1).sqrt())
    return torch.cat(nearest)


def copying(generated: Tensor, train: Tensor, held_out: Tensor) -> Copying:
    """Judge generated images [N, C, H, W] against the training and the held-out images."""
    real = _ratio(nearest_distance(held_out, train), nearest_distance(held_out, held_out, leave_self_out=True))
    ratio = _ratio(nearest_distance(generated, train), nearest_distance(generated, held_out))
    threshold = real.quantile(QUANTILE)
    copied = (ratio < threshold).double().mean().item()
    return Copying(copied, threshold.item(), ratio.median().item(), real.median().item(), copied <= ALLOWED)


def _ratio(to_train: Tensor, to_held_out: Tensor) -> Tensor:
    return to_train / to_held_out.clamp(min=1e-12)
