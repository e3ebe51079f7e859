"""Rows, and groups that fit on chip, in Triton: one launch for values or tangents, one for a row's gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .normalisation_formulas import Form, Parameters

PROGRAMS = 512  # that share the rows of a gradient; fixed, so that sums have one order on every GPU
ROWS, PLANES, LAST = 0, 1, 2  # layouts of row_kernel
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def coefficients(weight, bias, scale, shift, scale_stride, shift_stride, b, channel, inside):
    """a and b of u = a xhat + b, shaped like channel."""
    a = tl.full(channel.shape, 1.0, tl.float32)
    c = tl.full(channel.shape, 0.0, tl.float32)
    if weight is not None:
        a = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        c = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        kept = 1.0 + tl.load(scale + b * scale_stride + channel, mask=inside, other=0.0).to(tl.float32)
        a = a * kept
        c = c * kept
    if shift is not None:
        c = c + tl.load(shift + b * shift_stride + channel, mask=inside, other=0.0).to(tl.float32)
    return a, c


@triton.jit
def per_sample(p, stride, b, channel, inside):
    """Values [.., C] of sample b; zeros where absent."""
    value = tl.full(channel.shape, 0.0, tl.float32)
    if p is not None:
        value = tl.load(p + b * stride + channel, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def slope(u):
    gate = tl.sigmoid(u)
    return gate * (1.0 + u * (1.0 - gate))


@triton.jit
def row_kernel(
    x,
    moved,  # None: y = f(x); else the tangent of x: its image
    out,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    added,
    ta,
    tb,
    tadded,
    scale_stride,
    shift_stride,
    added_stride,
    ta_stride,
    tb_stride,
    tadded_stride,
    rows_in_sample,
    channels,
    n,  # elements in a row or group
    eps,
    LAYOUT: tl.constexpr,  # 0 rows, 1 planes, 2 channels last
    INNER: tl.constexpr,  # planes: positions; channels last: channels in a group
    CENTRED: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // rows_in_sample
    g = row % rows_in_sample
    i = tl.arange(0, BLOCK)
    inside = i < n
    if LAYOUT == 0:
        channel = i
        offsets = row * n + i
    elif LAYOUT == 1:
        channel = g * (n // INNER) + i // INNER
        offsets = row * n + i
    else:
        channel = g * INNER + i % INNER
        offsets = b * rows_in_sample * n + (i // INNER).to(tl.int64) * channels + channel
    z = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        z = z + per_sample(added, added_stride, b, channel, inside)
    m = 0.0
    if CENTRED:
        m = tl.sum(tl.where(inside, z, 0.0), 0) / n
    z = tl.where(inside, z - m, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(z * z, 0) / n + eps)
    xhat = z * r
    a, c = coefficients(weight, bias, scale, shift, scale_stride, shift_stride, b, channel, inside)
    u = xhat * a + c
    if moved is None:
        if SILU:
            u = u * tl.sigmoid(u)
        tl.store(mean + row, m)
        tl.store(rstd + row, r)
    else:
        v = tl.load(moved + offsets, mask=inside, other=0.0).to(tl.float32)
        if tadded is not None:
            v = v + per_sample(tadded, tadded_stride, b, channel, inside)
        v = tl.where(inside, v, 0.0)
        change = v - xhat * (tl.sum(v * xhat, 0) / n)
        if CENTRED:
            change = change - tl.sum(v, 0) / n
        image = a * (r * change) + per_sample(ta, ta_stride, b, channel, inside) * xhat
        image = image + per_sample(tb, tb_stride, b, channel, inside)
        u = image * slope(u) if SILU else image
    tl.store(out + offsets, u.to(out.dtype.element_ty), mask=inside)


@triton.jit
def row_backward_kernel(
    gradient,
    x,
    dx,
    mean,
    rstd,
    parts,  # [B, pieces, 2, D]
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    positions,
    n,
    pieces,
    rows_each,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    i = tl.arange(0, BLOCK)
    inside = i < n
    a, _ = coefficients(weight, bias, scale, shift, scale_stride, shift_stride, b, i, inside)
    da = tl.full((BLOCK,), 0.0, tl.float32)
    db = tl.full((BLOCK,), 0.0, tl.float32)
    for step in range(rows_each):
        line = piece * rows_each + step
        row = b * positions + line
        live = line < positions
        present = inside & live
        v = tl.load(gradient + row * n + i, mask=present, other=0.0).to(tl.float32)
        z = tl.load(x + row * n + i, mask=present, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=live, other=0.0)
        xhat = tl.where(present, (z - tl.load(mean + row, mask=live, other=0.0)) * r, 0.0)
        da += v * xhat
        db += v
        v = v * a
        change = v - xhat * (tl.sum(v * xhat, 0) / n)
        if CENTRED:
            change = change - tl.sum(v, 0) / n
        tl.store(dx + row * n + i, (r * change).to(dx.dtype.element_ty), mask=present)
    place = parts + (b * pieces + piece) * 2 * n
    tl.store(place + i, da, mask=inside)
    tl.store(place + n + i, db, mask=inside)


def vectors_of(*parameters: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Parameters with neighbouring channels, and their batch strides (0 where all samples share one)."""
    vectors = [p if p is None or p.stride(-1) == 1 else p.contiguous() for p in parameters]
    strides = [0 if p is None or p.ndim == 1 or p.shape[0] == 1 else p.stride(0) for p in vectors]
    return vectors, strides


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rows(form, x, moved, out, mean, rstd, given, changes) -> None:
    vectors, strides = vectors_of(*given, *changes)
    channels = x.shape[1] if form.groups else x.shape[-1]
    if not form.groups:
        layout, inner, n, in_sample = ROWS, 1, channels, x.numel() // (x.shape[0] * channels)
    else:
        n, in_sample = x.numel() // (x.shape[0] * form.groups), form.groups
        layout = PLANES if x.is_contiguous() else LAST
        inner = n // (channels // form.groups) if layout == PLANES else channels // form.groups
    block = triton.next_power_of_2(n)
    with torch.cuda.device_of(x):
        row_kernel[(x.shape[0] * in_sample,)](
            x,
            moved,
            out,
            mean,
            rstd,
            *vectors,
            *strides[2:],
            in_sample,
            channels,
            n,
            form.eps,
            LAYOUT=layout,
            INNER=inner,
            CENTRED=form.centred,
            SILU=form.silu,
            BLOCK=block,
            num_warps=_warps(block),
            **OPTIONS,
        )


def rows_backward(form: Form, gradient, x: Tensor, mean, rstd, given: Parameters, dx: Tensor) -> Tensor:
    """Writes the gradient of rows to dx; returns the sums [B, 2, D] of v xhat and of v."""
    width = x.shape[-1]
    positions = x.numel() // (x.shape[0] * width)
    rows_each = triton.cdiv(positions, max(1, min(positions, PROGRAMS // x.shape[0])))
    pieces = triton.cdiv(positions, rows_each)
    parts = x.new_empty((x.shape[0], pieces, 2, width), dtype=torch.float32)
    vectors, strides = vectors_of(*given[:4])
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        row_backward_kernel[(x.shape[0] * pieces,)](
            gradient,
            x,
            dx,
            mean,
            rstd,
            parts,
            *vectors,
            *strides[2:],
            positions,
            width,
            pieces,
            rows_each,
            CENTRED=form.centred,
            BLOCK=block,
            num_warps=_warps(block),
            **OPTIONS,
        )
    return parts.sum(1)
