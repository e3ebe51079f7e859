"""What samplers that learn are worth: grids and coefficients by descent (DDSS), and a head that knows the derivative.

    python benchmarks/learned_samplers.py [searches | genie] [--teacher runs/demo/teacher] [--head FOLDER] [--quick]

Searched: on ten Gaussians in 64 dimensions, whose exact path is known, from sigma 20 to 0.08. Grids even in time and in
log-SNR, GITS' from the same noise, and times, coefficients and both by gradient descent from even log-SNR
(2202.05830); the distance to the exact end on other noise. GENIE (2210.05475): its head, trained on the digits teacher
by recipes/digits_genie.yaml (or given by --head), the exact derivative, DDIM and DPM-Solver++ 2M; the distance to where
many steps end. Nothing here is a timing. Writes benchmarks/results/learned_samplers.json and the tables between
`<!-- numbers: learned_samplers/.. -->` and `<!-- end -->` of docs/solvers.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep_kernels as fk
from fewstep import artefact, config, solvers
from fewstep.analytic import Mixture
from fewstep.artefact import Artefact
from fewstep.diffusion import Denoiser, schedules
from fewstep.doctor import machine, versions
from fewstep.solvers import descent, grids, search
from fewstep.solvers.genie import DerivativeHead
from fewstep.solvers.plan_slopes import Batch
from fewstep.train import train

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "digits_genie.yaml"
EDM = schedules.get("edm")
FIRST, LAST = (EDM.time_of_half_log_snr(half) for half in (-3.0, 2.5))  # sigma 20 and 0.08
SEARCHES = (("ddim", 4, 256), ("dpmpp_2m", 4, 256), ("ddim", 6, 256), ("ddim", 6, 64))  # solver, steps, noises
WAYS = {
    "even_time": "even time",
    "gits": "`gits`",
    "start": "even log-SNR",
    "times": "searched times",
    "coefficients": "searched coefficients",
    "both": "both",
}
CALLS = (5, 10, 20)
SAMPLERS = {
    "ddim": "`ddim`",
    "head": "`genie`, trained head",
    "exact": "`genie`, exact derivative (its extra evaluations not counted)",
    "dpmpp_2m": "`dpmpp_2m`",
}


def mixture() -> Mixture:
    means = torch.randn(10, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.7
    return Mixture([0.1] * 10, means, [0.3] * 10)


def paths(count: int, seed: int) -> Batch:
    """Noise [count, 64] and where the exact path takes it."""
    noise = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(noise, mixture().flow_map(FIRST * noise, EDM, FIRST, LAST))


def laid(name: str, steps: int) -> tuple[float, ...]:
    return grids.times({"name": name, "start": FIRST, "end": LAST, "zero": "none"}, EDM, steps)


def searched(solver: str, steps: int, count: int, seed: int, rounds: int, fresh: Batch) -> dict[str, float]:
    """The distance to the exact end on `fresh` noise by each of WAYS, found on `count` other noises."""
    teacher, given = mixture().teacher(EDM), paths(count, seed)

    def plan(times: Sequence[float]) -> solvers.Plan:
        return solvers.plan(solver, EDM, steps, grid=list(times), prediction=teacher.prediction)

    nodes, start = laid("log_snr", 30), laid("log_snr", steps)
    way = search.search(search.trajectory_costs(teacher, given.noise, nodes), steps, 1.15)[steps].nodes
    found = descent.descend(teacher, [given], start, solver=solver, rounds=rounds).times
    plans = {
        "even_time": plan(laid("uniform", steps)),
        "gits": plan([nodes[node] for node in way]),
        "start": plan(start),
        "times": plan(found),
        "coefficients": descent.refine(teacher, [given], plan(start), rounds=rounds)[0],
        "both": descent.refine(teacher, [given], plan(found), rounds=rounds)[0],
    }
    return {name: distance(teacher, plans[name], fresh) for name in WAYS}


def distance(denoiser: Denoiser, plan: solvers.Plan, wanted: Batch, **others: Any) -> float:
    """The mean over samples of the norm of sample less target."""
    found = solvers.sample(denoiser, plan, wanted.noise, wanted.cond, **others)
    return float((found - wanted.target).flatten(1).norm(dim=1).mean())


def trained(teacher: Path, folder: Path, seed: int, quick: bool) -> Artefact:
    """The head of the recipe on `teacher`."""
    size = ["method.width=8", "data.batch_size=16", "train.updates=3"] if quick else []
    recipe = config.load(str(RECIPE), [f"teacher={teacher}", f"output={folder}", f"seed={seed}", *size])
    return artefact.load(train(recipe))


def second_order(
    teacher: Artefact, head: Artefact, count: int, seed: int, exact_steps: int
) -> dict[str, dict[str, float]]:
    """{calls: {sampler: distance to where `exact_steps` of DPM-Solver++ 2M end}}, on even log-SNR."""
    denoiser = teacher.denoiser.eval()

    def plan(solver: str, steps: int, **options: Any) -> solvers.Plan:
        return solvers.plan(solver, denoiser.schedule, steps, grid="log_snr", prediction=denoiser.prediction, **options)

    seeds = seed * 2**32 + torch.arange(count)
    noise, cond = fk.normal(seeds, teacher.image_shape), torch.arange(count) % 10
    ends: Tensor = solvers.sample(denoiser, plan("dpmpp_2m", exact_steps), noise, cond)
    wanted = Batch(noise, ends, cond)
    rows = {}
    for steps in CALLS:
        rows[str(steps)] = {
            "ddim": distance(denoiser, plan("ddim", steps), wanted),
            "head": distance(head.denoiser.eval(), plan("genie", steps, head="mixed", within=True), wanted),
            "exact": distance(denoiser, plan("genie", steps), wanted, others={"head": DerivativeHead(denoiser)}),
            "dpmpp_2m": distance(denoiser, plan("dpmpp_2m", steps), wanted),
        }
        print(f"genie: {steps} calls: {rows[str(steps)]}", flush=True)
    return rows


def searches(seed: int, quick: bool) -> dict[str, Any]:
    """The record of what is searched on the mixture."""
    rounds, fresh = (2, 16) if quick else (100, 256)
    new = paths(fresh, seed + 1)
    rows = []
    for solver, steps, noises in SEARCHES:
        count = min(noises, 16) if quick else noises
        distances = searched(solver, steps, count, seed, rounds, new)
        rows.append({"solver": solver, "steps": steps, "noises": count, "distances": distances})
        print(f"{solver}, {steps} steps, searched on {count}: {distances}", flush=True)
    return {"seed": seed, "rounds": rounds, "fresh": fresh, "rows": rows}


def genie(teacher: Path, head: Path | None, seed: int, quick: bool) -> dict[str, Any]:
    """The record of GENIE's head on the digits."""
    base = artefact.load(teacher)
    with tempfile.TemporaryDirectory() as folder:
        student = artefact.load(head) if head else trained(teacher, Path(folder) / "genie", seed, quick)
    digits, exact_steps = (4, 20) if quick else (200, 200)
    given = {"seed": seed, "teacher": base.digest, "head": student.digest, "digits": digits}
    return {**given, "exact_steps": exact_steps, "rows": second_order(base, student, digits, seed, exact_steps)}


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables by the name in their marks."""

    def lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))

    found = {}
    if "searches" in record:
        rows = [
            [f"`{r['solver']}`", str(r["steps"]), str(r["noises"]), *(f"{r['distances'][way]:.2f}" for way in WAYS)]
            for r in record["searches"]["rows"]
        ]
        found["searches"] = lines(["solver", "steps", "searched on", *WAYS.values()], rows)
    if "genie" in record:
        rows = [[calls, *(f"{r[name]:.2f}" for name in SAMPLERS)] for calls, r in record["genie"]["rows"].items()]
        found["genie"] = lines(["calls", *SAMPLERS.values()], rows)
    return found


def written(page: str, record: Mapping[str, Any]) -> str:
    """The page with its tables between the marks replaced."""
    for name, table in tables(record).items():
        before, mark, rest = page.partition(f"<!-- numbers: learned_samplers/{name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert mark and end, f"the page has no <!-- numbers: learned_samplers/{name} --> .. <!-- end -->"
        page = f"{before}{mark}{table}\n{end}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("searches", "genie"), help="only this; the other stays as in --out")
    parser.add_argument("--teacher", type=Path, default=Path("runs/demo/teacher"))
    parser.add_argument("--head", type=Path, help="GENIE's artefact on that teacher; default: trained here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "learned_samplers.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "solvers.md")
    parser.add_argument("--quick", action="store_true", help="few samples and rounds: to see that it runs; no page")
    arguments = parser.parse_args()
    part, seed, quick = arguments.part, arguments.seed, arguments.quick
    record = {"benchmark": "learned_samplers"}
    if part and arguments.out.exists():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    for name in [part] if part else ["searches", "genie"]:
        found = searches(seed, quick) if name == "searches" else genie(arguments.teacher, arguments.head, seed, quick)
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record[name] = {"date": stamp, "quick": quick, "machine": machine(), "versions": versions(), **found}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.page.exists() and not quick:
        arguments.page.write_text(written(arguments.page.read_text(encoding="utf-8"), record), encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
