"""AdamW, averages of the parameters and their low-precision copy in one pass over many tensors.

    g = gradient_scale gradient                        (clipping and the inverse loss scale, read where they lie)
    m <- m + (1 - beta1) (g - m),    v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr weight_decay) p - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + epsilon)
    average <- average + (1 - decay) (p - average) for every average;    copy <- p

Loshchilov and Hutter 2019, "Decoupled weight decay regularization", arXiv:1711.05101, Algorithm 2. Words moved an
element: 7 for AdamW, 2 more for each average (3 when averaged apart), 1 for the copy (2 apart), and none for the
gradient's scale (2 apart). That bounds the gain over a fused AdamW and a foreach average at 1.11, 1.18 with two
averages. It does not help where gradients must be clipped by someone else first, and by itself on small models, where
looking at every tensor is what costs: `AdamWEma` does that once.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import backends, ema, native, registration
from .ema import Scalar

MOST_AVERAGES = 4
FIRST_DECAY = 7  # among the scalars: learning rate, betas, epsilon, gradient scale, guard, update, then the decays
EMPTY = 16


def reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    *,
    lr: Scalar,
    betas: tuple[float, float],
    epsilon: float,
    weight_decays: Sequence[float],
    gradient_scale: Scalar = 1.0,
    guard: Tensor | None = None,
    averages: Sequence[Sequence[Tensor]] = (),
    decays: Sequence[Scalar] = (),
    working: Sequence[Tensor | None],
    seed: int | None = None,
    update: Scalar = 0,
    origins: Sequence[int] = (),
) -> None:
    """The defining implementation: in float32, float64 for float64 parameters; without a host sync."""
    beta1, beta2 = betas
    lr = lr.double() if isinstance(lr, Tensor) else lr
    go = None if guard is None else torch.isfinite(guard)

    def write(target: Tensor, value: Tensor) -> None:
        value = value.to(target.dtype)
        target.copy_(value if go is None else torch.where(go, value, target))

    for i, (parameter, gradient) in enumerate(zip(parameters, gradients)):
        if gradient is not None:
            states = (exp_avgs[i], exp_avg_sqs[i], steps[i])
            exp_avg, exp_avg_sq, step = cast("tuple[Tensor, Tensor, Tensor]", states)
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            write(step, step + 1)
            taken = step.double()
            size = (lr / (1.0 - beta1**taken)).to(wide)
            correction = (1.0 / (1.0 - beta2**taken).sqrt()).to(wide)
            keep = 1.0 - lr * weight_decays[i]
            p, g, m, v = (x.to(wide) for x in (parameter, gradient, exp_avg, exp_avg_sq))
            g = g * (gradient_scale.to(wide) if isinstance(gradient_scale, Tensor) else gradient_scale)
            m = m + (1.0 - beta1) * (g - m)
            v = v * beta2 + (1.0 - beta2) * g * g
            write(exp_avg, m)
            write(exp_avg_sq, v)
            p = p * (keep.to(wide) if isinstance(keep, Tensor) else keep) - size * m / (v.sqrt() * correction + epsilon)
            write(parameter, p)
            copy = working[i]
            if copy is not None:
                write(copy, p)
        for k, (profile, decay) in enumerate(zip(averages, decays)):
            moved = profile[i].clone()
            ema.reference([moved], [parameter], decay, seed=seed, update=update, profile=k, origins=origins[i : i + 1])
            write(profile[i], moved)


GRADIENT, ROW = 5, 15  # places in a tensor's row of the table: of its gradient's address, of its first average


def table_of(rows: Iterable[tuple]) -> array:
    """What the C functions read: rows of (parameter, gradient, exp_avg, exp_avg_sq, step, weight decay, copy, origin,
    averages), tensors or None."""
    values = array("q")
    for parameter, gradient, exp_avg, exp_avg_sq, step, weight_decay, copy, origin, averages in rows:
        values.extend((parameter.numel(), origin, struct.unpack("q", struct.pack("d", weight_decay))[0]))
        for tensor in (parameter, gradient, exp_avg, exp_avg_sq, step, copy, *averages):
            # an empty tensor has address 0, which would say that there is none; nothing is read there
            values.extend((0, 0) if tensor is None else (tensor.data_ptr() or EMPTY, native.DTYPES[tensor.dtype]))
    return values


def run_table(
    table: array, count: int, profiles: int, device_of: Tensor, scalars: Sequence[Scalar], seed: int | None
) -> None:
    """One call for `count` rows of a table, on the tensor's device."""
    corrections = torch.empty(2 * count, dtype=torch.float64, device=device_of.device)
    native.call(
        "adamw_ema_step",
        device_of,
        count,
        profiles,
        table.buffer_info()[0],
        native.scalars(scalars),
        None if seed is None else ctypes.byref(ctypes.c_int64(seed)),
        corrections.data_ptr(),
    )


