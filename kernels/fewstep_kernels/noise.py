"""Counter-based random numbers: the same seed gives the same bits whatever the batch, the thread or the backend.

Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key is a sample's int64 seed,
the counter is `(g_low, g_high, stream, 0)` with g = element // 4; the four words of a block serve elements 4g .. 4g+3,
elements being numbered in row-major order inside the sample.

    uniform   word / 2^32, truncated to the bits the dtype holds, so it never reaches 1
    normal    Box-Muller on word pairs (w0, w1) and (w2, w3): sqrt(-2 log u) (cos 2 pi v, sin 2 pi v),
              u = (w + 1/2) / 2^32, v = w' / 2^32; |normal| < 6.77

log, square root, sin and cos are fixed float64 sequences of +, -, * and / alone, which IEEE 754 rounds alike
everywhere. Libraries' own functions differ in the last bit between vector bodies and tails (torch.sqrt in float64 is 1
ulp off for 1% of its arguments where MKL serves it). The float64 result is accurate to a few ulp and is then rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_functorch_wrapped_tensor

from . import backends, native, registration

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_ROOT_GUESS = 0x5FE6EB50C7B537A9
_ATANH = tuple(1.0 / (2 * n + 1) for n in range(11, -1, -1))
_SINE = tuple((-1.0) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1))
_COSINE = tuple((-1.0) ** n / math.factorial(2 * n) for n in range(9, -1, -1))
_UNIFORM_BITS = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. counter (four) and key (two): int64 tensors holding 32-bit words; returns four such."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps modulo 2^64; both halves survive
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def _words(seeds: Tensor, groups: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    group = torch.arange(groups, dtype=torch.int64, device=seeds.device)  # [G]
    seeds = seeds[:, None]  # [B, 1]
    zero = torch.zeros_like(group)
    counter = (group & _WORD, group >> 32, zero + stream, zero)
    return philox(counter, (seeds & _WORD, seeds >> 32 & _WORD))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * x + coefficient
    return total


def _log_uniform(word: Tensor) -> Tensor:
    """log((word + 1/2) / 2^32) in float64."""
    u = (word.double() + 0.5) * 2.0**-32
    bits = u.view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    mantissa = (bits - (exponent << 52)).view(torch.float64)  # [sqrt(1/2), sqrt(2))
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent.double() * math.log(2.0) + (s + s) * _polynomial(s * s, _ATANH)


def _square_root(x: Tensor) -> Tensor:
    """x y, y = 1 / sqrt(x) by four Newton steps from a guess made of x's bits (error 3.4e-2, then its square, ...)."""
    y = (_ROOT_GUESS - (x.view(torch.int64) >> 1)).view(torch.float64)
    half = x * 0.5
    for _ in range(4):
        y = y * (1.5 - half * y * y)
    return x * y


