"""lincomb's Triton kernel, its launches, and the short way to them for plain tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import backends, layout, native

try:
    import triton
    import triton.language as tl

    from .noise import triton_normal
except ImportError:
    triton = None

MOST = {
    "cpu": (64, 64),
    "cuda": (16, 4),
    "triton": (32, 16),
}  # inputs and outputs a backend takes; beyond, the reference
OVERLAP = 2  # the C functions' answer to an output that shares memory other than exactly with an input
_CODES = native.DTYPES
_COEFFICIENTS = (torch.float32, torch.float64)


if triton is not None:

    @triton.jit
    def lincomb_kernel(
        inputs,  # K pointers
        outputs,  # M pointers
        input_strides,  # K batch strides, in elements
        output_strides,  # M
        coefficients,
        batch_stride,
        row_stride,
        column_stride,
        seeds,
        stream,
        count,  # elements in a sample
        blocks,  # cdiv(count, BLOCK)
        WIDE: tl.constexpr,
        NOISE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        K: tl.constexpr = len(inputs)
        M: tl.constexpr = len(outputs)
        b = (tl.program_id(0) // blocks).to(tl.int64)
        start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < count
        table = coefficients + b * batch_stride
        totals = ()
        for k in tl.static_range(K + NOISE):
            if k < K:
                # float32 first: the interpreter knows no other way out of bfloat16
                x = tl.load(inputs[k] + b * input_strides[k] + offsets, mask=inside)
                x = x.to(WIDE) if x.dtype == tl.float64 else x.to(tl.float32).to(WIDE)
            else:
                x = triton_normal(tl.load(seeds + b), stream, start // 4, BLOCK).to(WIDE)
            sums = ()
            for m in tl.static_range(M):
                term = tl.load(table + m * row_stride + k * column_stride).to(WIDE) * x
                sums = sums + (term if k == 0 else totals[m] + term,)  # type: ignore[assignment]  # noqa: RUF005
            totals = sums
        for m in tl.static_range(M):
            target = outputs[m] + b * output_strides[m] + offsets
            kind = target.dtype.element_ty
            tl.store(target, totals[m] if kind == tl.float64 else totals[m].to(tl.float32).to(kind), mask=inside)


def launch_triton(inputs, outputs, rows, batch, count, coefficients, seeds, stream) -> None:
    block = min(1024, max(16, 1 << (count - 1).bit_length()))
    blocks = -(-count // block)
    size = len(inputs)
    wide = tl.float64 if _CODES[torch.float64] in rows[2 : 3 * size : 3] else tl.float32
    strides, table = tuple(rows[1::3]), coefficients.stride()
    with native.on_device_of(inputs[0]):
        lincomb_kernel[(batch * blocks,)](
            tuple(inputs),
            tuple(outputs),
            strides[:size],
            strides[size:],
            coefficients,
            table[0] if len(table) == 3 else 0,
            table[-2],
            table[-1],
            seeds if seeds is not None else coefficients,
            stream,
            count,
            blocks,
            WIDE=wide,
            NOISE=seeds is not None,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,  # products and sums round separately, as in the reference
        )


def _launch_c(inputs, outputs, rows, batch, count, coefficients, seeds, stream) -> int:
    table = coefficients.stride()
    sizes = (len(inputs), len(outputs), batch, count)
    noise = (0 if seeds is None else seeds.data_ptr(), stream)
    at = (coefficients.data_ptr(), table[0] if len(table) == 3 else 0, *table[-2:], _CODES[coefficients.dtype])
    return native.run("lincomb", inputs[0], native.table((*sizes, *noise, *at, *rows)))


def launch(
    backend: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    coefficients: Tensor,
    seeds: Tensor | None,
    stream: int,
) -> None:
    """Write outputs from inputs: all of one sample layout, outputs apart from one another and from unequal inputs."""
    batch = inputs[0].shape[0]
    count = inputs[0].numel() // batch
    rows = [v for x in (*inputs, *outputs) for v in (x.data_ptr(), x.stride(0), _CODES[x.dtype])]
    if backend == "triton":
        launch_triton(inputs, outputs, rows, batch, count, coefficients, seeds, stream)
    else:
        code = _launch_c(inputs, outputs, rows, batch, count, coefficients, seeds, stream)
        native.check("lincomb", inputs[0], code)


@functools.lru_cache(256)
def _layout(shape: torch.Size, strides: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether a sample fills one stretch of memory, and whether in row-major order."""
    model = torch.empty_strided(shape, strides, device="meta")
    return layout.is_dense(shape[1:], strides[1:]), layout.is_row_major(model)


