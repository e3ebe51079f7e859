"""ema_update against torch's foreach call and diffusers' EMAModel: 66M parameters, one average and three, float32 and
bfloat16.

    OMP_NUM_THREADS=2 python benchmarks/kernels/ema.py

No time is printed for a candidate whose values fail against float64. EMAModel is left out, and said to be, where
diffusers is not installed.
"""

from __future__ import annotations

import torch
from measure import added_in_place, asked, interleaved, publish, summary

from fewstep_kernels import backend, ema_update

try:
    from diffusers.training_utils import EMAModel
except ImportError:
    EMAModel = None

BLOCK = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
SHAPES = [(1000, 768), *BLOCK * 9, (2048, 768)]  # 66M parameters in 74 tensors, as a transformer has them
OURS = f"ema_update ({backend('ema_update', 'cpu')})"
FLOOR = "target += source, same bytes"


def check(name: str, call, profiles, parameters, decays) -> None:
    truth = [
        [a.double() * d + p.double() * (1 - d) for a, p in zip(averages, parameters)]
        for averages, d in zip(profiles, decays)
    ]
    call()
    for averages, true in zip(profiles, truth):
        for average, t in zip(averages, true):
            # two float32 roundings of numbers below 6, or one step of a bfloat16 below 8
            bar = 2e-6 if average.dtype == torch.float32 else 2.0**-5
            error = (average.double() - t).abs().max().item()
            if not error < bar:
                raise SystemExit(f"{name} is wrong by {error}: no times are printed.")


def case(title: str, decays: list[float], dtype: torch.dtype, rounds: int, seed: int | None = None) -> dict:
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    average_dtype = torch.float32 if seed is None else torch.bfloat16
    profiles = [[torch.randn(shape).to(average_dtype) for shape in SHAPES] for _ in decays]

    def fused():
        ema_update(profiles, parameters, decays, seed=seed)

    def foreach():
        values = [p.detach() if dtype == average_dtype else p.detach().to(average_dtype) for p in parameters]
        for averages, decay in zip(profiles, decays):
            torch._foreach_lerp_(averages, values, 1 - decay)

    candidates = {
        OURS: fused,
        "torch._foreach_lerp_ (nearest)" if seed is not None else "torch._foreach_lerp_": foreach,
    }
    for name, call in candidates.items():
        check(name, call, profiles, parameters, decays)
    if EMAModel is not None and dtype == average_dtype == torch.float32 and len(decays) == 1:
        for name, option in (("diffusers EMAModel.step", False), ("EMAModel.step, foreach", True)):
            model = EMAModel(parameters, decay=decays[0], min_decay=decays[0], foreach=option)
            model.shadow_params = [torch.randn(shape) for shape in SHAPES]
            candidates[name] = lambda model=model: model.step(parameters)
            candidates[name]()  # its first step copies
            check(name, candidates[name], [model.shadow_params], parameters, decays)
    count = sum(p.numel() for p in parameters)
    read = count * (parameters[0].element_size() + profiles[0][0].element_size() * len(decays))
    written = count * profiles[0][0].element_size() * len(decays)
    candidates[FLOOR] = added_in_place(read, written)
    with torch.no_grad():
        seconds = interleaved(candidates, rounds)
    results = summary(seconds, OURS, FLOOR, read + written)
    return {
        "case": title,
        "parameters": count,
        "tensors": len(SHAPES),
        "moved_bytes": read + written,
        "working_set_bytes": read,  # averages are written where they were read
        "launches": 1,
        "read_to_write": f"{read / written:.2f}:1",
        "left_out": [] if EMAModel is not None else ["diffusers EMAModel: diffusers is not installed"],
        "results": results,
        # an average rounded to the nearest bfloat16 costs less than one that does not stall: no target there
        "targets": asked(results, diffusers_EMAModel=4) + ([] if seed is not None else asked(results, torch=1)),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    publish(
        "kernels_ema",
        [
            case("one float32 average of float32 parameters", [0.999], torch.float32, 30),
            case("one float32 average of bfloat16 parameters", [0.999], torch.bfloat16, 20),
            case("three float32 averages of float32 parameters", [0.9, 0.99, 0.999], torch.float32, 15),
            case("one bfloat16 average, stochastic rounding", [0.999], torch.bfloat16, 10, seed=0),
        ],
    )
