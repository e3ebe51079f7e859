"""lincomb against the same mathematics in eager torch: a guided two-step-history solver step, and noising with drawn
noise.

    OMP_NUM_THREADS=2 python benchmarks/kernels/lincomb.py

Latents [16, 4, 128, 128] float32, outputs in buffers that are reused, as the sampler's executor holds them. No time is
printed for a candidate whose values fail against float64.
"""

from __future__ import annotations

import torch
from measure import copy_of, interleaved, publish, summary

from fewstep_kernels import backend, lincomb, normal

SHAPE = (16, 4, 128, 128)


def check(name: str, found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    for y, expected in zip(found, truth):
        error = (y.double() - expected).abs().max().item()
        if not error < 1e-5:  # a few float32 roundings of numbers below 30
            raise SystemExit(f"{name} is wrong by {error}: no times are printed.")


def guided_step(rounds: int) -> dict:
    """x' = a x + b D + c D_previous, D = e x + f (u + w (g - u)), next input = s x': four inputs, three outputs."""
    a, b, c, e, f, w, s = 0.61, 0.52, -0.13, 1.08, -0.4, 3.0, 0.77
    x, previous, both = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(2 * SHAPE[0], *SHAPE[1:])
    guided, plain = both[: SHAPE[0]], both[SHAPE[0] :]
    denoised = [e, f * w, f * (1 - w), 0.0]
    following = [a + b * e, b * f * w, b * f * (1 - w), c]
    table = torch.tensor([following, denoised, [s * v for v in following]])
    inputs = [x, guided, plain, previous]
    out = [torch.empty(SHAPE) for _ in range(3)]

    def eager():
        g, u = both.chunk(2)
        d = e * x + f * (u + w * (g - u))
        y = a * x + b * d + c * previous
        return [y, d, s * y]

    def fused():
        return lincomb(inputs, table, out=out)

    truth = list(torch.einsum("mk,k...->m...", table.double(), torch.stack(inputs).double()))
    check("lincomb", list(fused()), truth)
    check("eager torch", eager(), truth)
    size = x.numel() * 4
    moved = 7 * size
    candidates = {
        f"lincomb ({backend('lincomb', 'cpu')})": fused,
        "eager torch": eager,
        "copy of the same bytes": copy_of(4 * size, 3 * size),
    }
    with torch.inference_mode():
        seconds = interleaved(candidates, rounds)
    names = list(candidates)
    return {
        "case": "guided step, 4 inputs, 3 outputs",
        "shape": SHAPE,
        "moved_bytes": moved,
        "read_to_write": "4:3",
        "results": summary(seconds, names[0], names[-1], moved),
    }


def noising(rounds: int) -> dict:
    """x_t = alpha x + sigma noise, the noise drawn inside the pass and keyed by sample."""
    x, seeds, table = torch.randn(SHAPE), torch.arange(SHAPE[0]), torch.tensor([[0.8, 0.6]])
    out = [torch.empty(SHAPE)]

    def fused():
        return lincomb([x], table, noise_seeds=seeds, out=out)

    def two_passes():
        return [0.8 * x + 0.6 * normal(seeds, SHAPE[1:])]

    def eager():
        return [0.8 * x + 0.6 * torch.randn(SHAPE)]

    truth = [0.8 * x.double() + 0.6 * normal(seeds, SHAPE[1:], dtype=torch.float64)]
    check("lincomb", list(fused()), truth)
    check("normal, then eager torch", two_passes(), truth)
    size = x.numel() * 4
    candidates = {
        f"lincomb ({backend('lincomb', 'cpu')})": fused,
        "normal, then eager torch": two_passes,
        "torch.randn, then eager": eager,
        "copy of the same bytes": copy_of(size, size),
    }
    with torch.inference_mode():
        seconds = interleaved(candidates, rounds)
    names = list(candidates)
    return {
        "case": "noising with drawn noise (torch.randn draws one sequence for the batch, not one per sample)",
        "shape": SHAPE,
        "moved_bytes": 2 * size,
        "read_to_write": "1:1",
        "results": summary(seconds, names[0], names[-1], 2 * size),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    publish("kernels_lincomb", [guided_step(200), noising(60)])
