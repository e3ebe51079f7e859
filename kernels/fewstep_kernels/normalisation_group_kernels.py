"""Groups that do not fit on chip, in Triton: partial moments per channel, their combination per group (Chan et al.
1983), then the map, each over tiles [TS, TC] of positions and channels. Gradients and tangents take two more passes of
that kind. No atomics: sums have one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .normalisation_formulas import Form
from .normalisation_row_kernels import OPTIONS, coefficients, per_sample, slope, vectors_of

TILE = 4096  # elements of a tile, where a group takes several


@triton.jit
def locate(channels, positions, chunks, LAST: tl.constexpr, TS: tl.constexpr, TC: tl.constexpr):
    """The tile of this program: sample, chunk, channel [TC], element offsets [TS, TC] and what of them exists."""
    blocks = tl.cdiv(channels, TC)
    index = tl.program_id(0) // blocks
    b = (index // chunks).to(tl.int64)
    chunk = index % chunks
    c = (tl.program_id(0) % blocks) * TC + tl.arange(0, TC)
    s = chunk * TS + tl.arange(0, TS)
    if LAST:
        offsets = s[:, None].to(tl.int64) * channels + c[None, :]
    else:
        offsets = c[None, :].to(tl.int64) * positions + s[:, None]
    inside = (s[:, None] < positions) & (c[None, :] < channels)
    return b, chunk, c, b * channels * positions + offsets, inside


@triton.jit
def moments_kernel(
    x,
    parts,  # [B, chunks, 2, C]
    channels,
    positions,
    chunks,
    LAST: tl.constexpr,
    TS: tl.constexpr,
    TC: tl.constexpr,
):
    b, chunk, c, offsets, inside = locate(channels, positions, chunks, LAST, TS, TC)
    z = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    m = tl.sum(z, 0) / tl.minimum(positions - chunk * TS, TS)  # [TC]
    z = tl.where(inside, z - m[None, :], 0.0)
    place = parts + (b * chunks + chunk) * 2 * channels + c
    tl.store(place, m, mask=c < channels)
    tl.store(place + channels, tl.sum(z * z, 0), mask=c < channels)


@triton.jit
def combine_kernel(
    parts,
    added,
    mean,
    rstd,
    added_stride,
    channels,
    groups,
    positions,
    chunks,
    eps,
    TS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    size = channels // groups
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, chunks * size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < chunks * size
        c = g * size + i % size
        count = tl.minimum(positions - (i // size) * TS, TS).to(tl.float32)
        m = tl.load(parts + (b * chunks + i // size) * 2 * channels + c, mask=inside, other=0.0)
        m = m + per_sample(added, added_stride, b, c, inside)
        total += tl.where(inside, m * count, 0.0)
    whole = size.to(tl.float32) * positions
    centre = tl.sum(total, 0) / whole
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, chunks * size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < chunks * size
        c = g * size + i % size
        count = tl.minimum(positions - (i // size) * TS, TS).to(tl.float32)
        place = parts + (b * chunks + i // size) * 2 * channels + c
        m = tl.load(place, mask=inside, other=0.0) + per_sample(added, added_stride, b, c, inside) - centre
        total += tl.where(inside, tl.load(place + channels, mask=inside, other=0.0) + m * m * count, 0.0)
    tl.store(mean + tl.program_id(0), centre)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(total, 0) / whole + eps))


@triton.jit
def group_kernel(
    x,
    moved,  # None: y; else the gradient of y, or the tangent of x
    out,
    mean,
    rstd,
    first,  # [B, G] means of v and of v xhat
    second,
    parts,  # not None: leave sums of v xhat and v in [B, chunks, 2, C] instead of out
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
    channels,
    groups,
    positions,
    chunks,
    TANGENT: tl.constexpr,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    TS: tl.constexpr,
    TC: tl.constexpr,
):
    b, chunk, c, offsets, inside = locate(channels, positions, chunks, LAST, TS, TC)
    live = c < channels
    group = b * groups + c // (channels // groups)
    r = tl.load(rstd + group, mask=live, other=0.0)
    m = tl.load(mean + group, mask=live, other=0.0) - per_sample(added, added_stride, b, c, live)
    a, shifted = coefficients(weight, bias, scale, shift, scale_stride, shift_stride, b, c, live)
    xhat = (tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - m[None, :]) * r[None, :]
    u = xhat * a[None, :] + shifted[None, :]
    if moved is None:
        if SILU:
            u = u * tl.sigmoid(u)
        tl.store(out + offsets, u.to(out.dtype.element_ty), mask=inside)
    else:
        v = tl.load(moved + offsets, mask=inside, other=0.0).to(tl.float32)
        if TANGENT:
            v = v + per_sample(tadded, tadded_stride, b, c, live)[None, :]
        elif SILU:
            v = v * slope(u)
        if parts is not None:
            v = tl.where(inside, v, 0.0)
            place = parts + (b * chunks + chunk) * 2 * channels + c
            tl.store(place, tl.sum(v * xhat, 0), mask=live)
            tl.store(place + channels, tl.sum(v, 0), mask=live)
        else:
            centre = tl.load(first + group, mask=live, other=0.0)
            along = tl.load(second + group, mask=live, other=0.0)
            if TANGENT:
                change = r[None, :] * (v - centre[None, :] - xhat * along[None, :])
                v = a[None, :] * change + per_sample(ta, ta_stride, b, c, live)[None, :] * xhat
                v = v + per_sample(tb, tb_stride, b, c, live)[None, :]
                if SILU:
                    v = v * slope(u)
            else:
                v = r[None, :] * (a[None, :] * v - centre[None, :] - xhat * along[None, :])
            tl.store(out + offsets, v.to(out.dtype.element_ty), mask=inside)


class Tiles:
    """How a tensor [B, C, positions], of either layout, is cut for the kernels over groups."""

    def __init__(self, x: Tensor) -> None:
        self.batch, self.channels = x.shape[:2]
        self.positions = x.numel() // (self.batch * self.channels)
        self.last = not x.is_contiguous()
        self.across = min(64, triton.next_power_of_2(self.channels)) if self.last else 1
        self.along = max(1, min(TILE // self.across, triton.next_power_of_2(self.positions)))
        self.chunks = triton.cdiv(self.positions, self.along)
        self.grid = (self.batch * self.chunks * triton.cdiv(self.channels, self.across),)
        self.constants = {"LAST": self.last, "TS": self.along, "TC": self.across}
        self.warps = max(1, min(8, self.along * self.across // 512))

    def parts(self, x: Tensor) -> Tensor:
        return x.new_empty((self.batch, self.chunks, 2, self.channels), dtype=torch.float32)


def statistics(form: Form, x: Tensor, added: Tensor | None, tiles: Tiles, mean: Tensor, rstd: Tensor) -> None:
    parts = tiles.parts(x)
    (added,), (stride,) = vectors_of(added)
    with torch.cuda.device_of(x):
        moments_kernel[tiles.grid](
            x,
            parts,
            tiles.channels,
            tiles.positions,
            tiles.chunks,
            num_warps=tiles.warps,
            **tiles.constants,
            **OPTIONS,
        )
        combine_kernel[(tiles.batch * form.groups,)](
            parts,
            added,
            mean,
            rstd,
            stride,
            tiles.channels,
            form.groups,
            tiles.positions,
            tiles.chunks,
            form.eps,
            TS=tiles.along,
            BLOCK=min(1024, triton.next_power_of_2(tiles.chunks * tiles.channels // form.groups)),
            num_warps=4,
            **OPTIONS,
        )


def apply(form, x, moved, out, mean, rstd, means, parts, given, changes, tiles, tangent) -> None:
    vectors, strides = vectors_of(*given, *changes)
    with torch.cuda.device_of(x):
        group_kernel[tiles.grid](
            x,
            moved,
            out,
            mean,
            rstd,
            *means,
            parts,
            *vectors,
            *strides[2:],
            tiles.channels,
            form.groups,
            tiles.positions,
            tiles.chunks,
            TANGENT=tangent,
            SILU=form.silu,
            num_warps=tiles.warps,
            **tiles.constants,
            **OPTIONS,
        )


def means_of(form: Form, sums: Tensor, a: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """(first, second) [B, G] from sums [B, 2, C] of v xhat and v, times a where v is a gradient."""
    weighted = sums if a is None else sums * a[:, None]
    grouped = weighted.unflatten(2, (form.groups, -1)).sum(3) / count  # [B, 2, G]
    return grouped[:, 1].contiguous(), grouped[:, 0].contiguous()
