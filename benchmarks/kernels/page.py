"""The tables of numbers in docs/kernels.md, from the records in benchmarks/results/.

    python benchmarks/kernels/page.py

publish() in measure.py writes them as well, after each benchmark. A table stands between `<!-- numbers: NAME -->` and
`<!-- /numbers -->`, NAME being the record's; the page's text holds no measured number of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "kernels.md", ROOT / "benchmarks" / "results"
REGION = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- /numbers -->)", re.S)
Row = Mapping[str, Any]


def table(record: Row) -> str:
    """A line a case: our time, our speed as percent of the floor's, and every rival's time over ours."""
    machine, cases = record["machine"], [case for case in record["cases"] if _floor(case)]
    rivals = _unique(name for case in cases for name in [*case["results"]][1:] if name != _floor(case))
    floors = " or ".join(_unique(_floor(case) for case in cases))
    rows = [["case", "served by", "ms", "percent of floor", *rivals]]
    rows.append(["---", "---", *["---:"] * (len(rows[0]) - 2)])
    for case in cases:
        (name, ours), *_ = case["results"].items()
        served = re.search(r"\(([^()]*)\)$", name)
        cells = [_named(case), served[1] if served else name, f"{ours['milliseconds']:.3g}"]
        cells.append(f"{100 / ours['times_floor']:.0f}")
        found = (case["results"].get(rival) for rival in rivals)
        rows.append([*cells, *("" if row is None else f"{row['times_ours']:.2f} x" for row in found)])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    taken = (
        f"{machine['processor']}, {record['threads']} threads, torch {record['versions']['torch']}, "
        f"{record['date'][:10]}, load {record['load_average']:g}. Floor: {floors}. Others: their time over ours."
    )
    return "\n".join([*lines, "", taken])


def host_table(record: Row) -> str:
    """What calls and stages cost the host: median microseconds."""
    lines = ["| one call, 5 inputs, 3 outputs | microseconds |", "| --- | ---: |"]
    lines += [f"| {name} | {row['median']:.1f} |" for name, row in record["calls"].items()]
    lines += [
        "",
        "| solver | guidance | a stage beyond its network | a run beyond its stages |",
        "| --- | --- | ---: | ---: |",
    ]
    for row in record["stages"]:
        scale, ours = row["guidance"], row["sample"]
        cells = (row["solver"], "none" if scale is None else f"{scale:g}")
        cells += tuple(f"{ours[key]:.1f}" for key in ("stage_beyond_network", "run_beyond_stages"))
        lines.append("| " + " | ".join(cells) + " |")
    machine, versions = record["machine"], record["versions"]
    taken = (
        f"{machine['processor']}, one thread, torch {versions['torch']}, {record['date'][:10]}; microseconds, medians."
    )
    return "\n".join([*lines, "", taken])


def _floor(case: Row) -> str:
    """The name of the candidate that the others are a share of; "" in a case without one."""
    return next((name for name, row in case["results"].items() if row.get("times_floor") == 1.0), "")


def _named(case: Row) -> str:
    shape = f", {' x '.join(map(str, case['shape']))}" if case.get("shape") else ""
    return case["case"].partition(", floor:")[0] + shape + (f", {case['dtype']}" if case.get("dtype") else "")


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def records(folder: Path = RESULTS) -> dict[str, Row]:
    """The operators' records of a folder that were taken on a CPU, and the host's, by name."""
    paths = [*sorted(folder.glob("kernels_*.json")), *folder.glob("host_cost.json")]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {record["benchmark"]: record for record in found if record.get("device", "cpu") == "cpu"}


def written(page: str, found: Mapping[str, Row]) -> str:
    """The page with every table that there is a record for in its place."""

    def replaced(region: re.Match[str]) -> str:
        record = found.get(region[2])
        if record is None:
            return region[0]
        return f"{region[1]}{host_table(record) if 'stages' in record else table(record)}\n{region[3]}"

    return REGION.sub(replaced, page)


def rewrite() -> None:
    """Write the tables of benchmarks/results/ into the page."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), records()), encoding="utf-8")


if __name__ == "__main__":
    rewrite()
    print(f"written to {PAGE}")
