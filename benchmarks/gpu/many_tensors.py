"""ema_update and AdamWEma on a GPU: 66M parameters in 250 tensors, and the field's own beside them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from case import By, Call, Case, ways
from streaming import streams
from torch import Tensor

import fewstep_kernels as fk
from fewstep_kernels.decay_profiles import Constant

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from ema import SHAPES

try:
    from diffusers.training_utils import EMAModel
except ImportError:
    EMAModel = None
try:
    from apex.optimizers import FusedAdam
except ImportError:
    FusedAdam = None

TINY = ((63,), (5, 7), (300, 11))
OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.01}
Made = tuple[list[torch.nn.Parameter], Call, Callable[[int], Sequence[Tensor]]]


def made(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """Parameters with gradients, the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        value, slope = (torch.randn(shape, generator=generator) for _ in range(2))
        parameters.append(torch.nn.Parameter(value.to(device, dtype)))
        parameters[-1].grad = slope.to(device, dtype)
    return parameters


def ema(device: str, small: bool) -> Iterator[Case]:
    """One average of float32 and of bfloat16 parameters, then three."""
    shapes = TINY if small else SHAPES
    for dtype, decays in ((torch.float32, [0.999]), (torch.bfloat16, [0.999]), (torch.float32, [0.9, 0.99, 0.999])):
        parameters = made(shapes, dtype, device)
        start = [[torch.randn(shape, device=device) for shape in shapes] for _ in decays]
        profiles = [[x.clone() for x in profile] for profile in start]

        def ours(profiles=profiles, parameters=parameters, decays=decays):
            fk.ema_update(profiles, parameters, decays)

        def foreach(profiles=profiles, parameters=parameters, decays=decays):
            values = [p.detach().float() for p in parameters]
            for profile, decay in zip(profiles, decays):
                torch._foreach_lerp_(profile, values, 1 - decay)

        def after(call, profiles=profiles, start=start):
            for profile, kept in zip(profiles, start):
                torch._foreach_copy_(profile, kept)
            call()
            return [x.clone() for profile in profiles for x in profile]

        def truth(start=start, parameters=parameters, decays=decays):
            return [
                x.double().lerp(p.detach().double(), 1 - decay)
                for profile, decay in zip(start, decays)
                for x, p in zip(profile, parameters)
            ]

        candidates: dict[str, Call] = {f"ema_update ({way})": By(way, ours) for way in ways("ema_update", device)}
        candidates["torch._foreach_lerp_"] = foreach
        if EMAModel is not None and dtype == torch.float32 and len(decays) == 1:
            model = EMAModel(parameters, decay=0.999, min_decay=0.999, foreach=True)
            model.shadow_params = profiles[0]
            model.optimization_step = 10
            candidates["diffusers EMAModel.step, foreach"] = lambda model=model, p=parameters: model.step(p)
        elif EMAModel is None:
            print("diffusers is not installed: EMAModel is not measured.")
        count = sum(p.numel() for p in parameters)
        read = count * (parameters[0].element_size() + 4 * len(decays))
        written = count * 4 * len(decays)
        name = str(dtype).removeprefix("torch.")
        yield Case(
            f"{len(decays)} float32 average{'s' if len(decays) > 1 else ''} of {name} parameters, {count} in all",
            candidates,
            truth,
            streams(
                1 + len(decays), len(decays), (read + written) // (4 + 8 * len(decays)), torch.float32, device, True
            ),
            read,
            written,
            read,
            bound=2e-6,
            check=after,
            least_percent=None if small else 90,
            device=device,
        )


def _ours(shapes, decays, max_norm, dtype, device) -> Made:
    parameters = made(shapes, dtype, device)
    profiles = [Constant(decay) for decay in decays]
    optimizer = fk.AdamWEma(parameters, profiles=profiles, max_norm=max_norm, average_dtype=None, **OPTIONS)
    return parameters, lambda: optimizer.step(), lambda k: optimizer.averages(k)


def _theirs(shapes, decays, max_norm, dtype, device, make=None) -> Made:
    parameters = made(shapes, dtype, device)
    fused = {"fused": True, "capturable": device == "cuda"}
    optimizer = make(parameters) if make else torch.optim.AdamW(parameters, **fused, **OPTIONS)
    averages = [[p.detach().clone() for p in parameters] for _ in decays]
    values = [p.detach() for p in parameters]

    def step() -> None:
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=dtype == torch.float32)
        optimizer.step()
        for average, decay in zip(averages, decays):
            torch._foreach_lerp_(average, values, 1 - decay)

    return parameters, step, lambda k: averages[k]


def adamw(device: str, small: bool) -> Iterator[Case]:
    """Whole optimiser steps with one average and two, without clipping and with it."""
    shapes = TINY if small else SHAPES
    for decays, max_norm in (([0.999], None), ([0.99, 0.999], None), ([0.999], 1.0)):
        given = shapes, decays, max_norm
        kinds: dict[str, Made] = {
            f"AdamWEma ({ways('adamw_ema_step', device)[0]})": _ours(*given, torch.float32, device)
        }
        kinds["AdamW(fused=True), foreach lerp"] = _theirs(*given, torch.float32, device)
        if FusedAdam is not None:
            kinds["apex FusedAdam, foreach lerp"] = _theirs(
                *given, torch.float32, device, lambda parameters: FusedAdam(parameters, adam_w_mode=True, **OPTIONS)
            )
        results = {step: (parameters, averages) for parameters, step, averages in kinds.values()}

        def first_step(call, results=results, decays=decays):
            parameters, averages = results[call]
            call()
            return [*parameters, *(x for k in range(len(decays)) for x in averages(k))]

        def truth(given=given, decays=decays):
            parameters, step, averages = _theirs(*given, torch.float64, device)
            step()
            return [*parameters, *(x for k in range(len(decays)) for x in averages(k))]

        count = sum(p.numel() for p in made(shapes, torch.float32, "cpu"))
        written = 3 + len(decays)
        read = 4 + len(decays) + (max_norm is not None)
        yield Case(
            f"step with {len(decays)} average{'s' if len(decays) > 1 else ''}{', clipped' if max_norm else ''}",
            {name: step for name, (_, step, _) in kinds.items()},
            truth,
            streams(read, written, count, torch.float32, device, True),
            4 * count * read,
            4 * count * written,
            4 * count * (4 + len(decays)),
            bound=2e-6,
            check=first_step,
            least_percent=None if small else 85,
            device=device,
        )