def _turn(word: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of 2 pi word / 2^32 in float64."""
    quarter = (word + (1 << 29)) >> 30
    angle = (word - (quarter << 30)).double() * (2.0 * math.pi * 2.0**-32)  # [-pi/4, pi/4)
    square = angle * angle
    cosine, sine = _polynomial(square, _COSINE), angle * _polynomial(square, _SINE)
    odd = (quarter & 1).bool()
    flip_cosine = 1.0 - ((quarter + 1) & 2).double()
    flip_sine = 1.0 - (quarter & 2).double()
    return torch.where(odd, sine, cosine) * flip_cosine, torch.where(odd, cosine, sine) * flip_sine


def normal_reference(seeds: Tensor, count: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers [B, count] in plain torch operations."""
    words = _words(seeds, -(-count // 4), stream)
    columns = []
    for radius_word, turn_word in (words[:2], words[2:]):
        radius = _square_root(_log_uniform(radius_word) * -2.0)
        columns += [radius * part for part in _turn(turn_word)]
    return torch.stack(columns, -1).flatten(1)[:, :count].to(dtype)


def uniform_reference(seeds: Tensor, count: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Uniform numbers [B, count] in [0, 1) in plain torch operations."""
    bits = _UNIFORM_BITS[dtype]
    words = torch.stack(_words(seeds, -(-count // 4), stream), -1).flatten(1)[:, :count]
    return ((words >> (32 - bits)).double() * 2.0**-bits).to(dtype)


if triton is not None:

    @triton.jit
    def _triton_polynomial(x, coefficients):
        total = x * coefficients[0] + coefficients[1]
        for i in tl.static_range(2, len(coefficients)):
            total = total * x + coefficients[i]
        return total

    @triton.jit
    def _triton_box_muller(radius_word, turn_word):
        # The jit takes no tuples from outside: these are _ATANH, _SINE and _COSINE written out.
        atanh = (1 / 23, 1 / 21, 1 / 19, 1 / 17, 1 / 15, 1 / 13, 1 / 11, 1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0)
        sines = (
            1 / 355687428096000,
            -1 / 1307674368000,
            1 / 6227020800,
            -1 / 39916800,
            1 / 362880,
            -1 / 5040,
            1 / 120,
            -1 / 6,
            1.0,
        )
        cosines = (
            -1 / 6402373705728000,
            1 / 20922789888000,
            -1 / 87178291200,
            1 / 479001600,
            -1 / 3628800,
            1 / 40320,
            -1 / 720,
            1 / 24,
            -1 / 2,
            1.0,
        )
        u = (radius_word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        bits = u.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
        mantissa = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
        s = (mantissa - 1.0) / (mantissa + 1.0)
        log = exponent.to(tl.float64) * 0.6931471805599453 + (s + s) * _triton_polynomial(s * s, atanh)
        square = log * -2.0
        half = square * 0.5
        y = (0x5FE6EB50C7B537A9 - (square.to(tl.int64, bitcast=True) >> 1)).to(tl.float64, bitcast=True)
        for _ in tl.static_range(4):
            y = y * (1.5 - half * y * y)
        radius = square * y
        word = turn_word.to(tl.int64)
        quarter = (word + 536870912) >> 30
        angle = (word - (quarter << 30)).to(tl.float64) * 1.4629180792671596e-09
        square = angle * angle
        cosine = _triton_polynomial(square, cosines)
        sine = angle * _triton_polynomial(square, sines)
        odd = (quarter & 1) != 0
        first = tl.where(odd, sine, cosine) * (1.0 - ((quarter + 1) & 2).to(tl.float64))
        second = tl.where(odd, cosine, sine) * (1.0 - (quarter & 2).to(tl.float64))
        return radius * first, radius * second

    @triton.jit
    def _triton_words(seed, stream, group):
        """Four uint32 words for each int64 group."""
        c0 = group.to(tl.uint32)
        c1 = (group >> 32).to(tl.uint32)
        c2 = (group * 0 + stream).to(tl.uint32)
        c3 = c1 * 0
        k0 = seed.to(tl.uint32)
        k1 = (seed >> 32).to(tl.uint32)
        for _ in tl.static_range(10):
            a = tl.full(c0.shape, 0xD2511F53, tl.uint32)
            b = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
            low0, high0 = c0 * a, tl.umulhi(c0, a)
            low1, high1 = c2 * b, tl.umulhi(c2, b)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
            k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
        return c0, c1, c2, c3

    @triton.jit
    def triton_normal(seed, stream, group, BLOCK: tl.constexpr):
        """BLOCK standard normal numbers in float64, from element 4 group on. Compile with enable_fp_fusion=False."""
        w0, w1, w2, w3 = _triton_words(seed, stream, group + tl.arange(0, BLOCK // 4))
        z0, z1 = _triton_box_muller(w0, w1)
        z2, z3 = _triton_box_muller(w2, w3)
        return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))

    @triton.jit
    def draw_kernel(
        seeds, stream, out, count, blocks, BITS: tl.constexpr, BLOCK: tl.constexpr
    ):  # BITS: 0 for normal numbers, else the bits of a uniform one
        b = (tl.program_id(0) // blocks).to(tl.int64)
        start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        seed = tl.load(seeds + b)
        if BITS == 0:
            values = triton_normal(seed, stream, start // 4, BLOCK)
        else:
            w0, w1, w2, w3 = _triton_words(seed, stream, start // 4 + tl.arange(0, BLOCK // 4))
            words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            values = (words >> (32 - BITS)).to(tl.float64) * (1.0 / (1 << BITS))
        tl.store(
            out + b * count + offsets,
            values.to(tl.float32).to(out.dtype.element_ty) if out.dtype.element_ty != tl.float64 else values,
            mask=offsets < count,
        )


def check_seeds(seeds: Tensor, stream: int, dtype: torch.dtype = torch.float32) -> None:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
        given = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"seeds must be an int64 tensor [B], one seed per sample; got {given}.")
    if not 0 <= stream <= _WORD:
        raise ValueError(f"stream must be in [0, 2^32); got {stream}.")
    if dtype not in _UNIFORM_BITS:
        raise TypeError(f"random numbers come as float64, float32, float16 or bfloat16; got {dtype}.")


def _draw(kind: str, seeds: Tensor, count: int, stream: int, dtype: torch.dtype) -> Tensor:
    backend, _ = backends.choose(kind, seeds.device.type)
    if backend == "reference":
        return (normal_reference if kind == "normal" else uniform_reference)(seeds, count, stream, dtype)
    out = torch.empty(len(seeds), count, dtype=dtype, device=seeds.device)
    if out.numel() == 0:
        return out
    seeds = seeds.contiguous()
    if backend == "triton":
        block = min(1024, max(16, triton.next_power_of_2(count)))
        blocks = triton.cdiv(count, block)
        bits = 0 if kind == "normal" else _UNIFORM_BITS[dtype]
        with native.on_device_of(seeds):
            draw_kernel[(len(seeds) * blocks,)](
                seeds, stream, out, count, blocks, BITS=bits, BLOCK=block, num_warps=4, enable_fp_fusion=False
            )
    else:
        native.call(kind, seeds, seeds.data_ptr(), len(seeds), count, stream, out.data_ptr(), native.DTYPES[dtype])
    return out


_raw = registration.define(
    "_draw(str kind, Tensor seeds, SymInt count, int stream, ScalarType dtype) -> Tensor",
    _draw,
    lambda kind, seeds, count, stream, dtype: seeds.new_empty((seeds.shape[0], count), dtype=dtype),
)


def draw(kind: str, seeds: Tensor, count: int, stream: int, dtype: torch.dtype) -> Tensor:
    """[B, count] numbers; kind is "normal" or "uniform". Seeds have no derivatives; under vmap the reference serves."""
    if registration.tracing() or is_batchedtensor(seeds):
        return (normal_reference if kind == "normal" else uniform_reference)(seeds, count, stream, dtype)
    # A transform's backward pass runs with no level on the stack, on seeds that it still wraps.
    if type(seeds) is Tensor and not is_functorch_wrapped_tensor(seeds) and registration.quiet():
        return _draw(kind, seeds, count, stream, dtype)
    return _raw(kind, seeds, count, stream, dtype)


def normal(seeds: Tensor, shape: Sequence[int], *, stream: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers [B, *shape], one independent sequence for each (seed, stream).

    seeds: int64 [B]. Every sample's numbers depend on its own seed only. Raises TypeError/ValueError on other seeds or
    streams.
    """
    check_seeds(seeds, stream, dtype)
    return draw("normal", seeds, math.prod(shape), stream, dtype).view(len(seeds), *shape)


def uniform(seeds: Tensor, shape: Sequence[int] = (), *, stream: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers [B, *shape] in [0, 1), one independent sequence for each (seed, stream). seeds: int64 [B]."""
    check_seeds(seeds, stream, dtype)
    return draw("uniform", seeds, math.prod(shape), stream, dtype).view(len(seeds), *shape)
