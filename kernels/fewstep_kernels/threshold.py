"""Dynamic thresholding: every sample is clamped to a quantile of its own magnitudes and divided by it (Imagen,
arXiv:2205.11487, section 2.3): `y = clamp(x, -s, s) / s`, `s = clamp(quantile of |x|, least, most)`.

The quantile lies linearly between order statistics, exactly. C++ counts leading bits, then selects among the few
elements that share them; Triton narrows the bits of the answer down by sixteenths, eight passes for float32 (cached:
a sample is a few hundred kilobytes), so neither sorts. Bytes moved at best: three reads and a write. It does not help
under a compiler or with a derivative: both use the reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends, layout, native, reductions, registration

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def reference(x: Tensor, quantile: float, least: float = 1.0, most: float = math.inf) -> Tensor:
    """The defining implementation, in plain torch operations."""
    wide = reductions.wide([x])
    flat = reductions.samples(x).to(wide)
    magnitudes = flat.abs()
    position = quantile * (flat.shape[1] - 1)
    low = int(position)
    largest = torch.topk(magnitudes, flat.shape[1] - low).values  # in descending order
    below, above = largest[:, -1], largest[:, -2 if largest.shape[1] > 1 else -1]
    s = (below + (above - below) * (position - low)).clamp(least, most)[:, None]
    return (flat.clamp(-s, s) / s).to(x.dtype).view(x.shape)


if triton is not None:

    @triton.jit
    def _bits(x, inside, DOUBLE: tl.constexpr):
        """Bits of the magnitude, which order as the magnitudes do; -1 where there is no element."""
        if DOUBLE:
            word = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        else:
            word = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.where(inside, word, -1)

    @triton.jit
    def quantile_kernel(
        x,
        stride,
        out,  # [batch]: the thresholds
        count,
        low,  # the rank below the position
        numbers,  # float64: the fraction of the way to the next rank, least, most
        DOUBLE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        WORD: tl.constexpr = tl.int64 if DOUBLE else tl.int32
        WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        DIGITS: tl.constexpr = 16 if DOUBLE else 8
        b = tl.program_id(0).to(tl.int64)
        row = x + b * stride
        # the largest word with at most `low` smaller ones is the element of that rank
        found = tl.zeros([], WORD)
        for digit in range(DIGITS):
            shift = (DIGITS - 1 - digit) * 4
            steps = tl.arange(0, 16).to(WORD)
            candidates = found + (steps << shift)
            smaller = tl.zeros([16], tl.int32)
            for start in range(0, count, BLOCK):
                offsets = tl.arange(0, BLOCK)
                inside = offsets < count - start
                words = _bits(tl.load(row + start + offsets, mask=inside, other=0.0), inside, DOUBLE)
                less = (words[:, None] < candidates[None, :]) & (words >= 0)[:, None]
                smaller += tl.sum(less.to(tl.int32), 0)
            # the first sixteenth's top half would set the sign bit: no magnitude has it
            allowed = (smaller <= low) & (candidates >= found)
            found = tl.max(tl.where(allowed, candidates, found), 0)
        following = tl.full([], -1, WORD)
        through = tl.zeros([], tl.int32)
        for start in range(0, count, BLOCK):
            offsets = tl.arange(0, BLOCK)
            inside = offsets < count - start
            words = _bits(tl.load(row + start + offsets, mask=inside, other=0.0), inside, DOUBLE)
            through += tl.sum(((words >= 0) & (words <= found)).to(tl.int32), 0)
            # as unsigned numbers, so that "none" (-1) is the largest
            greater = tl.where(words > found, words, -1)
            unsigned: tl.constexpr = tl.uint64 if DOUBLE else tl.uint32
            least_greater = tl.min(greater.to(unsigned, bitcast=True), 0)
            following = tl.minimum(following.to(unsigned, bitcast=True), least_greater).to(WORD, bitcast=True)
        following = tl.where((through > low + 1) | (following == -1), found, following)
        below = found.to(WIDE, bitcast=True)
        above = following.to(WIDE, bitcast=True)
        s = below + (above - below) * tl.load(numbers).to(WIDE)
        tl.store(out + b, tl.minimum(tl.maximum(s, tl.load(numbers + 1).to(WIDE)), tl.load(numbers + 2).to(WIDE)))

    @triton.jit
    def clamp_kernel(x, stride, out, out_stride, thresholds, count, blocks, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
        b = (tl.program_id(0) // blocks).to(tl.int64)
        offsets = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < count
        s = tl.load(thresholds + b)
        value = tl.load(x + b * stride + offsets, mask=inside)
        value = value if DOUBLE else value.to(tl.float32)
        value = tl.where(value < -s, -s, tl.where(value > s, s, value))
        value = value / s if DOUBLE else tl.div_rn(value, s)
        kind = out.dtype.element_ty
        target = out + b * out_stride + offsets
        tl.store(target, value if kind == tl.float64 else value.to(tl.float32).to(kind), mask=inside)


def _call_triton(x, out, position, least, most) -> None:
    batch, count = x.shape[0], math.prod(x.shape[1:])
    wide = reductions.wide([x])
    thresholds = torch.empty(batch, dtype=wide, device=x.device)
    block = min(1024, max(16, triton.next_power_of_2(count)))
    blocks = triton.cdiv(count, block)
    low = int(position)
    with torch.cuda.device_of(x):
        quantile_kernel[(batch,)](
            x,
            x.stride(0),
            thresholds,
            count,
            low,
            reductions.device_table(((position - low, least, most),), torch.float64, x.device),
            DOUBLE=wide == torch.float64,
            BLOCK=block,
            num_warps=8,
            enable_fp_fusion=False,
        )
        clamp_kernel[(batch * blocks,)](
            x,
            x.stride(0),
            out,
            out.stride(0),
            thresholds,
            count,
            blocks,
            DOUBLE=wide == torch.float64,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _threshold(x, quantile, least, most):
    backend, _ = backends.choose("threshold", x.device.type)
    if backend == "reference" or x.numel() == 0 or x.dtype not in native.DTYPES:
        return reference(x, quantile, least, most) if x.numel() else torch.empty_like(x)
    (read,) = reductions.one_layout([x])
    out = layout.like_sample(read, None, x.dtype)
    count = math.prod(x.shape[1:])
    position = quantile * (count - 1)
    if backend == "triton":
        _call_triton(read, out, position, least, most)
    else:
        native.call("threshold", x, x.shape[0], count, reductions.rows([read, out]), position, least, most)
    return out


_raw = registration.define(
    "_threshold(Tensor x, float quantile, float least, float most) -> Tensor",
    _threshold,
    lambda x, quantile, least, most: torch.empty_like(x),
)


def threshold(x: Tensor, quantile: float = 0.995, *, least: float = 1.0, most: float = math.inf) -> Tensor:
    """clamp(x, -s, s) / s with s the quantile of a sample's |x|, kept within least and most.

    x: [B, ...], any floating dtype and layout. quantile: 0 to 1, of all elements of a sample, linear between ranks.
    least = 1 leaves samples alone whose quantile is within [-1, 1]. Returns a tensor like x; where a derivative is
    taken, the reference's. NaN counts as the largest magnitude. Raises TypeError/ValueError naming what does not fit.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"threshold takes a floating-point tensor; got {getattr(x, 'dtype', type(x).__name__)}.")
    if x.ndim == 0:
        raise ValueError("threshold takes a tensor [B, ...]; got a single number.")
    if not 0 <= quantile <= 1:
        raise ValueError(f"threshold's quantile must be in [0, 1]; got {quantile}.")
    if not 0 < least <= most:
        raise ValueError(f"threshold's bounds must satisfy 0 < least <= most; got {least} and {most}.")
    if registration.tracing() or registration.differentiating([x]):
        return reference(x, quantile, least, most)
    return _raw(x, float(quantile), float(least), float(most))
