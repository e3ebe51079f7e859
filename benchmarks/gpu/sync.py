"""Zero host waits: every program under torch's sync-debug mode, and with no synchronise or blocking copy in the
profiler's trace of the CUDA runtime, which also sees what csrc launches.

    python benchmarks/gpu/sync.py [--device cpu]

On a CPU, where the suite is tried, torch's operators that read or bring a number through the host count instead.
Ends with code 1 and the names of what waited.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from programs import Program, programs
from timing import synchronise, watched


@contextmanager
def forbidden(device: str) -> Iterator[None]:
    """Inside, torch raises where the host would wait."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(program: Program, device: str) -> list[str]:
    """What makes the host wait in two calls, after two that may fill caches and compile."""
    for _ in range(2):
        program.call()
    synchronise(device)
    try:
        with forbidden(device):
            program.call()
    except RuntimeError as problem:
        return [str(problem).splitlines()[0]]
    with watched(device) as trace:
        program.call()
    return trace.waits()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    waiting = 0
    for name, make in programs(device):
        try:
            found = waits(make(), device)
        except Exception as problem:  # whatever it is, the other programs run too
            found = [f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"]
        waiting += bool(found)
        print(f"{name:28} {'waits: ' + ', '.join(sorted(set(found))) if found else 'no wait'}", flush=True)
    return 1 if waiting else 0


if __name__ == "__main__":
    sys.exit(main())
