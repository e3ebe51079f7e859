"""Which time grid serves the digits teacher best? Frechet distances of fixed and searched grids at 4 to 10 evaluations.

    python benchmarks/digits_grids.py [--teacher runs/demo/teacher] [--samples 10000] [--quick]

Fixed grids: uniform, log-SNR, Karras, the closed form for Gaussian data, Align-Your-Steps' table (of Stable Video
Diffusion, the one it has for this schedule). Searched on this teacher with `fewstep search-grid`: GITS (its own metric
and the plain distance), Watson's bound and Analytic-DPM's. Under Euler, DPM-Solver++ 2M, and DDPM, the sampler the
bounds speak of. For Euler and 2M also DDSS, a grid searched for that very solver by descent through its samples, from
Karras' grid. All from the same noise and labels; ratios to Karras' grid under the same solver, with paired bootstrap
intervals. Beside them DPM-Solver-v3, with statistics estimated from training digits, on three of the fixed grids.
Writes benchmarks/results/digits_grids.json and .svg.
"""

from __future__ import annotations

import argparse
import datetime
import html
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep_kernels as fk
from fewstep import solvers
from fewstep.artefact import load
from fewstep.data.digits import CLASSES, digits
from fewstep.diffusion import Denoiser
from fewstep.doctor import machine, versions
from fewstep.evaluate import bootstrap
from fewstep.evaluate.features import digit_classifier
from fewstep.evaluate.frechet import frechet_distance, moments
from fewstep.evaluate.grid_search import search_grid
from fewstep.solvers import model_statistics
from fewstep.solvers.dpm_solver_v3 import dpm_solver_v3

RESULTS = Path(__file__).parent / "results" / "digits_grids.json"
STEPS = (4, 6, 8, 10)
SOLVERS: Mapping[str, dict[str, Any]] = {"euler": {}, "dpmpp_2m": {}, "ddpm": {}}
FIXED: Mapping[str, solvers.grids.Grid] = {
    "uniform": {"name": "uniform"},
    "log_snr": {"name": "log_snr"},
    "karras": {"name": "karras"},
    "kl_optimal": {"name": "kl_optimal", "data_std": 0.75},
    "align_your_steps": {"name": "align_your_steps", "model": "svd"},
}
SEARCHED = {"gits": "gits", "gits_l2": "gits-l2", "watson_bound": "bound", "analytic_bound": "analytic"}
DESCENDED = ("euler", "dpmpp_2m")  # solvers with a grid of their own
COLOURS = ("#9a9a9a", "#5a5a1e", "#222222", "#b7793a", "#8d3b5e", "#2f6f4e", "#007c89", "#3b5b92", "#c0392b", "#7d3cb5")


def searched(teacher: Path, folder: Path, steps: Sequence[int], quick: bool) -> dict[str, solvers.grids.Grid]:
    """The searched grids, each written to a file of its own."""
    found: dict[str, solvers.grids.Grid] = {}
    for name, cost in SEARCHED.items():
        path = folder / f"{name}.json"
        size = {"points": 12, "samples": 16} if quick else {"points": 60, "samples": 256}
        search_grid(teacher, path, cost=cost, steps=steps, data="digits", progress=lambda line: None, **size)
        found[name] = {"name": "searched", "path": str(path)}
    return found


def descended(teacher: Path, folder: Path, solver: str, steps: Sequence[int], quick: bool) -> solvers.grids.Grid:
    """The grid that gradient descent through `solver` finds from Karras' (DDSS, 2202.05830)."""
    path = folder / f"ddss_{solver}.json"
    size = {"points": 12, "samples": 16, "rounds": 4} if quick else {"points": 60, "samples": 256, "rounds": 100}
    search_grid(teacher, path, cost="samples", sampler=solver, steps=steps, nodes="karras", progress=print, **size)
    return {"name": "searched", "path": str(path)}


