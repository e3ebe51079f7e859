"""Random numbers keyed by what they are for, so that neither ranks nor gradient accumulation change a draw."""

from __future__ import annotations

import zlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import fewstep_kernels as fk
from fewstep.errors import UserError
from fewstep.nets.network import same_masks

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _mixed(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on one unsigned 64-bit integer."""
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mixed_tensor(value: Tensor) -> Tensor:
    """`_mixed` on int64 tensors, whose products wrap around."""
    value = (value ^ _shifted(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shifted(value, 27)) * _signed(_MIX_2)
    return value ^ _shifted(value, 31)


class Rng:
    """Draws keyed by (seed, step, global sample number, purpose).

    `index` int64 [B] holds the global sample numbers of this micro-batch, on the device of the draws. A purpose is a
    word ("noise", "time"); drawing it twice in one iteration would give the same numbers again, so that raises.
    """

    def __init__(self, seed: int, step: int, index: Tensor) -> None:
        self.seed = seed
        self.step = step
        self.index = index
        self._base = _mixed(_mixed((seed + _GOLDEN) & _MASK) + step * _GOLDEN & _MASK)
        self._drawn: set[str] = set()

    def _stream(self, purpose: str) -> int:
        if purpose in self._drawn:
            raise UserError(
                f"random numbers for {purpose!r} were already drawn in this iteration; name the second purpose."
            )
        self._drawn.add(purpose)
        return zlib.crc32(purpose.encode())

    def _keys(self) -> Tensor:
        return _mixed_tensor(self.index * _signed(_GOLDEN) + _signed(self._base))

    def seeds(self, purpose: str) -> Tensor:
        """int64 [B]: seeds for whoever draws per sample himself, such as a plan's stochastic stages."""
        return _mixed_tensor(self._keys() + _signed(_mixed(self._stream(purpose) + _GOLDEN)))

    def normal(self, like: Tensor, purpose: str) -> Tensor:
        """Standard normal noise [B, ...] with the shape and dtype of `like`."""
        if len(like) != len(self.index):
            raise UserError(f"noise like a batch of {len(like)} was asked of an Rng of {len(self.index)} samples.")
        return fk.normal(self._keys(), tuple(like.shape[1:]), stream=self._stream(purpose), dtype=like.dtype)

    def uniform(self, batch: Any, purpose: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[B] in [low, high): float64 for a float64 batch (a `Batch` or a tensor), float32 for any other."""
        x = batch if isinstance(batch, Tensor) else getattr(batch, "x0", None)
        dtype = torch.float64 if x is not None and x.dtype == torch.float64 else torch.float32
        draw = fk.uniform(self._keys(), (), stream=self._stream(purpose), dtype=dtype)
        return draw if (low, high) == (0.0, 1.0) else low + (high - low) * draw

    def integers(self, batch: Any, low: int, high: int, purpose: str) -> Tensor:
        """int64 [B], uniform on low .. high - 1."""
        draw = fk.uniform(self._keys(), (), stream=self._stream(purpose), dtype=torch.float64)
        return (low + (draw * (high - low)).floor().to(torch.int64)).clamp_max(high - 1)

    def same_for_all(self, low: int, high: int, purpose: str = "branch") -> int:
        """One integer of low .. high - 1, the same on every rank and in every micro-batch: for branch decisions."""
        if high <= low:
            raise UserError(f"same_for_all draws from low .. high - 1 and got low={low}, high={high}.")
        return low + _mixed(self._base ^ _mixed(self._stream(purpose) + _GOLDEN)) % (high - low)

    def same_dropout(self) -> AbstractContextManager[None]:
        """A context in which every network call uses the same dropout masks."""
        return same_masks()
