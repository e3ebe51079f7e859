"""Exponential moving averages of many tensors at once: `average <- average + (1 - decay) (parameter - average)`.

Bytes moved at best: parameters read once, each average read and written once, whatever the number of profiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def reference(averages: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    wide = [a if a.dtype in (torch.float32, torch.float64) else a.float() for a in averages]
    values = [p.to(w.dtype) for p, w in zip(parameters, wide)]
    torch._foreach_lerp_(wide, values, 1.0 - decay)
    for average, value in zip(averages, wide):
        if average is not value:
            average.copy_(value)


def _profiles(averages: Sequence[Any], decay: float | Sequence[float]) -> list[tuple[Sequence[Tensor], float]]:
    if isinstance(decay, Sequence):
        return list(zip(averages, decay, strict=True))
    return [(averages, decay)]


@torch.no_grad()
def ema_update(
    averages: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    parameters: Sequence[Tensor],
    decay: float | Sequence[float],
) -> None:
    """Move averages towards parameters in place.

    averages: tensors like parameters (their own dtype: float32 averages of bfloat16 parameters are usual), or one such list per
    decay when decay is a sequence. decay in [0, 1]; 0 copies. Raises ValueError when lists, shapes or decays do not fit.
    """
    for profile, rate in _profiles(averages, decay):
        reference(profile, [p.detach() for p in parameters], rate)
