"""Linear combinations of K tensors, M at a time: `out[m] = sum_k coefficients[(b,) m, k] inputs[k]`, optionally plus
drawn noise.

Bytes moved at best: each input read once, each output written once; the noise costs none. Accumulation is float32
(float64 when any input is float64), in the order of the inputs. It does not help where a compiler already fuses the
expression: there the reference is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import backends, layout, native, registration
from .inner_products import inner_products
from .lincomb_kernels import MOST, direct, launch
from .noise import check_seeds, draw, normal, normal_reference

_FLOATS = tuple(native.DTYPES)  # in the order of their codes


def _wide(inputs: Sequence[Tensor]) -> torch.dtype:
    """What sums accumulate in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def reference(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    noise_seeds: Tensor | None = None,
    noise_stream: int = 0,
    dtypes: Sequence[torch.dtype] = (),
) -> list[Tensor]:
    """The defining implementation, in plain torch operations. dtypes: one per output row."""
    first = inputs[0]  # [B, ...]
    wide = _wide(inputs)
    terms = [x if x.dtype == wide else x.to(wide) for x in inputs]  # an exported .to is two nodes, needed or not
    if noise_seeds is not None:
        terms.append(normal_reference(noise_seeds, math.prod(first.shape[1:]), noise_stream, wide).view(first.shape))
    table = coefficients if coefficients.dtype == wide else coefficients.to(wide)
    if table.ndim == 3:
        table = table.movedim(0, -1)  # [M, K, B]
        table = table[(..., *(None,) * (first.ndim - 1))]  # [M, K, B, 1, ...]
    outputs = []
    for m, dtype in enumerate(dtypes):
        row = table[m]
        total = row[0] * terms[0]
        for k, term in enumerate(terms[1:], 1):
            total = total + row[k] * term
        outputs.append(total if dtype == wide else total.to(dtype))
    return outputs


def _fill(
    inputs: Sequence[Tensor], coefficients: Tensor, seeds: Tensor | None, stream: int, outputs: Sequence[Tensor]
) -> None:
    """Write the combinations into outputs, by the backend that serves their device."""
    first = inputs[0]
    if first.numel() == 0 or not outputs:
        return
    backend, _ = backends.choose("lincomb", first.device.type)
    columns, rows = MOST.get(backend, (0, 0))
    if len(inputs) + 1 > columns or len(outputs) > rows:
        for y, value in zip(outputs, reference(inputs, coefficients, seeds, stream, [y.dtype for y in outputs])):
            y.copy_(value)
        return
    read, write = layout.match(inputs, outputs)
    if seeds is not None:
        seeds = seeds.contiguous()
        if not layout.is_row_major(write[0]):  # elements are numbered in the usual order, not in memory's
            noise = draw("normal", seeds, math.prod(first.shape[1:]), stream, _wide(inputs)).view(first.shape)
            read.append(layout.like_sample(write[0], noise, noise.dtype))
            seeds = None
    if coefficients.dtype not in (torch.float32, torch.float64):
        coefficients = coefficients.float()
    launch(backend, read, write, coefficients, seeds, stream)
    for y, written in zip(outputs, write):
        if written is not y:
            y.copy_(written)


def _empty(inputs: Sequence[Tensor], codes: Sequence[int]) -> list[Tensor]:
    return [torch.empty_like(inputs[0], dtype=_FLOATS[code]) for code in codes]


def _lincomb(inputs, coefficients, seeds, stream, codes):
    outputs = _empty(inputs, codes)
    _fill(inputs, coefficients, seeds, stream, outputs)
    return outputs


_raw = registration.define(
    "_lincomb(Tensor[] inputs, Tensor coefficients, Tensor? seeds, int stream, int[] dtypes) -> Tensor[]",
    _lincomb,
    lambda inputs, coefficients, seeds, stream, dtypes: _empty(inputs, dtypes),
)
_raw_out = registration.define(
    "_lincomb_out(Tensor[] inputs, Tensor coefficients, Tensor? seeds, int stream, Tensor(a!)[] out) -> ()",
    _fill,
    lambda inputs, coefficients, seeds, stream, out: None,
)