def drawn(denoiser: Denoiser, plan: solvers.Plan, samples: int, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Images [samples, ...]: labels i mod 10, Philox seeds seed 2^32 + i."""
    images = []
    for index in torch.arange(samples).split(500):
        seeds = seed * 2**32 + index
        images.append(solvers.sample(denoiser, plan, fk.normal(seeds, shape), index % CLASSES, seeds=seeds))
    return torch.cat(images)


def by_statistics(denoiser: Denoiser, quick: bool) -> dict[str, dict[str, Any]]:
    """DPM-Solver-v3's options by name; its statistics from 256 training digits of all classes, at 40 levels."""
    images, labels = digits("train")
    count, points = (32, 6) if quick else (256, 40)
    found = model_statistics.estimate(denoiser, images[:count], cond=labels[:count], points=points, batch=count)
    options = {"order": 2, "corrector": "same"}
    return {grid: {"statistics": found, "grid": grid, **options} for grid in ("log_snr", "karras", "kl_optimal")}


def measured(teacher: Path, folder: Path, samples: int, seed: int, steps: Sequence[int], quick: bool) -> dict[str, Any]:
    """{solver: {grid: {steps: {times, frechet, ratio to karras and its interval}}}}, and the floor of real digits."""
    model = load(teacher)
    denoiser, network = model.denoiser.eval(), digit_classifier()
    reference = moments(network.features(digits("held_out")[0]))
    everyones = {**FIXED, **searched(teacher, folder, steps, quick)}
    v3 = by_statistics(denoiser, quick)
    table: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for solver, options in SOLVERS.items():
        own = {"ddss": descended(teacher, folder, solver, steps, quick)} if solver in DESCENDED else {}
        grids = {**everyones, **own}
        for count in steps:
            resampled = {}
            for name, grid in grids.items():
                plan = solvers.plan(
                    solver, denoiser.schedule, count, grid=grid, prediction=denoiser.prediction, **options
                )
                assert plan.evaluations == count, (solver, name, plan.evaluations)
                images = drawn(denoiser, plan, samples, seed, model.image_shape)
                resampled[name] = bootstrap.resample(network.features(images), reference, 20 if quick else 200, seed)
                row = {"times": list(plan.times), "frechet": resampled[name].estimate}
                table.setdefault(solver, {}).setdefault(name, {})[str(count)] = row
                print(f"{solver:9} {name:17} {count:>3} evaluations: Frechet {row['frechet']:8.3f}", flush=True)
            for name in grids:
                found = bootstrap.compare(resampled[name], resampled["karras"])
                table[solver][name][str(count)] |= {"to_karras": found.ratio, "interval": found.ratio_interval}
    for name, options in v3.items():
        for count in steps:
            sampler, images = dpm_solver_v3(steps=count, **options), []
            for index in torch.arange(samples).split(500):
                noise = fk.normal(seed * 2**32 + index, model.image_shape)
                images.append(sampler.sample(denoiser, noise, index % CLASSES))
            distance = frechet_distance(network.features(torch.cat(images)), reference)
            curves.setdefault(name, {})[str(count)] = {"times": list(sampler.times), "frechet": distance}
            print(f"dpm_solver_v3 {name:13} {count:>3} evaluations: Frechet {distance:8.3f}", flush=True)
    floor = frechet_distance(network.features(digits("train")[0]), reference)
    return {
        "solvers": table,
        "dpm_solver_v3": curves,
        "floor": floor,
        "samples": samples,
        "seed": seed,
        "teacher": model.digest,
    }


def plotted(record: Mapping[str, Any]) -> str:
    """One panel per solver: each grid's Frechet distance against evaluations, logarithmic, named at its last point."""
    wide, high, left, top, names = 300, 320, 52, 40, 130
    solvers_drawn = {**record["solvers"], "dpm_solver_v3": record["dpm_solver_v3"]}
    values = [row["frechet"] for grids in solvers_drawn.values() for g in grids.values() for row in g.values()]
    low, most = math.log(min([*values, record["floor"]]) * 0.9), math.log(max(values) * 1.1)

    def across(count: float, panel: int) -> float:
        first, last = min(counts), max(counts)
        return left + panel * (wide + names) + (count - first) / max(last - first, 1) * (wide - left)

    def up(value: float) -> float:
        return top + (most - math.log(value)) / (most - low) * (high - top - 40)

    counts = sorted({int(n) for grids in solvers_drawn.values() for g in grids.values() for n in g})
    width = left + len(solvers_drawn) * (wide + names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{high}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{high}" fill="white"/>'
    ]
    for panel, (solver, grids) in enumerate(solvers_drawn.items()):
        begin, end = across(counts[0], panel), across(counts[-1], panel)
        parts.append(f'<text x="{begin}" y="18" font-size="13">{html.escape(solver)}: Frechet distance</text>')
        for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500):
            if low <= math.log(tick) <= most:
                parts.append(
                    f'<path d="M{begin} {up(tick):.1f}H{end}" stroke="#e4e4e4"/>'
                    f'<text x="{begin - 6}" y="{up(tick) + 4:.1f}" text-anchor="end" fill="#777">{tick}</text>'
                )
        for count in counts:
            parts.append(
                f'<text x="{across(count, panel)}" y="{high - 22}" text-anchor="middle" fill="#777">{count}</text>'
            )
        parts.append(
            f'<text x="{(begin + end) / 2}" y="{high - 6}" text-anchor="middle" fill="#777">evaluations</text>'
        )
        floor = up(record["floor"])
        parts.append(f'<path d="M{begin} {floor:.1f}H{end}" stroke="#777" stroke-dasharray="4 3"/>')
        ends = sorted((up(curve[str(counts[-1])]["frechet"]), name) for name, curve in grids.items())
        place = top - 12.0
        for y, name in ends:
            place = max(place + 12.0, y)
            colour = COLOURS[[*FIXED, *SEARCHED, "ddss"].index(name)]
            line = " ".join(f"{across(int(n), panel):.1f},{up(row['frechet']):.1f}" for n, row in grids[name].items())
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
            parts.append(f'<text x="{end + 6}" y="{place + 4:.1f}" fill="{colour}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=Path("runs/demo/teacher"))
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="400 samples and small searches: to see that it runs")
    arguments = parser.parse_args()
    samples = 400 if arguments.quick else arguments.samples
    with tempfile.TemporaryDirectory() as folder:
        given = (arguments.teacher, Path(folder), samples, arguments.seed, arguments.steps, arguments.quick)
        record = measured(*given)
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    head = {"benchmark": "digits_grids", "date": stamp, "quick": arguments.quick}
    report = {**head, "machine": machine(), "versions": versions(), **record}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".svg").write_text(plotted(report), encoding="utf-8")
    print(f"floor (real digits): {record['floor']:.3f}; wrote {arguments.out} and its plot")


if __name__ == "__main__":
    main()
