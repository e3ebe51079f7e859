"""How good are the digit students? Three seeds, 10,000 samples each, against one held-out set.

    python benchmarks/digits.py [--seeds 0 1 2] [--out runs/benchmark_digits]

Writes benchmarks/results/digits.json: per seed every metric of the report, the paired bootstrap intervals, and whether
each claim holds; then the median over seeds. The floor (real training digits against held-out ones) is in every record.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

from fewstep.demo import BOUNDS, train_digits
from fewstep.doctor import machine, versions
from fewstep.evaluate.suite import evaluate_artefacts

RESULTS = Path(__file__).parent / "results" / "digits.json"
CLAIMS = [
    (
        f"{student} at {steps} against the teacher at {evaluations} evaluation{'s' * (evaluations > 1)}",
        (student, steps),
        evaluations,
        bound,
    )
    for (student, steps, evaluations), bound in BOUNDS.items()
]


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim with its ratio of Frechet distances and whether it holds."""
    rows = []
    for claim, (student, steps), teacher_evaluations, bound in CLAIMS:
        metrics = results["students"][student][str(steps)]
        rival = results["teacher"][f"{metrics['guidance']:g}"][str(teacher_evaluations)]
        ratio = metrics["frechet"] / rival["frechet"]
        rows.append({"claim": claim, "ratio": round(ratio, 4), "bound": bound, "holds": ratio <= bound})
    return rows


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The record of one seed: all numbers, no pictures, no curves."""
    return {key: value for key, value in results.items() if key not in ("samples", "losses")} | {
        "claims": claims(results)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_digits"))
    arguments = parser.parse_args()
    records = {}
    for seed in arguments.seeds:
        folder = arguments.out / f"seed_{seed}"
        teacher, students = train_digits(folder, seed, resume=True)
        records[str(seed)] = summary(evaluate_artefacts(teacher=teacher, students=students, seed=seed))
    median = [
        {
            "claim": claim,
            "bound": bound,
            "median_ratio": statistics.median(record["claims"][number]["ratio"] for record in records.values()),
            "holds_for": sum(record["claims"][number]["holds"] for record in records.values()),
            "of": len(records),
        }
        for number, (claim, _, _, bound) in enumerate(CLAIMS)
    ]
    report = {
        "benchmark": "digits",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "claims": median,
        "seeds": records,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in median:
        verdict = f"holds for {row['holds_for']} of {row['of']} seeds"
        print(f"{row['claim']}: {row['median_ratio']:.2f} (bound {row['bound']}), {verdict}")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
