"""layer_norm_modulate and rms_norm_modulate against torch's own operations, eager and compiled.

    OMP_NUM_THREADS=2 python benchmarks/kernels/norm_modulate.py

Tokens of DiT-XL/2, [4, 256, 1152], and of a digit net, [256, 16, 64]. Outputs are fresh tensors for every candidate
alike. No time is printed for a candidate whose values fail against float64.
"""

from __future__ import annotations

import torch
from measure import publish
from norm_cases import case, named
from torch.nn import functional

from fewstep_kernels import layer_norm_modulate, rms_norm_modulate
from fewstep_kernels.normalisation import Parameters


def measured(kind, shape, backward, rounds, dtype=torch.float32) -> dict:
    width = shape[-1]
    x = torch.randn(shape).to(dtype)
    tensors = [x, *(0.3 * torch.randn(shape[0], 2 * width)).to(dtype).chunk(2, 1)]

    def ours(x, scale, shift):
        return layer_norm_modulate(x, scale, shift) if kind == "layer" else rms_norm_modulate(x, scale, shift, eps=1e-5)

    def eager(x, scale, shift):
        u = functional.layer_norm(x, (width,)) if kind == "layer" else functional.rms_norm(x, (width,), eps=1e-5)
        return u * (1 + scale[:, None]) + shift[:, None]

    torch.compiler.reset()
    name = named(f"{kind}_norm_modulate", 0, x, Parameters(), backward)
    candidates = {name: ours, "eager torch": eager, "torch.compile of it": torch.compile(eager)}
    title = f"{kind} norm, {'forward and backward' if backward else 'forward'}"
    return case(title, name, candidates, tensors, backward, rounds)


if __name__ == "__main__":
    torch.manual_seed(0)
    large, small = (4, 256, 1152), (256, 16, 64)
    cases = [measured(kind, large, backward, 30) for kind in ("layer", "rms") for backward in (False, True)]
    cases.append(measured("layer", large, False, 30, torch.bfloat16))
    cases += [measured("layer", small, backward, 60) for backward in (False, True)]
    publish("kernels_norm_modulate", cases)
