"""lincomb's Triton kernel, its launches, and the short way to them for plain tensors."""

from __future__ import annotations

import functools
import operator
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, native

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
_CODES = native.DTYPES
_compiled: dict[tuple, Any] = {}  # what Triton made of the kernel, by kind of arguments
_MOST_COMPILED = 1024
_SMALL = 1 << 16  # products that take some 10 microseconds: the interpreter's lock is not handed over for less
_PLAIN, _wants_gradient = {Tensor}, operator.attrgetter("requires_grad")
_is_negative = Tensor.is_neg  # by a bit, which is not in its memory


if triton is not None:

    @triton.jit(do_not_specialize=["stream"])
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


def launch_triton(inputs, outputs, job, coefficients, seeds) -> None:
    """Launch on tensors that lie as the job (`native.job`) says: what is compiled for their kind, looked up once."""
    size, _, batch, count, at_seeds, stream, at_table, *table, table_dtype = job[: native.HEAD].tolist()
    rows, noise = job[native.HEAD :].tolist(), seeds is not None
    strides, codes = tuple(rows[1::3]), tuple(rows[2::3])
    block = min(1024, max(16, 1 << (count - 1).bit_length()))
    blocks = -(-count // block)
    arguments = (
        tuple(inputs),
        tuple(outputs),
        strides[:size],
        strides[size:],
        coefficients,
        *table,
        seeds if noise else coefficients,
        stream,
        count,
        blocks,
        tl.float64 if _CODES[torch.float64] in codes[:size] else tl.float32,
        noise,
        block,
    )
    # Triton compiles anew for other dtypes, some numbers (1, multiples of 16, wide ones) and addresses off 16 bytes;
    # finding that out takes it twice as long as the launch. A kind is told here by all numbers but the addresses.
    kind = (inputs[0].get_device(), size, count, noise, stream >> 31, *table, table_dtype, strides, codes)
    aligned = functools.reduce(operator.or_, rows[0::3], at_table | at_seeds) % 16 == 0
    with native.on_device_of(inputs[0]):
        compiled = _compiled.get(kind) if aligned else None
        if compiled is not None:
            compiled[(batch * blocks, 1, 1)](*arguments)
            return
        compiled = lincomb_kernel[(batch * blocks,)](
            *arguments,
            num_warps=4,
            enable_fp_fusion=False,  # products and sums round separately, as in the reference
        )
    if aligned and compiled is not None:  # the interpreter compiles nothing
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[kind] = compiled


def _job(inputs, outputs, coefficients, seeds, stream) -> array[int]:
    """fewstep_lincomb (native), of tensors that fit."""
    batch, table = inputs[0].shape[0], coefficients.stride()
    sizes = (len(inputs), len(outputs), batch, inputs[0].numel() // batch)
    noise = (0, 0) if seeds is None else (seeds.data_ptr(), stream)
    at = (coefficients.data_ptr(), table[0] if len(table) == 3 else 0, *table[-2:], _CODES[coefficients.dtype])
    rows = [v for x in (*inputs, *outputs) for v in (x.data_ptr(), x.stride(0), _CODES[x.dtype])]
    return array("q", (*sizes, *noise, *at, *rows))


def _run(backend, inputs, outputs, job, coefficients, seeds) -> None:
    if backend == "triton":
        launch_triton(inputs, outputs, job, coefficients, seeds)
    else:
        native.call("lincomb", inputs[0], job.buffer_info()[0])


def launch(
    backend: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    coefficients: Tensor,
    seeds: Tensor | None,
    stream: int,
) -> None:
    """Write outputs from inputs: all of one sample layout, outputs apart from one another and from unequal inputs."""
    _run(backend, inputs, outputs, _job(inputs, outputs, coefficients, seeds, stream), coefficients, seeds)


def _fresh(
    inputs: Sequence[Tensor], coefficients: Tensor, dtypes: Sequence[torch.dtype] | None
) -> Sequence[Tensor] | None:
    """Outputs to write, like the first input; None where no dtypes can be told."""
    if dtypes is None:
        if coefficients.dim() < 2 or not all(isinstance(x, Tensor) for x in inputs):
            return None
        dtypes = [functools.reduce(torch.promote_types, {x.dtype for x in inputs})] * coefficients.shape[-2]
    elif not _CODES.keys() >= set(dtypes):
        return None
    return [torch.empty_like(inputs[0], dtype=dtype) for dtype in dtypes]


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
    first, noise = inputs[0], 0 if seeds is None else 1
    backend, _ = backends.choose("lincomb", "cpu" if first.is_cpu else "cuda" if first.is_cuda else "meta")
    most = MOST.get(backend)
    if most is None or len(inputs) + noise > most[0]:
        return None
    if out is None:
        out = _fresh(inputs, coefficients, dtypes)
    if not out or len(out) > most[1]:
        return None
    tensors = (*inputs, *out, coefficients) if seeds is None else (*inputs, *out, coefficients, seeds)
    if {*map(type, tensors)} != _PLAIN or any(map(_is_negative, tensors)):
        return None
    if torch.is_grad_enabled() and any(map(_wants_gradient, tensors)):
        return None
    if seeds is None:
        stream = 0
    elif type(stream) is not int or not 0 <= stream < 1 << 32:
        return None
    small = _SMALL if backend == "cpu" else 0
    code, job = native.look(tensors, len(inputs), len(out), noise, stream, small)
    if code == 0:
        _run(backend, inputs, out, job, coefficients, seeds)
    elif code != native.DONE:
        return None
    return tuple(out)