def _step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    working: Sequence[Tensor],
    moving: Sequence[int],
    copied: Sequence[int],
    weight_decays: Sequence[float],
    scalars: Sequence[float],
    on_device: Sequence[Tensor | None],
    seed: int | None,
    origins: Sequence[int],
) -> None:
    """The raw operator. Gradients and states belong to the parameters numbered by `moving`, working to those by
    `copied`; averages lie one profile after another; scalars as the C function takes them."""
    count = len(parameters)
    lists: list[list[Any]] = [[None] * count for _ in range(5)]
    for values, given, places in zip(
        lists,
        (gradients, exp_avgs, exp_avg_sqs, steps, working),
        (moving, moving, moving, moving, copied),
    ):
        for i, tensor in zip(places, given):
            values[i] = tensor
    states, copies = lists[:4], lists[4]
    profiles = [averages[k * count : (k + 1) * count] for k in range(len(scalars) - FIRST_DECAY)]
    rows, rest = [], []
    fast = backends.choose("adamw_ema_step", parameters[0].device.type)[0] != "reference"
    for i, parameter in enumerate(parameters):
        own = tuple(profile[i] for profile in profiles)
        flat = (states[0][i], states[1][i], states[2][i], copies[i], *own)
        if fast and all(x is None or ema.fits(x, parameter) for x in flat):
            rows.append((parameter, *(values[i] for values in states), weight_decays[i], copies[i], origins[i], own))
        else:
            rest.append(i)
    numbers = ema.given_scalars(scalars, on_device)
    if rows:
        run_table(table_of(rows), len(rows), len(profiles), parameters[0], numbers, seed)
    if rest:
        _by_reference(parameters, states, profiles, copies, weight_decays, numbers, seed, origins, rest)


def _by_reference(parameters, states, profiles, copies, weight_decays, scalars, seed, origins, members) -> None:
    lr, beta1, beta2, epsilon, gradient_scale, guard, update, *decays = scalars
    picked = [[values[i] for i in members] for values in (parameters, *states)]
    reference(
        *picked,
        lr=lr,
        betas=(beta1, beta2),
        epsilon=epsilon,
        weight_decays=[weight_decays[i] for i in members],
        gradient_scale=gradient_scale,
        guard=guard if isinstance(guard, Tensor) else None,
        averages=[[profile[i] for i in members] for profile in profiles],
        decays=decays,
        working=[copies[i] for i in members],
        seed=seed,
        update=update,
        origins=[origins[i] for i in members],
    )


_raw = registration.define(
    "_adamw_ema_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] averages, Tensor(f!)[] working, int[] moving, int[] copied, "
    "float[] weight_decays, float[] scalars, Tensor?[] on_device, int? seed, int[] origins) -> ()",
    _step,
    lambda *given: None,
)


def _check(parameters, gradients, exp_avgs, exp_avg_sqs, steps, weight_decays, averages, decays, working, origins):
    count = len(parameters)
    named = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    named |= {"weight_decay": weight_decays, "working": working, "origins": origins}
    for name, values in named.items():
        if len(values) != count:
            raise ValueError(f"adamw_ema_step got {len(values)} {name} for {count} parameters; pass one each.")
    if len(averages) != len(decays) or len(averages) > MOST_AVERAGES:
        raise ValueError(
            f"adamw_ema_step got {len(averages)} lists of averages for {len(decays)} decays; "
            f"pass one list each, at most {MOST_AVERAGES}."
        )
    if any(start % 8 or start < 0 for start in origins):
        raise ValueError(f"origins must be multiples of 8; got {list(origins)}.")
    device = parameters[0].device
    for i, parameter in enumerate(parameters):
        if parameter.device != device:
            raise ValueError(f"adamw_ema_step takes tensors on one device; got {device} and {parameter.device}.")
        gradient = gradients[i]
        if gradient is None:
            like = [working[i]]
        else:
            if gradient.layout != torch.strided:
                raise ValueError(f"adamw_ema_step takes dense gradients; parameter {i} has a {gradient.layout} one.")
            if exp_avgs[i] is None or exp_avg_sqs[i] is None or steps[i] is None:
                raise ValueError(f"parameter {i} has a gradient, so it needs exp_avg, exp_avg_sq and step.")
            if steps[i].ndim or steps[i].dtype not in (torch.float32, torch.float64) or steps[i].device != device:
                raise ValueError(f"a step must be a 0-d float32 or float64 tensor on {device}; got {steps[i]!r}.")
            like = [gradient, exp_avgs[i], exp_avg_sqs[i], working[i]]
        for x in like:
            if x is not None and (x.shape != parameter.shape or x.device != device or not x.is_floating_point()):
                raise ValueError(
                    f"gradient, states and copy of parameter {i} must be floating-point tensors "
                    f"{list(parameter.shape)} on {device}; got {x.dtype} {list(x.shape)} on {x.device}."
                )
    ema.check_averages(averages, parameters)


