"""What solvers cost and what they are worth: time, operators and host reads per step against diffusers in the same run;
and quality against network calls, for every solver, on a mixture with known truth and on the digits teacher.

    OMP_NUM_THREADS=2 python benchmarks/solvers.py [cost] [quality] [--teacher runs/demo/teacher] [--device cuda]

Writes solvers_cost.json, solvers_quality.json and its plot to --out (benchmarks/results). `quality` without --teacher
leaves the digits out. --quick is a dry run of everything on little: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
from pathlib import Path
from typing import Any

import solver_plot
import solver_quality
import solver_steps
import torch

from fewstep import doctor

RESULTS = Path(__file__).parent / "results"
LATENT = (4, 128, 128)  # SDXL's at 1024 pixels


def header(name: str, device: str) -> dict[str, Any]:
    return {
        "benchmark": name,
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": doctor.machine(),
        "versions": doctor.versions(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def cost(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = [(1, 4, 8, 8)] if arguments.quick else [(batch, *LATENT) for batch in (1, 16)]
    modes = solver_steps.MODES[:1] if arguments.quick else solver_steps.MODES
    rounds = 2 if arguments.quick else 30
    records = []
    for record in solver_steps.measured(arguments.device, rounds, sizes, modes):
        counts = "; ".join(f"{name} {found}" for name, found in record["counts"].items())
        print(f"\n{record['solver']} at {record['shape']}, {record['steps']} steps: {counts}")
        for row in record["times"]:
            print("  " + "  ".join(f"{key.replace('_', ' ')} {value}" for key, value in row.items()), flush=True)
        records.append(record)
    return header("solvers_cost", arguments.device) | {
        "what": "microseconds per step, network taken off; latents in float32; but for 'eager' the network copies its "
        "answer and no compiler looks into it; 'all compiled': scheduler.step of diffusers, the whole sampler of ours",
        "cases": records,
    }


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    quick = arguments.quick
    record = header("solvers_quality", "cpu")
    names = ("ddim", "dpmpp_2m", "heun", "sa") if quick else ()
    budgets = {"budgets": (4, 10)} if quick else {}
    record["mixture"] = solver_quality.on_mixture(*((8, 50) if quick else (256, 4000)), names=names, **budgets)
    if arguments.teacher is not None:
        count = 100 if quick else arguments.samples
        record["digits"] = solver_quality.on_digits(arguments.teacher, count, names=names, **budgets)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], "cost", "quality"], help="both, unless named")
    parser.add_argument("--teacher", type=Path, help="artefact folder of the digits teacher")
    parser.add_argument("--samples", type=int, default=5000, help="digits per solver and budget")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where steps are timed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a dry run")
    arguments = parser.parse_args()
    torch._logging.set_logs(dynamo=logging.ERROR)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, run in (("cost", cost), ("quality", quality)):
        if arguments.parts and name not in arguments.parts:
            continue
        record = run(arguments)
        path = arguments.out / f"solvers_{name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if name == "quality":
            path.with_suffix(".svg").write_text(solver_plot.draw(record), encoding="utf-8")
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
