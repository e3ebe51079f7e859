"""Per-sample inner products: `result[b, m, k] = sum_i left[m][b, i] right[k][b, i]`.

What the gradient of `lincomb`'s coefficients needs. Every sample by itself; results in float32, float64 when any tensor
is float64. Bytes moved at best: each tensor read once (C++ reads each left tensor again for every right one, from
cache).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, layout, native, registration


def _wide(left: Sequence[Tensor], right: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in (*left, *right)) else torch.float32


def reference(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The defining implementation, in plain torch operations."""
    wide = _wide(left, right)
    a = torch.stack([x.flatten(1).to(wide) for x in left], 1)  # [B, M, N]
    b = torch.stack([x.flatten(1).to(wide) for x in right], 1)  # [B, K, N]
    return a @ b.transpose(1, 2)


def _call_c(left: Sequence[Tensor], right: Sequence[Tensor], out: Tensor) -> None:
    read, _ = layout.match([*left, *right], [torch.empty_like(left[0])])
    values: list[int] = []
    for x in read:
        values += (x.data_ptr(), x.stride(0), native.DTYPES[x.dtype])
    batch, count = left[0].shape[0], math.prod(left[0].shape[1:])
    tensors = native.table(values)
    native.call(
        "inner_products", out, len(left), len(right), batch, count, tensors, out.data_ptr(), native.DTYPES[out.dtype]
    )


def _inner_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    usable = backends.choose("inner_products", left[0].device.type)[0] == "cpu" and left[0].numel() > 0
    if not usable or any(x.dtype not in native.DTYPES for x in (*left, *right)):
        return reference(left, right)
    out = _empty(left, right)
    _call_c(left, right, out)
    return out


def _empty(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return left[0].new_empty((left[0].shape[0], len(left), len(right)), dtype=_wide(left, right))


_raw = registration.define("_inner_products(Tensor[] left, Tensor[] right) -> Tensor", _inner_products, _empty)


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """All inner products of M and K tensors of one shape [B, ...], per sample: [B, M, K], float32 (float64 if any is).

    Differentiable. Raises ValueError when a list is empty or shapes differ.
    """
    if not left or not right:
        raise ValueError(f"inner_products takes at least one tensor on each side; got {len(left)} and {len(right)}.")
    shapes = {tuple(x.shape) for x in (*left, *right)}
    if len(shapes) > 1 or () in shapes:
        raise ValueError(f"inner_products takes tensors of one shape [B, ...]; got {sorted(shapes)}.")
    if registration.tracing() or registration.differentiating((*left, *right)):
        return reference(left, right)
    return _raw(list(left), list(right))
