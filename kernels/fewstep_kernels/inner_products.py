"""Per-sample inner products: `result[b, m, k] = sum_i left[m][b, i] right[k][b, i]`.

What the gradient of `lincomb`'s coefficients needs, and, with right = left, all of `gram`. Every sample by itself;
results in float32, float64 when any tensor is float64. Terms add up in float32 (float64 for float64) within a block of
some hundred (C++) or thousand (Triton) elements, then in float64. Bytes moved at best: each tensor read once.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, native, reductions, registration
from .reductions import Table

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_C = 65  # tensors a side
MOST_TRITON = 48  # results of one sample; beyond, the reference


def combined(rows: Sequence[Tensor], table: Table) -> list[Tensor]:
    """The combinations of the rows in a table [J, K] of numbers; the rows themselves without one."""
    if not table:
        return list(rows)
    found = []
    for weights in table:
        terms = [x if w == 1 else w * x for w, x in zip(weights, rows) if w != 0]
        found.append(functools.reduce(torch.add, terms) if terms else torch.zeros_like(rows[0]))
    return found


def products_reference(
    left: Sequence[Tensor], right: Sequence[Tensor] = (), table: Table = (), sums: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The defining implementation, in plain torch operations.

    With z the table's combinations of left and y those of right (z again without right): z_i . y_j [B, I, J], and if
    asked sum z_i [B, I] and sum z_i sign(y_i) [B, I], which is the sum of |z_i| when y is z.
    """
    wide = reductions.wide((*left, *right))
    z = torch.stack(combined([reductions.samples(x).to(wide) for x in left], table), 1)  # [B, I, N]
    y = torch.stack(combined([reductions.samples(x).to(wide) for x in right], table), 1) if right else z
    if not sums:
        return z @ y.transpose(1, 2), z.new_empty(z.shape[0], 0), z.new_empty(z.shape[0], 0)
    return z @ y.transpose(1, 2), z.sum(-1), ((z * y.sign()) if right else z.abs()).sum(-1)


