"""group_norm_silu against torch's GroupNorm, modulation and SiLU, eager and compiled, forward and with gradients.

    OMP_NUM_THREADS=2 python benchmarks/kernels/group_norm_silu.py

A level of an SDXL-like U-Net, [4, 320, 32, 32] in 32 groups, and a digit net's, [256, 48, 4, 4] in 3. Outputs are
fresh tensors for every candidate alike. No time is printed for a candidate whose values fail against float64.
"""

from __future__ import annotations

import torch
from measure import publish
from norm_cases import case, named
from torch.nn import functional

from fewstep_kernels import group_norm_silu
from fewstep_kernels.normalisation import Parameters


def measured(shape, groups, modulated, last, backward, rounds, dtype=torch.float32, compiled=True) -> dict:
    channels = shape[1]
    x = torch.randn(shape).to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    if modulated:
        tensors = [x, *(0.3 * torch.randn(shape[0], 2 * channels)).to(dtype).chunk(2, 1)]

        def ours(x, scale, shift):
            return group_norm_silu(x, groups, scale=scale, shift=shift)

        def eager(x, scale, shift):
            u = functional.group_norm(x, groups)
            return functional.silu(u * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    else:
        tensors = [x, torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)]

        def ours(x, weight, bias):
            return group_norm_silu(x, groups, weight, bias)

        def eager(x, weight, bias):
            return functional.silu(functional.group_norm(x, groups, weight, bias))

    given = Parameters(scale=tensors[1]) if modulated else Parameters(*tensors[1:])
    name = named("group_norm_silu", groups, x, given, backward)
    candidates = {name: ours, "eager torch": eager}
    if compiled:
        torch.compiler.reset()
        candidates["torch.compile of it"] = torch.compile(eager)
    title = ", ".join(
        (
            "scale and shift" if modulated else "weight and bias",
            "channels-last" if last else "contiguous",
            "forward and backward" if backward else "forward",
        )
    )
    return case(title, name, candidates, tensors, backward, rounds)


if __name__ == "__main__":
    torch.manual_seed(0)
    large, small = (4, 320, 32, 32), (256, 48, 4, 4)
    cases = [
        measured(large, 32, modulated, last, backward, 30)
        for modulated in (False, True)
        for last in (False, True)
        for backward in (False, True)
    ]
    cases += [measured(large, 32, True, last, False, 30, torch.bfloat16) for last in (False, True)]
    cases += [
        measured(small, 3, modulated, False, backward, 60) for modulated in (False, True) for backward in (False, True)
    ]
    publish("kernels_group_norm_silu", cases)
