"""Per-sample distances with their gradients, and dynamic thresholding, against eager torch and torch.compile.

    OMP_NUM_THREADS=2 python benchmarks/kernels/distance.py

Latents [16, 4, 128, 128] float32. No time is printed for a candidate whose values fail against float64.
"""

from __future__ import annotations

import torch
from measure import copy_of, interleaved, publish, read_of, summary

from fewstep_kernels import backend, l1, l2, pseudo_huber, pseudo_huber_elementwise, threshold

SHAPE = (16, 4, 128, 128)
C = 0.03


def check(name: str, found: list[torch.Tensor], truth: list[torch.Tensor], allowed: float) -> None:
    for y, expected in zip(found, truth):
        error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
        if not error < allowed:
            raise SystemExit(f"{name} is wrong by {error} of the largest value: no times are printed.")


def case(name, candidates, truth, floor, moved, ratio, rounds, allowed=1e-5, launches=1) -> dict:
    """allowed: some float32 roundings of sums of 65536 terms."""
    for given, call in candidates.items():
        check(given, list(call()), truth, allowed)
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


def distances(rounds: int) -> list[dict]:
    a, b = torch.randn(SHAPE), torch.randn(SHAPE)
    size = a.numel() * 4
    formulas = {
        "l2": (l2, lambda a, b: (a - b).square().flatten(1).mean(1)),
        "l1": (l1, lambda a, b: (a - b).abs().flatten(1).mean(1)),
        "pseudo_huber": (
            lambda a, b: pseudo_huber(a, b, c=C),
            lambda a, b: torch.sqrt((a - b).square().flatten(1).sum(1) + C * C) - C,
        ),
        "pseudo_huber_elementwise": (
            lambda a, b: pseudo_huber_elementwise(a, b, c=C),
            lambda a, b: (torch.sqrt((a - b).square() + C * C) - C).flatten(1).mean(1),
        ),
    }

    def with_gradients(function, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    cases = []
    for name, (ours, eager) in formulas.items():
        compiled = torch.compile(eager, fullgraph=True)
        functions = {f"{name} ({backend('distance', 'cpu')})": ours, "eager torch": eager, "torch.compile": compiled}
        forward = {given: lambda f=f: [f(a, b)] for given, f in functions.items()}
        floor = ("read of the same bytes", read_of(2 * size))
        with torch.no_grad():
            truth = [eager(a.double(), b.double())]
            cases.append(case(f"{name}, value", forward, truth, floor, 2 * size, "2:0", rounds))
        both = {given: lambda f=f: with_gradients(f, a, b) for given, f in functions.items()}
        floor = ("copy of the same bytes", copy_of(4 * size, 2 * size))
        truth = with_gradients(eager, a.double(), b.double())
        title = f"{name}, value and both gradients"
        cases.append(case(title, both, truth, floor, 6 * size, "4:2", rounds, launches=2))
    return cases


def thresholding(rounds: int) -> dict:
    x = 2 * torch.randn(SHAPE)
    size = x.numel() * 4

    def eager(x):
        s = torch.quantile(x.abs().flatten(1), 0.995, dim=1).clamp(min=1.0).view(-1, 1, 1, 1)
        return torch.clamp(x, -s, s) / s

    compiled = torch.compile(eager, fullgraph=True)
    candidates = {
        f"threshold ({backend('threshold', 'cpu')})": lambda: [threshold(x)],
        "eager torch (torch.quantile)": lambda: [eager(x)],
        "torch.compile": lambda: [compiled(x)],
    }
    floor = ("copy of the same bytes", copy_of(3 * size, size))
    with torch.no_grad():
        truth = [eager(x.double())]
        # torch computes the rank in float32, which moves the quantile by a thousandth of a gap
        return case("dynamic thresholding at 0.995", candidates, truth, floor, 4 * size, "3:1", rounds, allowed=1e-4)


if __name__ == "__main__":
    torch.manual_seed(0)
    publish("kernels_distance", [*distances(40), thresholding(15)])