def _taken(table: Tensor, places: Sequence[int], dim: int) -> Tensor:
    """Rows (dim -2) or columns (-1) of a table; a list as an index would be copied to the device, and waited for."""
    if len(places) == table.shape[dim]:
        return table
    return torch.stack([table.select(dim, place) for place in places], dim)


class _Differentiable(torch.autograd.Function):
    """Bilinear: the inputs' gradient is a lincomb, the coefficients' all inner products, the tangent one lincomb."""

    @staticmethod
    def forward(coefficients, seeds, stream, dtypes, *inputs):
        return tuple(_raw(inputs, coefficients, seeds, stream, [native.DTYPES[dtype] for dtype in dtypes]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        coefficients, seeds, stream, dtypes, *terms = inputs
        ctx.stream, ctx.dtypes, ctx.noisy = stream, dtypes, seeds is not None
        ctx.set_materialize_grads(False)
        saved = (coefficients, *terms, *((seeds,) if ctx.noisy else ()))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def _saved(ctx) -> tuple[Tensor, list[Tensor], Tensor | None]:
        coefficients, *terms = ctx.saved_tensors
        return coefficients, terms, terms.pop() if ctx.noisy else None

    @staticmethod
    def backward(ctx, *gradients):
        coefficients, inputs, seeds = _Differentiable._saved(ctx)
        rows = [m for m, gradient in enumerate(gradients) if gradient is not None]
        result: list[Any] = [None] * (4 + len(inputs))
        if not rows:
            return tuple(result)
        given = [gradients[m] for m in rows]
        live = _taken(coefficients, rows, -2)  # [(B,) M', K]
        wanted = [k for k in range(len(inputs)) if ctx.needs_input_grad[4 + k]]
        if wanted:
            columns = _taken(live, wanted, -1)
            found = lincomb(given, columns.transpose(-1, -2), dtypes=[inputs[k].dtype for k in wanted])
            for k, gradient in zip(wanted, found):
                result[4 + k] = gradient
        if ctx.needs_input_grad[0]:
            right = list(inputs)
            if seeds is not None:
                right.append(normal(seeds, inputs[0].shape[1:], stream=ctx.stream, dtype=_wide(inputs)))
            gradient = inner_products(given, right)  # [B, M', K]
            gradient = (gradient if coefficients.ndim == 3 else gradient.sum(0)).to(coefficients.dtype)
            if len(rows) < len(gradients):
                given_rows = dict(zip(rows, gradient.unbind(-2)))
                nothing = torch.zeros_like(coefficients.select(-2, 0))
                gradient = torch.stack([given_rows.get(m, nothing) for m in range(len(gradients))], -2)
            result[0] = gradient
        return tuple(result)

    @staticmethod
    def jvp(ctx, coefficients_tangent, _seeds, _stream, _dtypes, *tangents):
        coefficients, inputs, seeds = _Differentiable._saved(ctx)
        moving = [k for k, tangent in enumerate(tangents) if tangent is not None]
        terms = [tangents[k] for k in moving]
        table = _taken(coefficients, moving, -1) if moving else coefficients[..., :0]
        if coefficients_tangent is not None:
            terms += inputs
            table = torch.cat([table, coefficients_tangent], -1)
        else:
            seeds = None
        if not terms:
            return tuple(None for _ in ctx.dtypes)
        return lincomb(terms, table, noise_seeds=seeds, noise_stream=ctx.stream, dtypes=ctx.dtypes)

    @staticmethod
    def vmap(info, in_dims, coefficients, seeds, stream, dtypes, *inputs):
        """Folds the mapped dimension into the batch."""
        folds = info.batch_size
        first, dim = inputs[0], in_dims[4]
        batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]

        def fold(x: Tensor, dim: int | None) -> Tensor:  # [V * B, ...]
            x = x.expand(folds, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.reshape(folds * batch, *x.shape[2:])

        if in_dims[0] is not None or coefficients.ndim == 3:
            per_sample = coefficients.ndim - (in_dims[0] is not None) == 3
            if not per_sample:
                coefficients = coefficients.movedim(in_dims[0], 0)
                coefficients = coefficients[:, None].expand(-1, batch, -1, -1).reshape(-1, *coefficients.shape[1:])
            else:
                coefficients = fold(coefficients, in_dims[0])
        outputs = lincomb(
            [fold(x, d) for x, d in zip(inputs, in_dims[4:])],
            coefficients,
            noise_seeds=None if seeds is None else fold(seeds, in_dims[1]),
            noise_stream=stream,
            dtypes=dtypes,
        )
        return tuple(y.unflatten(0, (folds, batch)) for y in outputs), (0,) * len(outputs)


@functools.cache
def _differentiable():
    """The autograd function, one node of a compiler's graph should one meet it. Imports torch._dynamo: on first use."""

    @torch.compiler.allow_in_graph
    def apply(*arguments):
        return _Differentiable.apply(*arguments)

    return apply


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
    for x in (*inputs, coefficients):
        if x.device != first.device:
            raise ValueError(f"lincomb takes tensors of one device; got {first.device} and {x.device}.")
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
        if noise_seeds.device != first.device:
            raise ValueError(f"lincomb takes tensors of one device; got {first.device} and {noise_seeds.device}.")
    if dtypes is not None and (len(dtypes) != rows or any(d not in _FLOATS for d in dtypes)):
        raise ValueError(f"dtypes must name one floating-point dtype for each of {rows} outputs; got {list(dtypes)}.")
    if out is not None and (len(out) != rows or any(o.shape != first.shape or o.dtype not in _FLOATS for o in out)):
        shapes = [list(o.shape) for o in out]
        raise ValueError(f"out must hold {rows} floating-point tensors of shape {list(first.shape)}; got {shapes}.")


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

    inputs: K tensors of one shape [B, ...], any mix of floating dtypes and layouts. coefficients: [M, K] or [B, M, K];
    with noise_seeds (int64 [B]) one more, last, column for standard normal noise, equal to `normal(noise_seeds, shape,
    stream=noise_stream)`. out: M tensors to write, which may be inputs; dtypes: the outputs' (default: out's, else the
    inputs' promoted dtype). Differentiable in inputs and coefficients, forward and reverse. Raises TypeError/ValueError
    naming what does not fit.
    """
    if registration.quiet():
        written = direct(inputs, coefficients, noise_seeds, noise_stream, out, dtypes)
        if written is not None:
            if out is not None:
                increment_version(written)
            return written
    _check(inputs, coefficients, noise_seeds, noise_stream, out, dtypes)
    if out is not None:
        dtypes = [y.dtype for y in out]
    elif dtypes is None:
        dtypes = [functools.reduce(torch.promote_types, (x.dtype for x in inputs))] * coefficients.shape[-2]
    if out is not None and registration.differentiating((*inputs, coefficients, *out)):
        raise ValueError(
            "lincomb writes into out only where no derivative is taken; leave out=None or use torch.no_grad()."
        )
    if registration.tracing() or backends.choose("lincomb", inputs[0].device.type)[0] == "reference":
        outputs = reference(inputs, coefficients, noise_seeds, noise_stream, dtypes)
        for target, value in zip(out or (), outputs):
            target.copy_(value)
        return tuple(outputs if out is None else out)
    if out is not None:
        _raw_out(list(inputs), coefficients, noise_seeds, noise_stream, list(out))
        increment_version(out)
        return tuple(out)
    if registration.differentiating((*inputs, coefficients)):
        return _differentiable()(coefficients, noise_seeds, noise_stream, tuple(dtypes), *inputs)
    codes = [native.DTYPES[dtype] for dtype in dtypes]
    return tuple(_raw(list(inputs), coefficients, noise_seeds, noise_stream, codes))
