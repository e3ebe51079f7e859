"""Take the numbers of a run of `fewstep demo` into the repository.

    python benchmarks/demo.py [runs/demo/results.json]

Writes benchmarks/results/demo.json (every number of the run, without pictures and loss curves), README's table between
`<!-- numbers: demo -->` and `<!-- /numbers -->`, and README's picture, docs/digits.png. The medians over seeds under
the table are those of benchmarks/results/digits.json (benchmarks/digits.py).
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from fewstep.evaluate import samplers
from fewstep.evaluate.results import read_results

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "README.md", ROOT / "docs" / "digits.png"
RECORD, SEEDS = ROOT / "benchmarks" / "results" / "demo.json", ROOT / "benchmarks" / "results" / "digits.json"
REGION = re.compile(r"(<!-- numbers: demo -->\n).*?(<!-- /numbers -->)", re.S)

PANELS = ("teacher/1", "teacher/32", "consistency/1", "dmd2/1")  # two a row
SCALE, MARGIN, TITLE = 4, 24, 26  # screen pixels of one of the images'; between panels; of a title's line
GREY = (125, 132, 140, 255)  # read on a light page and on a dark one


def record(results: Mapping[str, Any], date: datetime.date) -> dict[str, Any]:
    """The numbers of a run."""
    kept = {key: value for key, value in results.items() if key not in ("samples", "losses")}
    return {"benchmark": "demo", "date": date.isoformat(), **kept}


def numbers(found: Mapping[str, Any], seeds: Mapping[str, Any]) -> str:
    """README's table of Frechet distances and the sentences under it."""
    rows: dict[str, dict[int, float]] = {}
    for each in samplers.scored(found):
        name = each.name if each.is_teacher else samplers.title(each.family)
        rows.setdefault(name, {})[each.evaluations] = each.metrics["frechet"]
    columns = sorted({evaluations for row in rows.values() for evaluations in row})
    lines = [
        "| Fréchet distance at | 1 call | " + " | ".join(map(str, columns[1:])) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = (f"{row[at]:.2f}" if at in row else "" for at in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    how, data, floor, machine = found["measured"], found["data"], found["floor"], found["machine"]
    words = (
        f"Fréchet distances between {how['samples']:,} samples and {data['held_out']:,} held-out digits, in the "
        f"features of a fixed small classifier, from one `make demo` (seed {how['seed']}, {found['date']}, "
        f"{machine['cores']} cores of {machine['processor']}). {floor['count']:,} real training digits score "
        f"{floor['frechet']:.2f} there: that is the floor, not 0. {_ratios(found, seeds['seeds'])}"
    )
    return "\n".join([*lines, "", *textwrap.wrap(words, 124, break_on_hyphens=False)])


def _ratios(found: Mapping[str, Any], seeds: Mapping[str, Any]) -> str:
    """The comparisons with the reference that are held to a bound: in this run, and in the median over the seeds."""
    parts = []
    for row in found["comparisons"]:
        family, _, evaluations = samplers.read(row["name_a"])
        _, guidance, rival = samplers.read(row["name_b"])
        if row.get("bound") is None or rival != samplers.REFERENCE_EVALUATIONS:
            continue
        ratios = [
            each["students"][family][str(evaluations)]["frechet"]
            / each["teacher"][f"{guidance:g}"][str(rival)]["frechet"]
            for each in seeds.values()
        ]
        student = f"{samplers.title(family)} at {evaluations} call{'s' * (evaluations > 1)}"
        median = f"median of {len(ratios)} seeds: {statistics.median(ratios):.2f}"
        parts.append(f"the {student} has {row['ratio']:.2f} times ({median})")
    return (
        f"Of the teacher's distance at {samplers.REFERENCE_EVALUATIONS} calls {' and '.join(parts)}." if parts else ""
    )


def written(page: str, found: Mapping[str, Any], seeds: Mapping[str, Any]) -> str:
    """The page with the table in its place."""
    return REGION.sub(lambda region: f"{region[1]}{numbers(found, seeds)}\n{region[2]}", page)


def picture(results: Mapping[str, Any]) -> Image.Image:
    """The panels two a row, pixel for pixel enlarged, on a clear ground."""
    sheets = {key: Image.open(io.BytesIO(base64.b64decode(results["samples"][key]))).convert("RGBA") for key in PANELS}
    scores = {(each.family, each.guidance, each.evaluations): each.metrics for each in samplers.scored(results)}
    width, height = (SCALE * size for size in sheets[PANELS[0]].size)
    rows = -(-len(PANELS) // 2)
    canvas = Image.new("RGBA", (2 * width + MARGIN, rows * (height + TITLE) + (rows - 1) * MARGIN // 2))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for place, key in enumerate(PANELS):
        left, top = place % 2 * (width + MARGIN), place // 2 * (height + TITLE + MARGIN // 2)
        family, guidance, evaluations = samplers.read(key)
        who = samplers.title(family, guidance)
        distance = scores[family, guidance, evaluations]["frechet"]
        words = f"{who}, {evaluations} call{'s' * (evaluations > 1)}: distance {distance:.2f}"
        pen.text((left, top), words, fill=GREY, font=font)
        canvas.paste(sheets[key].resize((width, height), Image.Resampling.NEAREST), (left, top + TITLE))
    return canvas


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/results.json")
    results = read_results(source)
    date = datetime.datetime.fromtimestamp(source.stat().st_mtime, datetime.UTC).date()
    found = record(results, date)
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    seeds = json.loads(SEEDS.read_text(encoding="utf-8"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), found, seeds), encoding="utf-8")
    picture(results).save(PICTURE, optimize=True)
    for path in (RECORD, PAGE, PICTURE):
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
