"""CUDA graphs: every program is captured once and replayed on other inputs, and must give what eager calls give there.

    python benchmarks/gpu/graph.py [--device cpu]

On a CPU, where the suite is tried, a plain call stands in for the replay. Ends with code 1 and the names of what
differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from programs import Program, programs
from torch import Tensor

REPLAYS = 3


def captured(program: Program, device: str) -> tuple[Callable[[], object], list[Tensor]]:
    """(a replay, the tensors that it fills)."""
    if device != "cuda":
        given: list[Tensor] = []

        def again() -> None:
            given[:] = program.call()

        return again, given
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            program.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = program.call()
    return graph.replay, results


def difference(program: Program, device: str) -> str:
    """Empty where replays equal eager calls on inputs that the capture never saw, one call after another."""
    program.refill(0)
    saved = program.saved()
    replay, results = captured(program, device)
    found, expected = [], []
    program.restore(saved)
    for seed in range(1, REPLAYS + 1):
        program.refill(seed)
        replay()
        found.append([x.detach().clone() for x in (*results, *program.state)])
    program.restore(saved)
    for seed in range(1, REPLAYS + 1):
        program.refill(seed)
        expected.append(program.results())
    largest = 0.0
    for ours, theirs in zip(found, expected):
        for x, y in zip(ours, theirs, strict=True):
            if program.exact and not torch.equal(x, y):
                return f"off by {(x.double() - y.double()).abs().max().item():.2e} where bits are promised"
            largest = max(largest, (x.double() - y.double()).abs().max().item())
    # float32 through a small network: matrix products may take another algorithm in a graph
    return f"off by {largest:.2e}" if not largest < 1e-3 else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    wrong = 0
    for name, make in programs(device):
        try:
            found = difference(make(), device)
        except Exception as problem:  # whatever it is, the other programs run too
            found = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
        wrong += bool(found)
        print(f"{name:28} {found or 'replays equal eager calls'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
