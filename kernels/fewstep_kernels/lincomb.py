"""Linear combinations of K tensors, M at a time: `out[m] = sum_k coefficients[(b,) m, k] inputs[k]`, optionally plus drawn noise.

Bytes moved at best: each input read once, each output written once; the noise costs none. Accumulation is float32 (float64 when any input is
float64), in the order of the inputs. It does not help where a compiler already fuses the expression: there the reference is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import check_seeds, normal_reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def reference(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    noise_seeds: Tensor | None = None,
    noise_stream: int = 0,
    dtypes: Sequence[torch.dtype] = (),
) -> list[Tensor]:
    """The defining implementation, in plain torch operations. dtypes: one per output row."""
    first = inputs[0]  # [B, ...]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    terms = [x.to(wide) for x in inputs]
    if noise_seeds is not None:
        terms.append(normal_reference(noise_seeds, math.prod(first.shape[1:]), noise_stream, wide).view(first.shape))
    table = coefficients.to(wide)
    if table.ndim == 3:
        table = table.movedim(0, -1)  # [M, K, B]
        table = table[(..., *(None,) * (first.ndim - 1))]  # [M, K, B, 1, ...]
    outputs = []
    for m, dtype in enumerate(dtypes):
        total = table[m, 0] * terms[0]
        for k, term in enumerate(terms[1:], 1):
            total = total + table[m, k] * term
        outputs.append(total.to(dtype))
    return outputs


def _check(inputs, coefficients, noise_seeds, noise_stream, out, dtypes) -> None:
    if not inputs:
        raise ValueError("lincomb takes at least one input tensor; got none.")
    first = inputs[0]
    for x in inputs:
        if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"lincomb takes float32, bfloat16, float16 or float64 tensors; got {given}.")
        if x.shape != first.shape or x.ndim == 0:
            raise ValueError(f"lincomb takes inputs of one shape [B, ...]; got {[list(x.shape) for x in inputs]}.")
    if not isinstance(coefficients, Tensor) or not coefficients.is_floating_point():
        raise TypeError("lincomb takes its coefficients as a floating-point tensor [M, K] or [B, M, K].")
    columns = len(inputs) + (noise_seeds is not None)
    batch = first.shape[0]
    if coefficients.ndim not in (2, 3) or coefficients.shape[-1] != columns:
        noise = " and the drawn noise" if noise_seeds is not None else ""
        raise ValueError(
            f"lincomb takes coefficients [M, {columns}] or [{batch}, M, {columns}] for {len(inputs)} inputs{noise}; "
            f"got {list(coefficients.shape)}."
        )
    if coefficients.ndim == 3 and coefficients.shape[0] != batch:
        raise ValueError(f"per-sample coefficients must have {batch} samples; got {list(coefficients.shape)}.")
    rows = coefficients.shape[-2]
    if noise_seeds is not None:
        check_seeds(noise_seeds, noise_stream)
        if noise_seeds.shape[0] != batch:
            raise ValueError(f"noise_seeds must hold one seed for each of {batch} samples; got {len(noise_seeds)}.")
    if dtypes is not None and (len(dtypes) != rows or any(d not in _FLOATS for d in dtypes)):
        raise ValueError(f"dtypes must name one floating-point dtype for each of {rows} outputs; got {list(dtypes)}.")
    if out is not None and (len(out) != rows or any(o.shape != first.shape or o.dtype not in _FLOATS for o in out)):
        raise ValueError(
            f"out must hold {rows} floating-point tensors of shape {list(first.shape)}; got {[list(o.shape) for o in out]}."
        )


def lincomb(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    *,
    noise_seeds: Tensor | None = None,
    noise_stream: int = 0,
    out: Sequence[Tensor] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> tuple[Tensor, ...]:
    """M linear combinations of K tensors in one pass.

    inputs: K tensors of one shape [B, ...], any mix of floating dtypes and layouts. coefficients: [M, K] or [B, M, K]; with noise_seeds
    (int64 [B]) one more, last, column for standard normal noise, equal to `normal(noise_seeds, shape, stream=noise_stream)`.
    out: M tensors to write, which may be inputs; dtypes: the outputs' (default: out's, else the inputs' promoted dtype).
    Differentiable in inputs and coefficients, forward and reverse. Raises TypeError/ValueError naming what does not fit.
    """
    _check(inputs, coefficients, noise_seeds, noise_stream, out, dtypes)
    if out is not None:
        dtypes = [o.dtype for o in out]
    elif dtypes is None:
        dtypes = [functools.reduce(torch.promote_types, (x.dtype for x in inputs))] * coefficients.shape[-2]
    outputs = reference(inputs, coefficients, noise_seeds, noise_stream, dtypes)
    if out is not None:
        for target, value in zip(out, outputs):
            target.copy_(value)
        return tuple(out)
    return tuple(outputs)
