"""Per-sample inner products: `result[b, m, k] = sum_i left[m][b, i] right[k][b, i]`, what the gradient of `lincomb`'s coefficients needs.

Accumulated in float32 (float64 when any tensor is float64), every sample by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    wide = torch.float64 if any(x.dtype == torch.float64 for x in (*left, *right)) else torch.float32
    a = torch.stack([x.flatten(1).to(wide) for x in left], 1)  # [B, M, N]
    b = torch.stack([x.flatten(1).to(wide) for x in right], 1)  # [B, K, N]
    return a @ b.transpose(1, 2)


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """All inner products of M and K tensors of one shape [B, ...], per sample: [B, M, K], float32 (float64 if any is).

    Raises ValueError when a list is empty or shapes differ.
    """
    if not left or not right:
        raise ValueError(f"inner_products takes at least one tensor on each side; got {len(left)} and {len(right)}.")
    shapes = {tuple(x.shape) for x in (*left, *right)}
    if len(shapes) > 1 or not next(iter(shapes)):
        raise ValueError(f"inner_products takes tensors of one shape [B, ...]; got {sorted(shapes)}.")
    return reference(left, right)
