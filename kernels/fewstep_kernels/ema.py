"""Exponential moving averages of many tensors at once: `average <- average + (1 - decay) (parameter - average)`.

Bytes moved at best: each parameter read once for all profiles, each average read and written once. Averages keep their
own dtype; float32 averages of bfloat16 parameters are usual. It does not help below some ten thousand elements, where
one foreach call is as cheap.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, native
from .layout import is_dense


def reference(averages: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """The defining implementation: one profile, one foreach call in float32 (float64 for float64 averages)."""
    wide = [a if a.dtype in (torch.float32, torch.float64) else a.float() for a in averages]
    values = [p.to(w.dtype) for p, w in zip(parameters, wide)]
    torch._foreach_lerp_(wide, values, 1.0 - decay)
    for average, value in zip(averages, wide):
        if average is not value:
            average.copy_(value)


def _fits(average: Tensor, parameter: Tensor) -> bool:
    """Whether one flat loop can run over both."""
    if average.dtype not in native.DTYPES or parameter.dtype not in native.DTYPES:
        return False
    if average.is_contiguous() and parameter.is_contiguous():
        return True
    return average.stride() == parameter.stride() and is_dense(parameter.shape, parameter.stride())


def _call_c(profiles: Sequence[Sequence[Tensor]], parameters: Sequence[Tensor], decays: Sequence[float]) -> None:
    values: list[int] = []
    for i, parameter in enumerate(parameters):
        values += (parameter.data_ptr(), native.DTYPES[parameter.dtype], parameter.numel())
        for averages in profiles:
            values += (averages[i].data_ptr(), native.DTYPES[averages[i].dtype])
    weights = (ctypes.c_double * len(decays))(*(1.0 - decay for decay in decays))
    native.call("ema_update", parameters[0], len(parameters), len(profiles), native.table(values), weights)


def _profiles(averages: Sequence[Any], parameters: Sequence[Tensor], decay: float | Sequence[float]):
    """Lists of averages and their decays, checked."""
    profiles, decays = (list(averages), list(decay)) if isinstance(decay, Sequence) else ([averages], [decay])
    if len(profiles) != len(decays):
        raise ValueError(
            f"ema_update got {len(profiles)} lists of averages for {len(decays)} decays; pass one list each."
        )
    for rate in decays:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"decay must be in [0, 1]; got {rate}.")
    for profile in profiles:
        if len(profile) != len(parameters):
            raise ValueError(f"ema_update got {len(profile)} averages for {len(parameters)} parameters.")
        for average, parameter in zip(profile, parameters):
            if (
                not isinstance(average, Tensor)
                or average.shape != parameter.shape
                or average.device != parameter.device
            ):
                given = list(average.shape) if isinstance(average, Tensor) else type(average).__name__
                raise ValueError(f"an average must match its parameter {list(parameter.shape)}; got {given}.")
    return profiles, decays


@torch.no_grad()
def ema_update(
    averages: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    parameters: Sequence[Tensor],
    decay: float | Sequence[float],
) -> None:
    """Move averages towards parameters, in place.

    averages: tensors like parameters, or, when decay is a sequence, one such list per decay. decay is in [0, 1]: 1
    keeps the average, 0 copies the parameter exactly. Raises ValueError when lists, shapes, devices or decays do not
    fit.
    """
    parameters = list(parameters)
    profiles, decays = _profiles(averages, parameters, decay)
    groups: dict[torch.device, list[int]] = {}
    for i, parameter in enumerate(parameters):
        groups.setdefault(parameter.device, []).append(i)
    for device, members in groups.items():
        fast = []
        if backends.choose("ema_update", device.type)[0] != "reference":
            fast = [i for i in members if all(_fits(profile[i], parameters[i]) for profile in profiles)]
            if fast:
                _call_c([[profile[i] for i in fast] for profile in profiles], [parameters[i] for i in fast], decays)
        rest = sorted(set(members) - set(fast))
        if rest:
            for profile, rate in zip(profiles, decays):
                reference([profile[i] for i in rest], [parameters[i] for i in rest], rate)