def check_scalars(
    device: torch.device,
    lr: Scalar,
    betas: tuple[float, float],
    gradient_scale: Scalar,
    guard: Tensor | None,
    decays: Sequence[Scalar],
) -> None:
    """Raise ValueError for a number outside its range or a tensor of the wrong kind."""
    infinity = float("inf")
    ema.check_scalar("lr", lr, device, 0.0, infinity)
    ema.check_scalar("gradient_scale", gradient_scale, device, -infinity, infinity)
    for decay in decays:
        ema.check_scalar("decay", decay, device, 0.0, 1.0)
    for beta in betas:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas must be in [0, 1); got {betas}.")
    if guard is not None:
        ema.check_scalar("guard", guard, device, 0.0, 0.0)


@torch.no_grad()
def adamw_ema_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    *,
    lr: Scalar,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    gradient_scale: Scalar = 1.0,
    guard: Tensor | None = None,
    averages: Sequence[Sequence[Tensor]] = (),
    decays: Sequence[Scalar] = (),
    working: Sequence[Tensor | None] | None = None,
    seed: int | None = None,
    update: Scalar = 0,
    origins: Sequence[int] | None = None,
) -> None:
    """One step for many tensors on one device, in place.

    steps: one 0-d float tensor for each parameter, no two the same, advanced by one here. A parameter whose gradient is
    None keeps its value, states and step; its averages move. weight_decay: one number, or one for each parameter (a
    mask). lr, gradient_scale and decays may be 0-d tensors, read on the device. guard: a 0-d tensor (the gradients'
    norm); unless it is finite nothing is written at all, which is decided on the device. averages: at most four lists
    of tensors like parameters, with a decay each; `seed`, `update` and `origins` as in `ema_update`. working: tensors
    that receive a copy of the new parameters in their own dtype, or None. Raises ValueError on what does not fit.
    """
    parameters = list(parameters)
    if not parameters:
        return
    count, device = len(parameters), parameters[0].device
    weight_decays = list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * count
    copies = [None] * count if working is None else list(working)
    starts = ema.element_origins(parameters) if origins is None else list(origins)
    _check(parameters, gradients, exp_avgs, exp_avg_sqs, steps, weight_decays, averages, decays, copies, starts)
    check_scalars(device, lr, betas, gradient_scale, guard, decays)
    moving = [i for i, gradient in enumerate(gradients) if gradient is not None]
    lists = (gradients, exp_avgs, exp_avg_sqs, steps)
    scalars = (lr, *betas, epsilon, gradient_scale, 0.0 if guard is None else guard, update, *decays)
    if registration.tracing():
        _by_reference(parameters, lists, averages, copies, weight_decays, scalars, seed, starts, range(count))
        return
    states = [[cast("Tensor", values[i]) for i in moving] for values in lists]
    flat = [average for profile in averages for average in profile]
    copied = [i for i, copy in enumerate(copies) if copy is not None]
    targets = [cast("Tensor", copies[i]) for i in copied]
    quiet = registration.quiet()
    if not quiet:
        ema.refuse_transforms("adamw_ema_step", (*parameters, *(x for values in states for x in values), *flat))
    numbers, on_device = ema.taken_scalars(scalars)
    run: Any = _step if quiet else _raw
    run(parameters, *states, flat, targets, moving, copied, weight_decays, numbers, on_device, seed, starts)
    moved = [parameters[i] for i in moving]
    torch.autograd.graph.increment_version((*moved, *(x for values in states[1:] for x in values), *flat, *targets))