def _rows(
    tensors: Iterable[Tensor], shape: torch.Size, strides: tuple[int, ...], device: int, tracked: bool
) -> list[int] | None:
    """(address, batch stride, dtype's code) of every tensor; None if one is not plain."""
    rows: list[int] = []
    for x in tensors:
        if type(x) is not Tensor or x.shape != shape or x.get_device() != device or (tracked and x.requires_grad):
            return None
        own, address, code = x.stride(), x.data_ptr(), _CODES.get(x.dtype)
        if (own != strides and own[1:] != strides[1:]) or not address or code is None:
            return None
        rows += (address, own[0], code)
    return rows


def _plain_seeds(seeds: Tensor, stream: int, batch: int, device: int) -> bool:
    return (
        type(seeds) is Tensor
        and seeds.dtype == torch.int64
        and seeds.shape == (batch,)
        and (seeds.stride() == (1,) or batch == 1)
        and seeds.get_device() == device
        and seeds.data_ptr() != 0
        and type(stream) is int
        and 0 <= stream < 1 << 32
    )


def direct(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    seeds: Tensor | None,
    stream: int,
    out: Sequence[Tensor] | None,
    dtypes: Sequence[torch.dtype] | None,
) -> tuple[Tensor, ...] | None:
    """The outputs, written after one look at every argument, where all is plain; else None, and nothing was written.

    Plain: torch's own tensors of one device, shape and sample layout, no gradient wanted, outputs that share no memory
    but exactly an input's. Whatever is not, errors included, is the caller's. Only where `registration.quiet()`.
    """
    if not inputs or type(inputs[0]) is not Tensor or type(coefficients) is not Tensor:
        return None
    first = inputs[0]
    shape, strides, device, numel, tracked = (
        first.shape,
        first.stride(),
        first.get_device(),
        first.numel(),
        torch.is_grad_enabled(),
    )
    backend, _ = backends.choose("lincomb", "cpu" if first.is_cpu else "cuda" if first.is_cuda else "meta")
    most, columns, table = MOST.get(backend), len(inputs) + (seeds is not None), coefficients.shape
    # A negated view, which torch resolves before it calls an operator, is dense only if it has one element.
    if most is None or columns > most[0] or numel < 2 or coefficients.is_neg():
        return None
    batch = shape[0]
    if len(table) == 3:
        batches, given, last = table
        if batches != batch:
            return None
    elif len(table) == 2:
        given, last = table
    else:
        return None
    if last != columns or not 0 < given <= most[1] or coefficients.dtype not in _COEFFICIENTS:
        return None
    if coefficients.get_device() != device or not coefficients.data_ptr() or (tracked and coefficients.requires_grad):
        return None
    dense, row_major = (True, True) if first.is_contiguous() else _layout(shape, strides)
    if not dense or (seeds is not None and not (row_major and _plain_seeds(seeds, stream, batch, device))):
        return None
    if out is None:
        read = _rows(inputs, shape, strides, device, tracked)
        if read is None:
            return None
        if dtypes is None:
            dtypes = [functools.reduce(torch.promote_types, {x.dtype for x in inputs})] * given
        elif not _CODES.keys() >= set(dtypes):
            return None
        out = [torch.empty_like(first, dtype=dtype) for dtype in dtypes]
        write = _rows(out, shape, strides, device, tracked)
        rows = read + write if write is not None else None
    else:
        rows = _rows((*inputs, *out), shape, strides, device, tracked)
    if rows is None or len(out) != given:
        return None
    if backend != "triton":
        code = _launch_c(inputs, out, rows, batch, numel // batch, coefficients, seeds, stream)
        if code == OVERLAP:
            return None
        native.check("lincomb", first, code)
    elif layout.apart(rows, len(inputs), batch, numel // batch):
        launch_triton(inputs, out, rows, batch, numel // batch, coefficients, seeds, stream)
    else:
        return None
    return tuple(out)
