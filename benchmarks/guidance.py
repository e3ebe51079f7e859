"""What every form of guidance does to a law that is known: ten overlapping Gaussian classes in 64 dimensions.

    python benchmarks/guidance.py [--out benchmarks/results/guidance.json] [--page docs/guidance.md]

Prints a table, writes it as JSON and puts it into the page. Nothing here is a timing: the numbers come from seeds, and
another machine changes them in the last digit at most. Samples of all forms start from the same noise, so that what a
form moved is a mean of differences.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import doctor, solvers
from fewstep.analytic import Mixture
from fewstep.diffusion import schedules

ROOT = Path(__file__).parents[1]
CLASSES, DIMENSIONS, STD, STEPS, EACH = 10, 64, 0.5, 32, 200
EDM = schedules.get("edm")
W = 3.0


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    guidance: Any
    solver: str = "dpmpp_2m"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher: str = "exact"


CASES = [
    Case("none", None),
    Case("cfg, w = 1.5", 1.5),
    Case("cfg, w = 3", W),
    Case("interval, w = 3, 0.3 < sigma <= 2", {"name": "interval", "scale": W, "sigma_low": 0.3, "sigma_high": 2.0}),
    Case("rescale, w = 3, share 0.7", {"name": "rescale", "scale": W, "of": "denoised"}),
    Case("apg, w = 3", {"name": "apg", "scale": W}),
    Case("apg, w = 3, radius 1, momentum -0.5", {"name": "apg", "scale": W, "radius": 1.0, "momentum": -0.5}),
    Case("cfg_zero_star, w = 3", {"name": "cfg_zero_star", "scale": W, "of": "denoised"}),
    Case("mambo_g, w = 3, decay 1", {"name": "mambo_g", "scale": W, "decay": 1.0, "of": "denoised"}),
    Case("tcfg, w = 3", {"name": "tcfg", "scale": W, "of": "denoised"}),
    Case("perp_neg, w = 3, the next class at 0.5", {"name": "perp_neg", "scale": W, "weights_of": [0.5]}),
    Case("classifier, s = 2", {"name": "classifier", "scale": W - 1.0}),
    Case("none, ddim", None, "ddim"),
    Case("cfg++, w = 0.6, ddim", {"name": "cfg++", "scale": 0.6}, "ddim"),
    Case("none, clipped at 1", None, options={"clip": 1.0}),
    Case("cfg, w = 3, threshold at 0.995", W, options={"threshold": {"quantile": 0.995}}),
    Case("none, blurred teacher", None, teacher="blurred"),
    Case("cfg, w = 1.5, blurred teacher", 1.5, teacher="blurred"),
    Case("autoguidance, w = 2, blurred teacher", {"name": "autoguidance", "scale": 2.0}, teacher="blurred"),
    Case(
        "perturbed, w = 1, v = 1, blurred teacher",
        {"name": "perturbed", "scale": 1.0, "perturbed_scale": 1.0},
        teacher="blurred",
    ),
]


def law(std: float) -> Mixture:
    """Ten classes whose means have norm 1; a blurred law is what a network learns that has not learnt enough."""
    means = torch.randn(CLASSES, DIMENSIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Mixture([1 / CLASSES] * CLASSES, means / means.norm(dim=1, keepdim=True), [std] * CLASSES)


TRUTH = law(STD)
LAWS = {"exact": TRUTH, "blurred": law(1.2 * STD), "weak": law(1.5 * STD)}


def gradient(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """grad log p(cond | x), which is (D_cond - D_uncond) alpha/sigma^2; t is the schedule's network time."""
    sigma = torch.as_tensor(EDM.sigma(EDM.time_of_network_time(t)))
    of_class, of_all = (TRUTH.denoise(x, torch.ones_like(sigma), sigma, one) for one in (cond, TRUTH.null(cond)))
    return (of_class - of_all) / sigma.square()[:, None]


def drawn(case: Case, each: int = EACH) -> tuple[Tensor, solvers.Plan]:
    """[classes x each, D] and the plan they come from."""
    teacher = LAWS[case.teacher].teacher(EDM, "edm")
    plan = solvers.plan(case.solver, EDM, STEPS, prediction="edm", guidance=case.guidance, **case.options)
    noise = torch.randn(CLASSES * each, DIMENSIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(CLASSES).repeat_interleave(each)
    weak = LAWS["weak"].teacher(EDM, "edm")
    others = {role: {"gradient": gradient}.get(role, weak) for role in plan.roles}
    negatives = [(labels + 1) % CLASSES] if "perp_neg" in str(case.guidance) else []
    return solvers.sample(teacher, plan, noise, labels, others=others, negatives=negatives), plan


def scored(case: Case, plain: Tensor, each: int = EACH) -> dict[str, Any]:
    """`plain`: the exact teacher's unguided samples from the same noise."""
    x, plan = drawn(case, each)
    labels = torch.arange(CLASSES).repeat_interleave(each)
    shares, _, _ = TRUTH.posterior(x, 1.0, 1e-6)
    moved = (x - plain).unflatten(0, (CLASSES, each)).mean(1).norm(dim=1) / STD
    # the plane that the classes differ in, where guidance acts
    _, _, basis = torch.linalg.svd(TRUTH.means - TRUTH.means.mean(0), full_matrices=False)
    inside = (x.unflatten(0, (CLASSES, each)) - TRUTH.means[:, None]) @ basis[: CLASSES - 1].T
    asked = [len(stage.conditions) + sum(len(call.columns) for call in stage.others) for stage in plan.stages]
    return {
        "right": round(float((shares.argmax(1) == labels).double().mean()), 3),
        "moved": round(float(moved.mean()), 2),
        "spread": round(float(inside.var(1).mean().sqrt() / STD), 2),
        "answers": sum(asked),
        "calls": plan.evaluations,
    }


def measured(cases: list[Case] = CASES, each: int = EACH) -> dict[str, dict[str, Any]]:
    plain, _ = drawn(CASES[0], each)
    return {case.name: scored(case, plain, each) for case in cases}


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| guidance | right class | moved | spread | answers | calls |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['right']:.1%} | {row['moved']:.2f} | {row['spread']:.2f} "
            f"| {row['answers']} | {row['calls']} |"
        )
    return "\n".join(lines)


def written(page: str, rows: dict[str, dict[str, Any]]) -> str:
    """The page with its table between the marks replaced."""
    before, mark, rest = page.partition("<!-- numbers: guidance -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert mark and end, "the page has no <!-- numbers: guidance --> .. <!-- end -->"
    return f"{before}{mark}{table(rows)}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/guidance.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/guidance.md")
    arguments = parser.parse_args()
    rows = measured()
    print(table(rows))
    record = {
        "benchmark": "guidance",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": doctor.machine(),
        "versions": doctor.versions(),
        "samples": CLASSES * EACH,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if arguments.page.exists():
        arguments.page.write_text(written(arguments.page.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
