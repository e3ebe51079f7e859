"""The plot beside each benchmark's JSON: for every case one bar a candidate, its speed as a share of the floor's.

    python benchmarks/kernels/plot.py benchmarks/results/kernels_*.json

publish() in measure.py draws it as well. Plain SVG: the same file wherever it is drawn.
"""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path

WIDTH, NAMES, NUMBERS = 860, 300, 150  # pixels: all, the names' column, the numbers' column
LINE, TITLE = 18, 30
MOST = 150.0  # percent of the floor at the right end; what is faster ends in an arrow
OURS, FLOOR, RIVAL = "#2f6f4e", "#9a9a9a", "#b7793a"


def percent(row: dict) -> float:
    """A candidate's speed as percent of the floor's in the same rounds."""
    return 100.0 / row["times_floor"]


def colour(name: str, position: int, row: dict) -> str:
    if row["times_floor"] == 1.0:
        return FLOOR
    return OURS if position == 0 else RIVAL


def bars(case: dict, top: int) -> list[str]:
    """One case: a title and a bar for each of its results, the first of them ours."""
    scale = (WIDTH - NAMES - NUMBERS) / MOST
    parts = [text(4, top + 18, case["case"], "bold")]
    for position, (name, row) in enumerate(case["results"].items()):
        y = top + TITLE + LINE * position
        share = percent(row)
        length = max(1.0, min(share, MOST) * scale)
        fill = colour(name, position, row)
        parts.append(text(NAMES - 8, y + 12, name[:44], "normal", "end"))
        parts.append(f'<rect x="{NAMES}" y="{y + 2}" width="{length:.1f}" height="{LINE - 5}" fill="{fill}"/>')
        arrow = "→ " if share > MOST else ""
        parts.append(text(NAMES + length + 6, y + 12, f"{arrow}{share:.3g}%, {row['milliseconds']:.4g} ms"))
    bottom = top + TITLE + LINE * len(case["results"])
    at = NAMES + 100 * scale
    parts.append(f'<path d="M{at:.1f} {top + TITLE - 2}V{bottom}" stroke="{FLOOR}" stroke-dasharray="3 3"/>')
    return parts


def text(x: float, y: float, words: str, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-weight="{weight}" text-anchor="{anchor}">{html.escape(str(words))}</text>'
    )


def draw(record: dict) -> str:
    """The SVG of a benchmark's record."""
    machine = record["machine"]
    device = machine["accelerator"] if record.get("device", "cpu") != "cpu" else machine["processor"]
    threads = f", {record['threads']} threads" if record.get("device", "cpu") == "cpu" else ""
    head = f"{record['benchmark']}: percent of the floor (100%: as fast as moving the same bytes)"
    parts = [text(4, 18, head, "bold"), text(4, 36, f"{device}{threads}, {record['date'][:10]}")]
    top = 46
    for case in record["cases"]:
        parts += bars(case, top)
        top += TITLE + LINE * len(case["results"]) + 6
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" {style}>'
        f'<rect width="{WIDTH}" height="{top}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    for given in map(Path, sys.argv[1:]):
        given.with_suffix(".svg").write_text(draw(json.loads(given.read_text())), encoding="utf-8")
        print(f"drawn: {given.with_suffix('.svg')}")
