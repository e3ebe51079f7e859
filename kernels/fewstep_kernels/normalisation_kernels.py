"""The normalisation pairs in Triton.

Rows, and groups that fit on chip, take one launch: `row_kernel`. Larger groups take three, each over tiles [TS, TC] of
positions and channels: partial moments per channel, their combination per group (Chan et al. 1983), then the map. The
gradient and the tangent of groups take two more passes of that kind. No atomics: sums have one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .normalisation import LONGEST_ROW, Form, Parameters

MOST = LONGEST_ROW  # elements of a group that one program holds
TILE = 4096  # elements of a tile, where a group takes several
PROGRAMS = 512  # that share the rows of a gradient; fixed, so that sums have one order on every GPU
ROWS, PLANES, LAST = 0, 1, 2  # layouts of row_kernel


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


OPTIONS = {"enable_fp_fusion": True}


def _vectors(*parameters: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Parameters with neighbouring channels, and their batch strides (0 where all samples share one)."""
    vectors = [p if p is None or p.stride(-1) == 1 else p.contiguous() for p in parameters]
    strides = [0 if p is None or p.ndim == 1 or p.shape[0] == 1 else p.stride(0) for p in vectors]
    return vectors, strides


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _rows(form, x, moved, out, mean, rstd, given, changes) -> None:
    vectors, strides = _vectors(*given, *changes)
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


class _Tiles:
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


def _statistics(form: Form, x: Tensor, added: Tensor | None, tiles: _Tiles, mean: Tensor, rstd: Tensor) -> None:
    parts = tiles.parts(x)
    (added,), (stride,) = _vectors(added)
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


def _map(form, x, moved, out, mean, rstd, means, parts, given, changes, tiles, tangent) -> None:
    vectors, strides = _vectors(*given, *changes)
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


def _fits(form: Form, x: Tensor) -> bool:
    return not form.groups or x.numel() // (x.shape[0] * form.groups) <= MOST


def forward(form: Form, x: Tensor, given: Parameters, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    if _fits(form, x):
        _rows(form, x, None, y, mean, rstd, given, (None, None, None))
        return
    tiles = _Tiles(x)
    _statistics(form, x, given.input_shift, tiles, mean, rstd)
    _map(form, x, None, y, mean, rstd, (None, None), None, given, (None, None, None), tiles, False)


def _means(form: Form, sums: Tensor, a: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """(first, second) [B, G] from sums [B, 2, C] of v xhat and v, times a where v is a gradient."""
    weighted = sums if a is None else sums * a[:, None]
    grouped = weighted.unflatten(2, (form.groups, -1)).sum(3) / count  # [B, 2, G]
    return grouped[:, 1].contiguous(), grouped[:, 0].contiguous()


def backward(
    form: Form,
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    given: Parameters,
    dx: Tensor,
    da: Tensor,
    db: Tensor,
) -> None:
    if form.groups:
        tiles = _Tiles(x)
        parts = tiles.parts(x)
        arguments = (given, (None, None, None), tiles, False)
        _map(form, x, gradient, dx, mean, rstd, (None, None), parts, *arguments)
        sums = parts.sum(1)  # [B, 2, C]
        a = torch.ones_like(da) if given.weight is None else given.weight.float().expand_as(da)
        a = a if given.scale is None else a * (1 + given.scale.float())
        means = _means(form, sums, a, x.numel() // (x.shape[0] * form.groups))
        _map(form, x, gradient, dx, mean, rstd, means, None, *arguments)
    else:
        width = x.shape[-1]
        positions = x.numel() // (x.shape[0] * width)
        rows_each = triton.cdiv(positions, max(1, min(positions, PROGRAMS // x.shape[0])))
        pieces = triton.cdiv(positions, rows_each)
        parts = x.new_empty((x.shape[0], pieces, 2, width), dtype=torch.float32)
        vectors, strides = _vectors(*given[:4])
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
        sums = parts.sum(1)
    da.copy_(sums[:, 0])
    db.copy_(sums[:, 1])


def tangent(
    form: Form,
    x: Tensor,
    tx: Tensor,
    given: Parameters,
    ta: Tensor | None,
    tb: Tensor | None,
    tadded: Tensor | None,
    ty: Tensor,
) -> None:
    changes = (ta, tb, tadded)
    if _fits(form, x):
        _rows(form, x, tx, ty, None, None, given, changes)
        return
    tiles = _Tiles(x)
    mean = x.new_empty((x.shape[0], form.groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _statistics(form, x, given.input_shift, tiles, mean, rstd)
    parts = tiles.parts(x)
    _map(form, x, tx, ty, mean, rstd, (None, None), parts, given, changes, tiles, True)
    means = _means(form, parts.sum(1), None, x.numel() // (x.shape[0] * form.groups))
    _map(form, x, tx, ty, mean, rstd, means, None, given, changes, tiles, True)
