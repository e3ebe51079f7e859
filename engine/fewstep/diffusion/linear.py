"""Rows of coefficients to tensors, and the one linear map they go through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.diffusion.real import Real
from fewstep_kernels import lincomb


def matrix(rows: Sequence[Sequence[Real]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[M, K] if every coefficient is a float, [B, M, K] if any is a tensor [B] (or a tensor [])."""
    tensors = [value for row in rows for value in row if isinstance(value, Tensor)]
    if not tensors:
        return torch.tensor([[float(value) for value in row] for row in rows], device=device, dtype=dtype)
    shape = torch.broadcast_shapes(*(value.shape for value in tensors))
    columns = [
        value.to(dtype).expand(shape) if isinstance(value, Tensor) else tensors[0].new_full(shape, value, dtype=dtype)
        for row in rows
        for value in row
    ]
    return torch.stack(columns, dim=-1).unflatten(-1, (len(rows), len(rows[0])))


def combine(inputs: Sequence[Tensor], rows: Sequence[Sequence[Real]]) -> tuple[Tensor, ...]:
    """outputs = rows @ inputs, one per row; coefficients are floats or tensors [B]. Differentiable in both."""
    return lincomb(inputs, matrix(rows, inputs[0].device, coefficient_dtype(*inputs)))


def coefficient_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: what the accumulation needs."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
