"""The Gram matrix of K tensors, per sample, in one pass: `products[b, i, j] = <z_i, z_j>`, `sums[b, i] = sum z_i`,
`absolutes[b, i] = sum |z_i|`, where z are the tensors or given combinations of them.

Bytes moved at best: each tensor read once, a few numbers a sample written; the results stay on the device, where a
small expression makes `lincomb`'s coefficients of them. With combinations a difference is formed in registers, so
|a - b| costs no tensor and loses nothing to cancellation, as <a, a> - 2 <a, b> + <b, b> would. It does not help under a
compiler, which sees the reference. Kernels: `inner_products`, of which this is the symmetric case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, registration
from .inner_products import products, products_reference
from .lincomb import lincomb
from .reductions import Table, compiled_node, device_table, fold

MOST = 6


class Gram(NamedTuple):
    """Per-sample products [B, J, J], sums [B, J] and absolute sums [B, J], float32 (float64 if any tensor is)."""

    products: Tensor
    sums: Tensor
    absolutes: Tensor


def reference(inputs: Sequence[Tensor], combinations: Table = ()) -> Gram:
    """The defining implementation, in plain torch operations."""
    return Gram(*products_reference(inputs, (), combinations))


def _matrix(table: Table, like: Tensor) -> Tensor:
    return device_table(table, like.dtype, like.device)


def _pulled(
    inputs: Sequence[Tensor],
    table: Table,
    wanted: Sequence[int],
    others: Sequence[Tensor],
    matrix: Tensor | None,
    constant: Tensor | None,
    signs: Tensor | None,
) -> list[Tensor]:
    """Gradients at wanted inputs: with z, y the combinations of inputs and others,
    `T^t (matrix y + constant + signs sign(y))`, one lincomb.

    matrix [B, J, J]; constant and signs [B, J]; None for zero.
    """
    terms: list[Tensor] = []
    columns: list[Tensor] = []
    if matrix is not None:
        terms += others
        columns.append(matrix @ _matrix(table, matrix) if table else matrix)
    if signs is not None:
        y = lincomb(others, _matrix(table, signs)) if table else others
        terms += [x.sign() for x in y]
        columns.append(torch.diag_embed(signs))
    if constant is not None:
        terms.append(inputs[0].new_ones(()).expand(1, *inputs[0].shape[1:]).contiguous().expand_as(inputs[0]))
        columns.append(constant[:, :, None])
    coefficients = torch.cat(columns, 2)  # [B, J, terms]
    if table:
        coefficients = _matrix(table, coefficients).T @ coefficients
    if len(wanted) < len(inputs):
        coefficients = coefficients[:, list(wanted)]
    return list(lincomb(terms, coefficients, dtypes=[inputs[k].dtype for k in wanted]))


def _zeros_for_none(tangents: Sequence[Tensor | None], primals: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, primals)]


class _Gram(torch.autograd.Function):
    """The gradient is one lincomb, the tangent the products of tangents and inputs."""

    @staticmethod
    def forward(table, *inputs):
        return products(inputs, (), table, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.table, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, of_products, of_sums, of_absolutes):
        inputs = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(inputs)
        wanted = [k for k in range(len(inputs)) if ctx.needs_input_grad[1 + k]]
        if wanted and any(x is not None for x in (of_products, of_sums, of_absolutes)):
            matrix = None if of_products is None else of_products + of_products.transpose(1, 2)
            gradients = _pulled(inputs, ctx.table, wanted, inputs, matrix, of_sums, of_absolutes)
            for k, gradient in zip(wanted, gradients):
                found[k] = gradient
        return None, *found

    @staticmethod
    def jvp(ctx, _table, *tangents):
        inputs = ctx.saved_tensors
        crossed, sums, signed = _cross(_zeros_for_none(tangents, inputs), inputs, ctx.table)
        return crossed + crossed.transpose(1, 2), sums, signed

    @staticmethod
    def vmap(info, in_dims, table, *inputs):
        found = gram([fold(x, dim, info.batch_size) for x, dim in zip(inputs, in_dims[1:])], table or None)
        return tuple(y.unflatten(0, (info.batch_size, -1)) for y in found), (0, 0, 0)


class _Cross(torch.autograd.Function):
    """z_i . y_j, sum z_i and sum z_i sign(y_i): linear in the left tensors, and bilinear but for the signs."""

    @staticmethod
    def forward(table, *tensors):
        half = len(tensors) // 2
        return products(tensors[:half], tensors[half:], table, True)

    setup_context = _Gram.setup_context

    @staticmethod
    def backward(ctx, of_products, of_sums, of_signed):
        half = len(ctx.saved_tensors) // 2
        left, right = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        found: list[Tensor | None] = [None] * (2 * half)
        wanted = [k for k in range(half) if ctx.needs_input_grad[1 + k]]
        if wanted and any(x is not None for x in (of_products, of_sums, of_signed)):
            gradients = _pulled(left, ctx.table, wanted, right, of_products, of_sums, of_signed)
            for k, gradient in zip(wanted, gradients):
                found[k] = gradient
        wanted = [k for k in range(half) if ctx.needs_input_grad[1 + half + k]]
        if wanted and of_products is not None:
            gradients = _pulled(right, ctx.table, wanted, left, of_products.transpose(1, 2), None, None)
            for k, gradient in zip(wanted, gradients):
                found[half + k] = gradient
        return None, *found

    @staticmethod
    def jvp(ctx, _table, *tangents):
        half = len(ctx.saved_tensors) // 2
        left, right = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        of_left = _cross(_zeros_for_none(tangents[:half], left), right, ctx.table)
        crossed = _cross(left, _zeros_for_none(tangents[half:], right), ctx.table)[0]
        return of_left[0] + crossed, *of_left[1:]

    @staticmethod
    def vmap(info, in_dims, table, *tensors):
        half = len(tensors) // 2
        folded = [fold(x, dim, info.batch_size) for x, dim in zip(tensors, in_dims[1:])]
        found = _cross(folded[:half], folded[half:], table)
        return tuple(y.unflatten(0, (info.batch_size, -1)) for y in found), (0, 0, 0)


def _cross(left: Sequence[Tensor], right: Sequence[Tensor], table: Table) -> tuple[Tensor, Tensor, Tensor]:
    return compiled_node(_Cross)(table, *left, *right)


def gram(inputs: Sequence[Tensor], combinations: Sequence[Sequence[float]] | None = None) -> Gram:
    """All per-sample inner products, sums and absolute sums of at most six tensors, or of combinations of them.

    inputs: tensors of one shape [B, ...], any mix of floating dtypes and layouts. combinations: J <= 6 rows of one
    number an input; `gram([a, b], [(1, -1)])` is about a - b. Returns float32 tensors [B, J, J], [B, J] and [B, J] on
    the inputs' device (float64 if any input is float64), whose bits depend on the sample alone. Differentiable, forward
    and reverse; |z| has slope 0 at 0. Raises TypeError/ValueError naming what does not fit.
    """
    if not 1 <= len(inputs) <= MOST:
        raise ValueError(f"gram takes one to {MOST} tensors; got {len(inputs)}.")
    for x in inputs:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"gram takes floating-point tensors; got {given}.")
        if x.shape != inputs[0].shape or x.ndim == 0:
            raise ValueError(f"gram takes tensors of one shape [B, ...]; got {[list(x.shape) for x in inputs]}.")
        if x.device != inputs[0].device:
            raise ValueError(f"gram takes tensors of one device; got {inputs[0].device} and {x.device}.")
    table: Table = ()
    if combinations is not None:
        table = tuple(tuple(float(w) for w in row) for row in combinations)
        if not 1 <= len(table) <= MOST or any(len(row) != len(inputs) for row in table):
            sizes = [len(row) for row in table]
            raise ValueError(f"combinations must be one to {MOST} rows of {len(inputs)} numbers; got rows of {sizes}.")
        if not all(math.isfinite(w) for row in table for w in row):
            raise ValueError(f"combinations must be finite numbers; got {table}.")
    if registration.tracing() or backends.choose("gram", inputs[0].device.type)[0] == "reference":
        return reference(inputs, table)
    if registration.differentiating(inputs):
        return Gram(*compiled_node(_Gram)(table, *inputs))
    return Gram(*products(inputs, (), table, True))
