"""The operators' benchmarks on a GPU: correctness first, then times beside floors and rivals in the same run.

    python benchmarks/gpu/bench.py [operator ...] [--device cpu --small] [--out FOLDER]

Writes kernels_<operator>_gpu.json and .svg to FOLDER (benchmarks/results). A target that is missed is printed, and no
failure; a wrong value is, and leaves its operator without a record. --device cpu --small tries the script where there
is no GPU: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from case import By, Case, Wrong, measured

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import many_tensors
import maps
import networks
from measure import RESULTS, publish

OPERATORS: dict[str, tuple[Callable[[str, bool], Iterator[Case]], ...]] = {
    "lincomb": (maps.lincomb, maps.noising),
    "gram": (maps.gram,),
    "distance": (maps.distance,),
    "threshold": (maps.threshold,),
    "ema": (many_tensors.ema,),
    "adamw_ema": (many_tensors.adamw,),
    "attention_jvp": (networks.attention_jvp,),
    "group_norm_silu": (networks.group_norm_silu,),
    "norm_modulate": (networks.norm_modulate,),
}


def record(case: Case, rounds: int) -> dict:
    """What is published of one case."""
    found = measured(case, rounds)
    if case.name.startswith(("guided step, latents", "guided step, small")):
        ours = [call for call in case.candidates.values() if isinstance(call, By)]
        found["host_microseconds"] = {call.way: round(networks.host_microseconds(call), 2) for call in ours}
    if case.peak is not None:
        found["peak_memory_over_inputs_and_outputs"] = case.peak()
    for target in found["targets"]:
        print(f"  {case.name}: {target['what']} {target['found']}, asked {target['asked']}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"of {', '.join(OPERATORS)}; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny tensors, one round: tries the script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    unknown = [name for name in given.operators if name not in OPERATORS]
    if unknown:
        parser.error(f"unknown operator {unknown[0]!r}; choose from {', '.join(OPERATORS)}")
    torch.manual_seed(0)
    failed = []
    for name in given.operators or OPERATORS:
        torch.compiler.reset()
        rounds = 1 if given.small else 20
        try:
            cases = [record(case, rounds) for make in OPERATORS[name] for case in make(given.device, given.small)]
        except Wrong as problem:
            print(problem, file=sys.stderr)
            failed.append(name)
        except Exception:  # whatever it is, the other operators are measured
            traceback.print_exc()
            failed.append(name)
        else:
            publish(f"kernels_{name}_gpu", cases, given.device, given.out)
    if failed:
        sys.exit(f"no record of {', '.join(failed)}: see above.")


if __name__ == "__main__":
    main()
