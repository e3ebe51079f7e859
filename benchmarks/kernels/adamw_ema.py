"""AdamWEma against torch.optim.AdamW(fused=True) and a foreach average: 66M float32 parameters, one average and two,
with and without clipping, and networks of digits size, where the host's part decides.

    OMP_NUM_THREADS=2 python benchmarks/kernels/adamw_ema.py

Both run whole optimiser steps, each on its own tensors. No time is printed for a candidate whose values fail against
torch's AdamW in float64. apex's FusedAdam runs on a GPU only: benchmarks/gpu_suite.sh has it.
"""

from __future__ import annotations

import torch
from ema import SHAPES
from measure import added_in_place, asked, interleaved, publish, summary

from fewstep import nets
from fewstep_kernels import AdamWEma, backend
from fewstep_kernels.decay_profiles import Constant

OURS = f"AdamWEma ({backend('adamw_ema_step', 'cpu')})"
FLOOR = "target += source, same bytes"
OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.01}
CHECKED = 12  # tensors compared with float64
Shapes = list[tuple[int, ...]]


def ours(shapes: Shapes, decays: list[float], max_norm: float | None, dtype: torch.dtype = torch.float32):
    parameters = made(shapes, dtype)
    optimizer = AdamWEma(
        parameters, profiles=[Constant(d) for d in decays], max_norm=max_norm, average_dtype=None, **OPTIONS
    )
    return parameters, lambda: optimizer.step(), lambda k: optimizer.averages(k)


def theirs(shapes: Shapes, decays: list[float], max_norm: float | None, dtype: torch.dtype = torch.float32):
    parameters = made(shapes, dtype)
    optimizer = torch.optim.AdamW(parameters, fused=True, **OPTIONS)
    averages = [[p.detach().clone() for p in parameters] for _ in decays]
    values = [p.detach() for p in parameters]

    def step():
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=dtype == torch.float32)
        optimizer.step()
        for average, decay in zip(averages, decays):
            torch._foreach_lerp_(average, values, 1 - decay)

    return parameters, step, lambda k: averages[k]


def made(shapes: Shapes, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        parameters.append(torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        parameters[-1].grad = torch.randn(shape, generator=generator).to(dtype)
    return parameters


def check(name: str, candidate, decays: list[float], max_norm: float | None, true) -> None:
    parameters, step, averages = candidate
    step()
    for k in range(-1, len(decays)):
        found, exact = (parameters, true[0]) if k < 0 else (averages(k), true[2](k))
        for a, b in zip(found[:CHECKED], exact[:CHECKED]):
            error = (a.detach().double() - b.detach()).abs().max().item()
            if not error < 2e-6:  # a few float32 roundings of numbers below 6
                raise SystemExit(f"{name} is wrong by {error}: no times are printed.")


def of_network(**options: int | str) -> Shapes:
    """The shapes of a network of digits size."""
    return [tuple(p.shape) for p in nets.build({"classes": 10, **options}).parameters()]


def case(title: str, shapes: Shapes, decays: list[float], max_norm: float | None, rounds: int, least: float) -> dict:
    """least: what the rival's time over ours must be."""
    true = theirs(shapes, decays, max_norm, torch.float64)
    true[1]()
    given = (shapes, decays, max_norm)
    pair = {OURS: ours(*given), "AdamW(fused=True), foreach lerp": theirs(*given)}
    for name, candidate in pair.items():
        check(name, candidate, decays, max_norm, true)
    del true
    count = sum(p.numel() for p in pair[OURS][0])
    words = 7 + 2 * len(decays) + (max_norm is not None)
    written = 3 + len(decays)
    candidates = {name: step for name, (_, step, _) in pair.items()}
    candidates[FLOOR] = added_in_place(4 * count * (words - written), 4 * count * written)
    seconds = interleaved(candidates, rounds)
    results = summary(seconds, OURS, FLOOR, 4 * count * words)
    return {
        "case": f"{title}, {count / 1e6:.3g}M parameters",
        "parameters": count,
        "tensors": len(shapes),
        "moved_bytes": 4 * count * words,
        "working_set_bytes": 4 * count * (4 + len(decays)),
        "launches": 1 + (max_norm is not None),
        "read_to_write": f"{(words - written) / written:.2f}:1",
        "results": results,
        "targets": asked(results, AdamW=least),
    }


if __name__ == "__main__":
    publish(
        "kernels_adamw_ema",
        [
            case("one average", SHAPES, [0.999], None, 30, 1.05),
            case("two averages", SHAPES, [0.99, 0.999], None, 30, 1.05),
            case("one average, clipped", SHAPES, [0.999], 1.0, 30, 1.05),
            case("two averages, clipped", SHAPES, [0.99, 0.999], 1.0, 30, 1.05),
            *(
                case(f"digits {net['name']}, one average, clipped", of_network(**net), [0.999], 1.0, 300, 1.0)
                for net in ({"name": "unet"}, {"name": "dit"}, {"name": "dit", "width": 96, "depth": 3, "heads": 4})
            ),
        ],
    )
