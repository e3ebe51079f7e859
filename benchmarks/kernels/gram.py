"""gram, and guidance made of it, against eager torch, torch.compile and a read of the same bytes.

    OMP_NUM_THREADS=2 python benchmarks/kernels/gram.py

Latents [16, 4, 128, 128] float32. No time is printed for a candidate whose values fail against float64.
"""

from __future__ import annotations

import torch
from measure import copy_of, interleaved, publish, read_of, summary

from fewstep.diffusion.gram_guidance import projected, rescaled
from fewstep_kernels import backend, gram

SHAPE = (16, 4, 128, 128)


def check(name: str, found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    for y, expected in zip(found, truth):
        error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
        if not error < 1e-5:  # some float32 roundings of sums of 65536 terms
            raise SystemExit(f"{name} is wrong by {error} of the largest value: no times are printed.")


def case(name, candidates, truth, floor, moved, ratio, rounds, launches=1) -> dict:
    for given, call in candidates.items():
        check(given, list(call()), truth)
    with torch.inference_mode():
        seconds = interleaved(candidates | {floor[0]: floor[1]}, rounds)
    ours = next(iter(candidates))
    return {
        "case": name,
        "shape": SHAPE,
        "moved_bytes": moved,
        "read_to_write": ratio,
        "launches": launches,
        "results": summary(seconds, ours, floor[0], moved),
    }


def products(count: int, rounds: int) -> dict:
    """All products, sums and absolute sums of some tensors."""
    inputs = [torch.randn(SHAPE) for _ in range(count)]

    def eager(*inputs):
        z = torch.stack([x.flatten(1) for x in inputs], 1)
        return z @ z.transpose(1, 2), z.sum(-1), z.abs().sum(-1)

    compiled = torch.compile(eager, fullgraph=True)
    size = inputs[0].numel() * 4
    return case(
        f"gram of {count}",
        {
            f"gram ({backend('gram', 'cpu')})": lambda: gram(inputs),
            "eager torch": lambda: eager(*inputs),
            "torch.compile": lambda: compiled(*inputs),
        },
        list(eager(*(x.double() for x in inputs))),
        ("read of the same bytes", read_of(count * size)),
        count * size,
        f"{count}:0",
        rounds,
    )


def guidance(rounds: int) -> list[dict]:
    """Guidance rescale and adaptive projected guidance of two network outputs."""
    cond, uncond = torch.randn(SHAPE), torch.randn(SHAPE)
    dims = (1, 2, 3)

    def eager_rescale(cond, uncond):
        guided = uncond + 7.5 * (cond - uncond)
        factor = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return 0.7 * guided * factor + 0.3 * guided

    def eager_projected(cond, uncond):
        d = cond - uncond
        d = d * (15.0 / d.square().sum(dims, keepdim=True).sqrt()).clamp(max=1.0)
        along = (d * cond).sum(dims, keepdim=True) / cond.square().sum(dims, keepdim=True) * cond
        return cond + 6.5 * (d - along)

    size = cond.numel() * 4
    cases = []
    for name, ours, eager in (
        ("guidance rescale", lambda: [rescaled(cond, uncond, 7.5)], eager_rescale),
        ("projected guidance", lambda: [projected(cond, uncond, 7.5, radius=15.0)[0]], eager_projected),
    ):
        compiled = torch.compile(eager, fullgraph=True)
        candidates = {
            "gram, then lincomb": ours,
            "eager torch": lambda eager=eager: [eager(cond, uncond)],
            "torch.compile": lambda compiled=compiled: [compiled(cond, uncond)],
        }
        truth = [eager(cond.double(), uncond.double())]
        floor = ("copy of the same bytes", copy_of(4 * size, size))
        title = f"{name}: two passes over two tensors"
        cases.append(case(title, candidates, truth, floor, 5 * size, "4:1", rounds, launches=2))
    return cases


if __name__ == "__main__":
    torch.manual_seed(0)
    publish("kernels_gram", [products(2, 60), products(4, 60), *guidance(60)])
