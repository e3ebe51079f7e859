"""Counter-based random numbers: the same seed gives the same bits whatever the batch, the thread or the backend.

Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key is a sample's int64 seed, the counter is
`(g_low, g_high, stream, 0)` with g = element // 4; the four words of a block serve elements 4g .. 4g+3, elements being
numbered in row-major order inside the sample.

    uniform   word / 2^32, truncated to the bits the dtype holds, so it never reaches 1
    normal    Box-Muller on word pairs (w0, w1) and (w2, w3): sqrt(-2 log u) (cos 2 pi v, sin 2 pi v),
              u = (w + 1/2) / 2^32, v = w' / 2^32; |normal| < 6.77

log, sin and cos are fixed polynomials in float64 made of +, -, *, / and sqrt alone, which IEEE 754 rounds alike everywhere: libraries' own
functions differ in the last bit between vector bodies and tails. The float64 result is accurate to a few ulp and is then rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_ATANH = tuple(1.0 / (2 * n + 1) for n in range(11, -1, -1))
_SINE = tuple((-1.0) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1))
_COSINE = tuple((-1.0) ** n / math.factorial(2 * n) for n in range(9, -1, -1))
_UNIFORM_BITS = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. counter: four and key: two int64 tensors holding 32-bit words; returns four words alike."""
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
        radius = (_log_uniform(radius_word) * -2.0).sqrt()
        columns += [radius * part for part in _turn(turn_word)]
    return torch.stack(columns, -1).flatten(1)[:, :count].to(dtype)


def uniform_reference(seeds: Tensor, count: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Uniform numbers [B, count] in [0, 1) in plain torch operations."""
    bits = _UNIFORM_BITS[dtype]
    words = torch.stack(_words(seeds, -(-count // 4), stream), -1).flatten(1)[:, :count]
    return ((words >> (32 - bits)).double() * 2.0**-bits).to(dtype)


def check_seeds(seeds: Tensor, stream: int, dtype: torch.dtype = torch.float32) -> None:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
        given = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"seeds must be an int64 tensor [B], one seed per sample; got {given}.")
    if not 0 <= stream <= _WORD:
        raise ValueError(f"stream must be in [0, 2^32); got {stream}.")
    if dtype not in _UNIFORM_BITS:
        raise TypeError(f"random numbers come as float64, float32, float16 or bfloat16; got {dtype}.")


def normal(seeds: Tensor, shape: Sequence[int], *, stream: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers [B, *shape], one independent sequence for each (seed, stream).

    seeds: int64 [B]. Every sample's numbers depend on its own seed only. Raises TypeError/ValueError on other seeds or streams.
    """
    check_seeds(seeds, stream, dtype)
    return normal_reference(seeds, math.prod(shape), stream, dtype).view(len(seeds), *shape)


def uniform(seeds: Tensor, shape: Sequence[int] = (), *, stream: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers [B, *shape] in [0, 1), one independent sequence for each (seed, stream). seeds: int64 [B]."""
    check_seeds(seeds, stream, dtype)
    return uniform_reference(seeds, math.prod(shape), stream, dtype).view(len(seeds), *shape)
