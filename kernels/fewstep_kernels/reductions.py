"""What the per-sample reductions share: one memory layout, the two stages of a deterministic sum, and derivatives.

On a GPU a first kernel leaves the partial sums of every block of a sample, a second one adds them in order: no atomic
additions, so results are the same in every run and for every batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import layout, native

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


Table = tuple[tuple[float, ...], ...]


def wide(tensors: Sequence[Tensor]) -> torch.dtype:
    """What results come in: float64 when a tensor is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def samples(x: Tensor) -> Tensor:
    """[B, ...] as [B, N]; N = 1 for [B]."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def one_layout(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with one dense sample layout, that of the first dense one; those that differ are copied."""
    if all(x.is_contiguous() for x in tensors):
        return list(tensors)
    first = tensors[0]
    model = next((x for x in tensors if layout.is_dense(x.shape[1:], x.stride()[1:])), None)
    if model is None:
        model = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    wanted = layout._strides(model)
    return [x if layout._strides(x) == wanted else layout.like_sample(model, x, x.dtype) for x in tensors]


def rows(tensors: Sequence[Tensor | None]) -> Any:
    """The C functions' table of tensors; None becomes an address of 0."""
    values: list[int] = []
    for x in tensors:
        values += (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), native.DTYPES[x.dtype])
    return native.table(values)


@functools.lru_cache(4096)
def device_table(table: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table of numbers as a tensor, copied to the device once: later calls wait for nothing."""
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=dtype, device=device)


if triton is not None:

    @triton.jit
    def finish_kernel(
        partials,  # [batch, blocks, FIRST + 2 SECOND]
        first,  # [batch, FIRST]
        second,  # [batch, SECOND]
        third,  # [batch, SECOND]
        blocks,
        FIRST: tl.constexpr,
        SECOND: tl.constexpr,
        COLUMNS: tl.constexpr,  # a power of two, at least FIRST + 2 SECOND
        BLOCK: tl.constexpr,
    ):
        WIDTH: tl.constexpr = FIRST + 2 * SECOND
        b = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, COLUMNS)
        total = tl.zeros([COLUMNS], tl.float64)
        for start in range(0, blocks, BLOCK):
            block = start + tl.arange(0, BLOCK)
            place = (b * blocks + block.to(tl.int64))[:, None] * WIDTH + column[None, :]
            inside = (block < blocks)[:, None] & (column < WIDTH)[None, :]
            total += tl.sum(tl.load(partials + place, mask=inside, other=0.0).to(tl.float64), 0)
        value = total.to(first.dtype.element_ty)
        tl.store(first + b * FIRST + column, value, mask=column < FIRST)
        tl.store(second + b * SECOND + column - FIRST, value, mask=(column >= FIRST) & (column < FIRST + SECOND))
        tl.store(
            third + b * SECOND + column - FIRST - SECOND, value, mask=(column >= FIRST + SECOND) & (column < WIDTH)
        )


def finish(partials: Tensor, results: Sequence[Tensor]) -> None:
    """Add partial sums [B, blocks, W] over the blocks into one result [B, W] or into three, of widths F, S and S."""
    batch, blocks, width = partials.shape
    second = results[1].shape[1] if len(results) > 1 else 0
    with torch.cuda.device_of(partials):
        finish_kernel[(batch,)](
            partials,
            results[0],
            results[1] if second else partials,
            results[2] if second else partials,
            blocks,
            FIRST=width - 2 * second,
            SECOND=second,
            COLUMNS=triton.next_power_of_2(width),
            BLOCK=32,
            num_warps=4,
            enable_fp_fusion=False,
        )


def fold(x: Tensor, dim: int | None, folds: int) -> Tensor:
    """A mapped dimension (or `folds` repetitions where dim is None) folded into the batch: [folds * B, ...]."""
    x = x.expand(folds, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(folds * x.shape[1], *x.shape[2:])


class _ByReference(torch.autograd.Function):
    """A fast value whose derivatives are those of its reference, computed when they are asked for."""

    @staticmethod
    def forward(fast, plain, *tensors):
        return fast(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.plain, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *gradients):
        _, pull = torch.func.vjp(ctx.plain, *ctx.saved_tensors)  # type: ignore[misc]
        return None, None, *pull(gradients if len(gradients) > 1 else gradients[0])

    @staticmethod
    def jvp(ctx, _fast, _plain, *tangents):
        tensors = ctx.saved_tensors
        tangents = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(tensors, tangents))
        return torch.func.jvp(ctx.plain, tensors, tangents)[1]

    @staticmethod
    def vmap(info, in_dims, fast, plain, *tensors):
        folds = info.batch_size
        found = by_reference(fast, plain, *(fold(x, dim, folds) for x, dim in zip(tensors, in_dims[2:])))
        if isinstance(found, Tensor):
            return found.unflatten(0, (folds, -1)), 0
        return tuple(y.unflatten(0, (folds, -1)) for y in found), (0,) * len(found)


@functools.cache
def compiled_node(function: type[torch.autograd.Function]) -> Callable:
    """An autograd function's apply, one node of a compiler's graph should one meet it. Imports torch._dynamo."""

    @torch.compiler.allow_in_graph
    def apply(*arguments):
        return function.apply(*arguments)

    return apply


def by_reference(fast: Callable, plain: Callable, *tensors: Tensor) -> Any:
    """fast(*tensors), a tensor or a tuple of tensors [B, ...], with the derivatives of plain(*tensors).

    Both take tensors [B, ...] and treat every sample by itself.
    """
    return compiled_node(_ByReference)(fast, plain, *tensors)