def reference(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The defining implementation of `inner_products`, in plain torch operations."""
    return products_reference(left, right, sums=False)[0]


if triton is not None:

    @triton.jit
    def _load_rows(inputs, strides, combinations, b, offsets, inside, ROWS: tl.constexpr, WIDE: tl.constexpr):
        K: tl.constexpr = len(inputs)
        loaded = ()
        for k in tl.static_range(K):
            # float32 first: the interpreter knows no other way out of bfloat16
            x = tl.load(inputs[k] + b * strides[k] + offsets, mask=inside, other=0.0)
            loaded = loaded + (x.to(WIDE) if x.dtype == tl.float64 else x.to(tl.float32).to(WIDE),)  # type: ignore[assignment]  # noqa: RUF005
        found = loaded
        if ROWS > 0:
            mixed = ()
            for j in tl.static_range(ROWS):
                z = tl.load(combinations + j * K).to(WIDE) * loaded[0]  # type: ignore[misc]
                for k in tl.static_range(1, K):
                    z += tl.load(combinations + j * K + k).to(WIDE) * loaded[k]
                mixed = mixed + (z,)  # type: ignore[assignment]  # noqa: RUF005
            found = mixed
        return found

    @triton.jit
    def products_kernel(
        left,  # pointers
        right,  # pointers; left again where RECTANGULAR is false
        left_strides,  # batch strides, in elements
        right_strides,
        combinations,  # float64 [ROWS, inputs]
        partials,  # [batch, blocks, results]
        count,  # elements in a sample
        blocks,  # cdiv(count, STEPS * BLOCK)
        RECTANGULAR: tl.constexpr,
        ROWS: tl.constexpr,
        SUMS: tl.constexpr,
        WIDE: tl.constexpr,
        STEPS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        M: tl.constexpr = ROWS if ROWS > 0 else len(left)
        K: tl.constexpr = ROWS if ROWS > 0 else len(right)
        program = tl.program_id(0).to(tl.int64)
        b = program // blocks
        start = (program % blocks) * STEPS * BLOCK
        totals = ()
        for step in tl.static_range(STEPS):
            offsets = start + step * BLOCK + tl.arange(0, BLOCK)
            inside = offsets < count
            z = _load_rows(left, left_strides, combinations, b, offsets, inside, ROWS, WIDE)
            y = z
            if RECTANGULAR:
                y = _load_rows(right, right_strides, combinations, b, offsets, inside, ROWS, WIDE)
            terms = ()
            for i in tl.static_range(M):
                for j in tl.static_range(0 if RECTANGULAR else i, K):
                    terms = terms + (z[i] * y[j],)  # type: ignore[assignment]  # noqa: RUF005
            if SUMS:
                for i in tl.static_range(M):
                    terms = terms + (z[i],)  # type: ignore[assignment]  # noqa: RUF005
                for i in tl.static_range(M):
                    sign = tl.where(y[i] > 0, 1.0, 0.0) - tl.where(y[i] < 0, 1.0, 0.0)
                    terms = terms + (z[i] * sign.to(WIDE),)  # type: ignore[assignment]  # noqa: RUF005
            added = ()
            for t in tl.static_range(len(terms)):
                added = added + (terms[t] if step == 0 else totals[t] + terms[t],)  # type: ignore[assignment]  # noqa: RUF005
            totals = added
        RESULTS: tl.constexpr = M * K + (2 * M if SUMS else 0)
        place = partials + program * RESULTS
        for i in tl.static_range(M):
            for j in tl.static_range(0 if RECTANGULAR else i, K):
                # numbered row by row; of a symmetric table the upper half
                value = tl.sum(totals[i * K + j - (0 if RECTANGULAR else i * (i + 1) // 2)], 0)
                tl.store(place + i * K + j, value)
                if not RECTANGULAR:
                    tl.store(place + j * K + i, value)
        if SUMS:
            FIRST: tl.constexpr = M * K if RECTANGULAR else M * (M + 1) // 2
            for i in tl.static_range(2 * M):
                tl.store(place + M * K + i, tl.sum(totals[FIRST + i], 0))


def block_for(results: int, dtype: torch.dtype) -> int:
    """Elements a program takes at a time: as many as leave its running sums in registers."""
    words = results * (2 if dtype == torch.float64 else 1)
    return 1024 if words <= 15 else 512 if words <= 48 else 256


def _call_triton(left, right, table, results) -> None:
    first = left[0]
    batch, count = first.shape[0], math.prod(first.shape[1:])
    found = sum(x.shape[1:].numel() for x in results)
    block, steps = block_for(found, results[0].dtype), 4
    block = min(block, max(16, triton.next_power_of_2(-(-count // steps))))
    blocks = triton.cdiv(count, steps * block)
    wide = results[0].dtype
    partials = torch.empty(batch, blocks, found, dtype=wide, device=first.device)
    others = right or left
    with torch.cuda.device_of(first):
        products_kernel[(batch * blocks,)](
            tuple(left),
            tuple(others),
            tuple(x.stride(0) for x in left),
            tuple(x.stride(0) for x in others),
            reductions.device_table(table, torch.float64, first.device) if table else partials,
            partials,
            count,
            blocks,
            RECTANGULAR=bool(right),
            ROWS=len(table),
            SUMS=results[1].shape[1] > 0,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            STEPS=steps,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=True,  # an order of its own anyway, and a fused sum is the more exact one
        )
    reductions.finish(partials, results if results[1].shape[1] else results[:1])


def _call_c(left, right, table, results) -> None:
    products, sums, signed = results
    batch, count = left[0].shape[0], math.prod(left[0].shape[1:])
    numbers = [number for row in table for number in row]
    native.call(
        "gram",
        products,
        len(left),
        len(right),
        len(table),
        batch,
        count,
        reductions.rows((*left, *right)),
        (ctypes.c_double * len(numbers))(*numbers) if numbers else None,
        products.data_ptr(),
        sums.data_ptr() if sums.shape[1] else None,
        signed.data_ptr() if sums.shape[1] else None,
        native.DTYPES[products.dtype],
    )


def _empty(left, right, numbers, with_sums) -> tuple[Tensor, Tensor, Tensor]:
    first, dtype = left[0], reductions.wide((*left, *right))
    rows = len(numbers) // len(left) if numbers else len(left)
    columns = len(right) if right and not numbers else rows
    one = (first.shape[0], rows if with_sums else 0)
    return (
        first.new_empty((first.shape[0], rows, columns), dtype=dtype),
        first.new_empty(one, dtype=dtype),
        first.new_empty(one, dtype=dtype),
    )


def _products(left, right, numbers, with_sums):
    backend, _ = backends.choose("gram", left[0].device.type)
    size = len(left)
    table = tuple(tuple(numbers[i : i + size]) for i in range(0, len(numbers), size))
    results = _empty(left, right, numbers, with_sums)
    if backend == "triton":
        fits = results[0].shape[1:].numel() + 2 * results[1].shape[1] <= MOST_TRITON
    else:
        fits = backend == "cpu" and max(size, len(right), len(table)) <= MOST_C
    if not fits or left[0].numel() == 0 or any(x.dtype not in native.DTYPES for x in (*left, *right)):
        return products_reference(left, right, table, with_sums)
    read = reductions.one_layout([*left, *right])
    (_call_triton if backend == "triton" else _call_c)(read[:size], read[size:], table, results)
    return results


_raw = registration.define(
    "_gram(Tensor[] left, Tensor[] right, float[] combinations, bool sums) -> (Tensor, Tensor, Tensor)",
    _products,
    _empty,
)


def products(
    left: Sequence[Tensor], right: Sequence[Tensor], table: Table, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`products_reference` by the backend that serves the device; without derivatives."""
    direct = registration.quiet() and registration.plain((*left, *right))
    return (_products if direct else _raw)(list(left), list(right), [w for row in table for w in row], sums)


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """All inner products of M and K tensors of one shape [B, ...], per sample: [B, M, K], float32 (float64 if any is).

    Differentiable. Raises ValueError when a list is empty or shapes differ.
    """
    if not left or not right:
        raise ValueError(f"inner_products takes at least one tensor on each side; got {len(left)} and {len(right)}.")
    shapes = {tuple(x.shape) for x in (*left, *right)}
    if len(shapes) > 1 or () in shapes:
        raise ValueError(f"inner_products takes tensors of one shape [B, ...]; got {sorted(shapes)}.")
    devices = sorted({str(x.device) for x in (*left, *right)})
    if len(devices) > 1:
        raise ValueError(f"inner_products takes tensors of one device; got {' and '.join(devices)}.")
    if registration.tracing() or registration.differentiating((*left, *right)):
        return reference(left, right)
    return products(left, right, (), False)[0]
