"""Exponential moving averages of many tensors at once: `average <- average + (1 - decay) (parameter - average)`.

Bytes moved at best: each parameter read once for all profiles, each average read and written once. Averages keep their
own dtype; float32 averages of bfloat16 parameters are usual. It does not help below some ten thousand elements, where
one foreach call is as cheap.

bfloat16 averages stall when rounded to nearest: a step below half a unit in the last place (ulp) is lost. With a seed
they are rounded up with probability (value - lower neighbour) / ulp instead, so that no step is lost on average. Their
root-mean-square distance from the exact average then stays below

    sqrt(ulp E|parameter - average| / (1 + decay)) + ulp / 2,

whatever the number of updates: a step d costs a variance of at most |d| ulp, and the decay forgets it.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import backends, native, noise, registration
from .layout import is_dense

Scalar = float | Tensor
_PLAIN = {Tensor, torch.nn.Parameter}
_ROOM = 8  # elements that share a Philox block; every tensor starts a new one


def element_origins(tensors: Sequence[Tensor]) -> list[int]:
    """The number of each tensor's first element: one tensor after another, each from a multiple of 8."""
    starts, start = [], 0
    for tensor in tensors:
        starts.append(start)
        start += -(-tensor.numel() // _ROOM) * _ROOM
    return starts


def _random_halves(seed: int, update: Scalar, profile: int, origin: int, count: int, device: torch.device) -> Tensor:
    """Sixteen random bits for elements origin .. origin + count - 1, as int32."""
    group = torch.arange(origin // _ROOM, (origin + count + _ROOM - 1) // _ROOM, dtype=torch.int64, device=device)
    word, zero = 0xFFFFFFFF, torch.zeros_like(group)
    stream = zero + (update.to(torch.int64) if isinstance(update, Tensor) else int(update))
    key = (zero + (seed & word), zero + (seed >> 32 & word))
    words = torch.stack(noise.philox((group & word, group >> 32, stream & word, zero + 1 + profile), key), -1)  # [G, 4]
    return torch.cat((words & 0xFFFF, words >> 16), -1).flatten()[:count].to(torch.int32)


def round_stochastically(
    value: Tensor, seed: int, update: Scalar, profile: int = 0, origin: int = 0, like: Tensor | None = None
) -> Tensor:
    """float32 values as bfloat16, rounded up with the probability that makes rounding unbiased.

    Element e = origin + i takes 16 bits of Philox4x32-10 keyed by seed, counter (e // 8, update, 1 + profile): word
    e % 4, its low half where e % 8 < 4, else its high half; i counts in the memory order of `like` where that is dense,
    else in row-major order. update: int or 0-d tensor, taken modulo 2^32.
    """
    halves = _random_halves(seed, update, profile, origin, value.numel(), value.device)
    like = value if like is None else like
    if is_dense(like.shape, like.stride()):
        ordered = torch.empty_strided(like.shape, like.stride(), dtype=torch.int32, device=value.device)
        ordered.as_strided((value.numel(),), (1,)).copy_(halves)
    else:
        ordered = halves.view(like.shape)
    bits = (value.view(torch.int32) + ordered) >> 16 << 16
    return torch.where(value.isnan(), value, bits.view(torch.float32)).to(torch.bfloat16)


def reference(
    averages: Sequence[Tensor],
    parameters: Sequence[Tensor],
    decay: Scalar,
    *,
    seed: int | None = None,
    update: Scalar = 0,
    profile: int = 0,
    origins: Sequence[int] = (),
) -> None:
    """The defining implementation: one profile, one foreach call in float32 (float64 for float64 averages)."""
    wide = [a if a.dtype in (torch.float32, torch.float64) else a.float() for a in averages]
    values = [p.to(w.dtype) for p, w in zip(parameters, wide)]
    if isinstance(decay, Tensor):
        weight = 1.0 - decay.double()
        for average, value in zip(wide, values):
            average.lerp_(value, weight.to(average.dtype))
    else:
        torch._foreach_lerp_(wide, values, 1.0 - decay)
    for i, (average, value) in enumerate(zip(averages, wide)):
        if average is value:
            continue
        if seed is not None and average.dtype == torch.bfloat16:
            value = round_stochastically(value, seed, update, profile, origins[i], average)
        average.copy_(value)


def fits(average: Tensor, parameter: Tensor) -> bool:
    """Whether one flat loop can run over both."""
    if average.dtype not in native.DTYPES or parameter.dtype not in native.DTYPES:
        return False
    if average.is_contiguous() and parameter.is_contiguous():
        return True
    return average.stride() == parameter.stride() and is_dense(parameter.shape, parameter.stride())


def _call_c(
    profiles: Sequence[Sequence[Tensor]],
    parameters: Sequence[Tensor],
    decays: Sequence[Scalar],
    starts: Sequence[int],
    seed: int | None,
    update: Scalar,
) -> None:
    width, dtypes = 4 + 2 * len(profiles), native.DTYPES
    values = array("q", bytes(8 * width * len(parameters)))
    columns = [[x.data_ptr() for x in parameters], [dtypes[x.dtype] for x in parameters]]
    columns += [[x.numel() for x in parameters], [*starts]]
    for averages in profiles:
        columns += [[x.data_ptr() for x in averages], [dtypes[x.dtype] for x in averages]]
    for place, column in enumerate(columns):
        values[place::width] = array("q", column)
    _run_table(values, parameters, decays, seed, update)


def _run_table(
    values: array[int], parameters: Sequence[Tensor], decays: Sequence[Scalar], seed: int | None, update: Scalar
) -> None:
    native.call(
        "ema_update",
        parameters[0],
        len(parameters),
        len(decays),
        values.buffer_info()[0],
        native.scalars(decays),
        None if seed is None else ctypes.byref(ctypes.c_int64(seed)),
        None if seed is None else native.scalars([update]),
    )


def _direct(
    profiles: Sequence[Sequence[Tensor]],
    parameters: Sequence[Tensor],
    decays: Sequence[Scalar],
    origins: Sequence[int] | None,
    seed: int | None,
    update: Scalar,
) -> bool:
    """Move averages after one look at every tensor, where all are plain; else False, and nothing was written.

    Plain: torch's own tensors of one device, not negated by a bit, averages shaped and laid out like their parameters.
    Whatever is not, errors included, is the caller's. Only where `registration.quiet()`.
    """
    if any(len(profile) != len(parameters) for profile in profiles):
        return False
    for tensors in (parameters, *profiles):
        if not {*map(type, tensors)} <= _PLAIN or any(map(Tensor.is_neg, tensors)):
            return False
    if backends.choose("ema_update", parameters[0].device.type)[0] == "reference":
        return False
    table = native.look_at_averages(profiles, parameters, origins)
    if table is not None:
        _run_table(table, parameters, decays, seed, update)
    return table is not None


def _move(
    averages: Sequence[Tensor],
    parameters: Sequence[Tensor],
    decays: Sequence[float],
    on_device: Sequence[Tensor | None],
    seed: int | None,
    update: float,
    update_on_device: Tensor | None,
    origins: Sequence[int],
) -> None:
    """The raw operator: averages one profile after another; a number on the device is read in place of the other."""
    count = len(parameters)
    profiles = [averages[k * count : (k + 1) * count] for k in range(len(decays))]
    rates = given_scalars(decays, on_device)
    number = update if update_on_device is None else update_on_device
    groups: dict[torch.device, list[int]] = {}
    for i, parameter in enumerate(parameters):
        groups.setdefault(parameter.device, []).append(i)
    for device, members in groups.items():
        fast: list[int] = []
        if backends.choose("ema_update", device.type)[0] != "reference":
            fast = [i for i in members if all(fits(profile[i], parameters[i]) for profile in profiles)]
        if fast:
            own = [[profile[i] for i in fast] for profile in profiles]
            _call_c(own, [parameters[i] for i in fast], rates, [origins[i] for i in fast], seed, number)
        rest = sorted(set(members) - set(fast))
        if rest:
            _by_reference(profiles, parameters, rates, seed, number, origins, rest)


def _by_reference(profiles, parameters, decays, seed, update, origins, members) -> None:
    values, begin = [parameters[i] for i in members], [origins[i] for i in members]
    for k, (profile, decay) in enumerate(zip(profiles, decays)):
        own = [profile[i] for i in members]
        reference(own, values, decay, seed=seed, update=update, profile=k, origins=begin)


_raw = registration.define(
    "_ema_update(Tensor(a!)[] averages, Tensor[] parameters, float[] decays, Tensor?[] decays_on_device, int? seed, "
    "float update, Tensor? update_on_device, int[] origins) -> ()",
    _move,
    lambda *given: None,
)


def given_scalars(values: Sequence[float], on_device: Sequence[Tensor | None]) -> list[Scalar]:
    """Numbers as raw operators take them (numbers, and tensors in place of some), as everybody else does."""
    return [value if tensor is None else tensor for value, tensor in zip(values, on_device)]


def taken_scalars(given: Sequence[Scalar]) -> tuple[list[float], list[Tensor | None]]:
    """The inverse of `given_scalars`."""
    on_device = [value if isinstance(value, Tensor) else None for value in given]
    return [0.0 if isinstance(value, Tensor) else float(value) for value in given], on_device


def refuse_transforms(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError for tensors of a function transform, or with tangents: what writes in place has no
    derivatives."""
    for x in tensors:
        if is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{name} writes in place and has no derivatives; call it outside torch.func's transforms and "
                "dual levels."
            )


def check_scalar(name: str, value: Scalar, device: torch.device, least: float, most: float) -> None:
    """Raise ValueError unless value is a float in [least, most], or a 0-d tensor on the device (whose value is not
    read)."""
    if isinstance(value, Tensor):
        if value.ndim or value.device != device or value.dtype not in native.SCALAR_DTYPES:
            raise ValueError(
                f"{name} as a tensor must be 0-d, float32, float64 or int64, on {device}; "
                f"got {value.dtype} {list(value.shape)} on {value.device}."
            )
    elif not least <= value <= most:
        raise ValueError(f"{name} must be in [{least:g}, {most:g}]; got {value}.")


def check_averages(profiles: Sequence[Sequence[Tensor]], parameters: Sequence[Tensor]) -> None:
    """Raise ValueError unless every profile holds one average for each parameter, of its shape, on its device."""
    shapes, devices = [x.shape for x in parameters], [x.device for x in parameters]
    for profile in profiles:
        if len(profile) != len(parameters):
            raise ValueError(f"ema_update got {len(profile)} averages for {len(parameters)} parameters.")
        for average, shape, device in zip(profile, shapes, devices):
            if not isinstance(average, Tensor) or average.shape != shape or average.device != device:
                given = list(average.shape) if isinstance(average, Tensor) else type(average).__name__
                raise ValueError(f"an average must match its parameter {list(shape)}; got {given}.")


@torch.no_grad()
def ema_update(
    averages: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    parameters: Sequence[Tensor],
    decay: Scalar | Sequence[Scalar],
    *,
    seed: int | None = None,
    update: Scalar = 0,
    origins: Sequence[int] | None = None,
) -> None:
    """Move averages towards parameters, in place: one call for all tensors and profiles.

    averages: tensors like parameters (whole, or this rank's shards), or, when decay is a sequence, one such list per
    decay. decay is in [0, 1]: 1 keeps the average, 0 copies the parameter exactly; as a 0-d tensor it is read on the
    device, unchecked (float64 keeps the digits of one near 1). With a seed, bfloat16 averages are rounded
    stochastically by numbers that depend on seed, update (its number, an int or a 0-d tensor), profile and element
    alone; `origins` gives the number of each tensor's first element (multiples of 8) where shards of one tensor are
    averaged apart. Raises ValueError when lists, shapes, devices, decays or origins do not fit.
    """
    parameters = list(parameters)
    profiles, decays = cast(
        "tuple[list[Sequence[Tensor]], list[Scalar]]",
        ([*map(list, averages)], list(decay)) if isinstance(decay, Sequence) else ([list(averages)], [decay]),
    )
    if len(profiles) != len(decays):
        raise ValueError(
            f"ema_update got {len(profiles)} lists of averages for {len(decays)} decays; pass one list each."
        )
    if not parameters or not profiles:
        check_averages(profiles, parameters)
        return
    for rate in decays:
        check_scalar("decay", rate, parameters[0].device, 0.0, 1.0)
    given = None if origins is None else list(origins)
    if given is not None and (len(given) != len(parameters) or any(start % _ROOM or start < 0 for start in given)):
        raise ValueError(f"origins must hold a multiple of 8 for each of {len(parameters)} parameters; got {given}.")
    quiet = registration.quiet()
    if quiet and _direct(profiles, parameters, decays, given, seed, update):
        for profile in profiles:
            increment_version(profile)
        return
    check_averages(profiles, parameters)
    starts = element_origins(parameters) if given is None else given
    numbers, on_device = taken_scalars(decays)
    number, number_on_device = (0, update) if isinstance(update, Tensor) else (update, None)
    flat = [average for profile in profiles for average in profile]
    if registration.tracing():
        _by_reference(profiles, parameters, decays, seed, update, starts, range(len(parameters)))
        return
    if not quiet:
        refuse_transforms("ema_update", (*flat, *parameters))
    direct = quiet and registration.plain((*flat, *parameters))
    (_move if direct else _raw)(flat, parameters, numbers, on_device, seed, number, number_on_device, starts)
    increment_version(flat)
