"""The Triton kernels of `distance`: partial sums of the values or of their tangent, and both gradients in one pass."""

from __future__ import annotations

import math

import torch

from . import reductions

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def _load(pointer, stride, b, offsets, inside, WIDE: tl.constexpr):
        # float32 first: the interpreter knows no other way out of bfloat16
        x = tl.load(pointer + b * stride + offsets, mask=inside, other=0.0)
        return x.to(WIDE) if x.dtype == tl.float64 else x.to(tl.float32).to(WIDE)

    @triton.jit
    def _root(x):
        return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)

    @triton.jit
    def _value(d, c, KIND: tl.constexpr):
        if KIND == 0:
            return d * d
        if KIND == 1:
            return tl.abs(d)
        return d * d / (_root(d * d + c * c) + c)

    @triton.jit
    def _slope(d, c, KIND: tl.constexpr):
        if KIND == 0:
            return d + d
        if KIND == 1:
            return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d)).to(d.dtype)
        return d / _root(d * d + c * c)

    @triton.jit
    def distance_kernel(
        tensors,  # a, b, then the weight, a's tangent and b's as flagged
        strides,  # their batch strides, in elements
        partials,  # [batch, blocks]
        c,  # float64 [1]
        count,
        blocks,  # cdiv(count, STEPS * BLOCK)
        KIND: tl.constexpr,
        WEIGHT: tl.constexpr,
        ALONG_A: tl.constexpr,
        ALONG_B: tl.constexpr,
        WIDE: tl.constexpr,
        STEPS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        b = program // blocks
        start = (program % blocks) * STEPS * BLOCK
        constant = tl.load(c).to(WIDE)
        total = tl.zeros([BLOCK], WIDE)
        for step in tl.static_range(STEPS):
            offsets = start + step * BLOCK + tl.arange(0, BLOCK)
            inside = offsets < count
            d = _load(tensors[0], strides[0], b, offsets, inside, WIDE)
            d -= _load(tensors[1], strides[1], b, offsets, inside, WIDE)
            term = _slope(d, constant, KIND) if ALONG_A or ALONG_B else _value(d, constant, KIND)
            if WEIGHT:
                term *= _load(tensors[2], strides[2], b, offsets, inside, WIDE)
            if ALONG_A and ALONG_B:
                along = _load(tensors[2 + WEIGHT], strides[2 + WEIGHT], b, offsets, inside, WIDE)
                term *= along - _load(tensors[3 + WEIGHT], strides[3 + WEIGHT], b, offsets, inside, WIDE)
            elif ALONG_A:
                term *= _load(tensors[2 + WEIGHT], strides[2 + WEIGHT], b, offsets, inside, WIDE)
            elif ALONG_B:
                term *= -_load(tensors[2 + WEIGHT], strides[2 + WEIGHT], b, offsets, inside, WIDE)
            total += term
        tl.store(partials + program, tl.sum(total, 0))

    @triton.jit
    def distance_gradient_kernel(
        tensors,  # a, b, then the weight as flagged
        strides,
        gradients,  # of a and of b, as flagged
        gradient_strides,
        scales,
        c,  # float64 [1]
        count,
        blocks,
        KIND: tl.constexpr,
        WEIGHT: tl.constexpr,
        OF_A: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        b = (tl.program_id(0) // blocks).to(tl.int64)
        offsets = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < count
        d = _load(tensors[0], strides[0], b, offsets, inside, WIDE)
        d -= _load(tensors[1], strides[1], b, offsets, inside, WIDE)
        found = _slope(d, tl.load(c).to(WIDE), KIND)
        if WEIGHT:
            found *= _load(tensors[2], strides[2], b, offsets, inside, WIDE)
        found *= tl.load(scales + b).to(WIDE)
        for n in tl.static_range(len(gradients)):
            target = gradients[n] + b * gradient_strides[n] + offsets
            kind = target.dtype.element_ty
            signed = found if OF_A and n == 0 else -found
            tl.store(target, signed if kind == tl.float64 else signed.to(tl.float32).to(kind), mask=inside)


def _block(count: int, steps: int) -> int:
    return min(1024, max(16, triton.next_power_of_2(-(-count // steps))))


def add_up(kind, c, given, tangents, out) -> None:
    """Write the sums, or with tangents their derivatives, into out [B]. given: a, b and the weight or None."""
    a, steps = given[0], 4
    batch, count = a.shape[0], math.prod(a.shape[1:])
    block = _block(count, steps)
    blocks = triton.cdiv(count, steps * block)
    partials = out.new_empty(batch, blocks, 1)
    tensors = [x for x in (*given, *tangents) if x is not None]
    with torch.cuda.device_of(a):
        distance_kernel[(batch * blocks,)](
            tuple(tensors),
            tuple(x.stride(0) for x in tensors),
            partials,
            reductions.device_table(((c,),), torch.float64, a.device),
            count,
            blocks,
            KIND=kind,
            WEIGHT=given[2] is not None,
            ALONG_A=tangents[0] is not None,
            ALONG_B=tangents[1] is not None,
            WIDE=tl.float64 if out.dtype == torch.float64 else tl.float32,
            STEPS=steps,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    reductions.finish(partials, [out])


def write_gradients(kind, c, scale, given, gradients, wide) -> None:
    """Write the gradients that are not None; scale [B]; arithmetic in wide."""
    a = given[0]
    batch, count = a.shape[0], math.prod(a.shape[1:])
    block = _block(count, 1)
    blocks = triton.cdiv(count, block)
    tensors = [x for x in given if x is not None]
    targets = [x for x in gradients if x is not None]
    with torch.cuda.device_of(a):
        distance_gradient_kernel[(batch * blocks,)](
            tuple(tensors),
            tuple(x.stride(0) for x in tensors),
            tuple(targets),
            tuple(x.stride(0) for x in targets),
            scale,
            reductions.device_table(((c,),), torch.float64, a.device),
            count,
            blocks,
            KIND=kind,
            WEIGHT=given[2] is not None,
            OF_A=gradients[0] is not None,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
