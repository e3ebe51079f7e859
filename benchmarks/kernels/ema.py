"""ema_update against torch's foreach call and a loop: all parameters of a model, one average and three.

    OMP_NUM_THREADS=2 python benchmarks/kernels/ema.py

No time is printed for a candidate whose values fail against float64.
"""

from __future__ import annotations

import torch
from measure import added_in_place, interleaved, publish, summary

from fewstep_kernels import backend, ema_update

SHAPES = [(16, 4, 128, 128), *[(768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)] * 3]  # 17M parameters


def case(title: str, decays: list[float], dtype: torch.dtype, rounds: int) -> dict:
    parameters = [torch.randn(shape).to(dtype) for shape in SHAPES]
    profiles = [[torch.randn(shape) for shape in SHAPES] for _ in decays]

    def fused():
        ema_update(profiles, parameters, decays)

    def foreach():
        values = parameters if dtype == torch.float32 else [p.float() for p in parameters]
        for averages, decay in zip(profiles, decays):
            torch._foreach_lerp_(averages, values, 1 - decay)

    def loop():
        for averages, decay in zip(profiles, decays):
            for average, parameter in zip(averages, parameters):
                average.mul_(decay).add_(parameter, alpha=1 - decay)

    candidates = {
        f"ema_update ({backend('ema_update', 'cpu')})": fused,
        "torch._foreach_lerp_": foreach,
        "mul_, add_ loop": loop,
    }
    for name, call in candidates.items():
        truth = [
            [a.double() * d + p.double() * (1 - d) for a, p in zip(averages, parameters)]
            for averages, d in zip(profiles, decays)
        ]
        call()
        error = max((a.double() - t).abs().max().item() for x, y in zip(profiles, truth) for a, t in zip(x, y))
        if not error < 2e-6:  # two float32 roundings of numbers below 6
            raise SystemExit(f"{name} is wrong by {error}: no times are printed.")
    count = sum(p.numel() for p in parameters)
    read = count * (parameters[0].element_size() + 4 * len(decays))
    written = count * 4 * len(decays)
    candidates["target += source, same bytes"] = added_in_place(read, written)
    with torch.inference_mode():
        seconds = interleaved(candidates, rounds)
    names = list(candidates)
    return {
        "case": title,
        "parameters": count,
        "tensors": len(SHAPES),
        "moved_bytes": read + written,
        "read_to_write": f"{read / written:.2f}:1",
        "results": summary(seconds, names[0], names[-1], read + written),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    publish(
        "kernels_ema",
        [
            case("one float32 average of float32 parameters", [0.999], torch.float32, 30),
            case("one float32 average of bfloat16 parameters", [0.999], torch.bfloat16, 30),
            case("three float32 averages of float32 parameters", [0.9, 0.99, 0.999], torch.float32, 15),
        ],
    )
