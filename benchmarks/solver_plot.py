"""One picture of quality against network calls: the best solvers named on their lines, the rest in grey.

    python benchmarks/solver_plot.py benchmarks/results/solvers_quality.json

Plain SVG, three panels that share their width: both axes logarithmic, lower is better.
"""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANEL, HEIGHT, LEFT, NAMES, TOP, BOTTOM = 560, 400, 62, 190, 70, 44  # pixels
COLOURS = ("#2f6f4e", "#b7793a", "#3b5b92", "#8d3b5e", "#5a5a1e", "#007c89")
GREY, SOFT, INK = "#c9c9c9", "#9a9a9a", "#222"
NAMED, AT = 5, 10  # how many are named: those best at this many calls
MOST = 30.0  # times the best first point: worse points are left out
Curve = list[tuple[float, float]]


def panels(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Title, axis, curves and floor of each panel there are numbers for."""
    found = []
    for part, measure, stochastic, title, axis in (
        ("mixture", "median", False, "Mixture, deterministic", "median distance to the exact end, per number"),
        ("mixture", "sliced_wasserstein", True, "Mixture, stochastic", "sliced Wasserstein-1 distance to the law"),
        ("digits", "frechet", None, "Digits teacher, all", "Frechet distance to held-out digits"),
    ):
        if part not in record:
            continue
        curves = {
            name: [(float(calls), point[measure]) for calls, point in curve["points"].items() if point[measure]]
            for name, curve in record[part]["curves"].items()
            if stochastic is None or curve["stochastic"] == stochastic
        }
        floor = record[part]["floor"] if stochastic is not False else None
        words = "as many exact draws" if part == "mixture" else "real digits"
        found.append({"title": title, "axis": axis, "curves": curves, "floor": floor, "words": words})
    return found


def at(curve: Curve, calls: float) -> float:
    """A curve's value at its last point of at most `calls`; infinite where it has none."""
    return min(((-x, y) for x, y in curve if x <= calls), default=(0.0, math.inf))[1]


def logarithmic(values: Sequence[float], low: float, high: float) -> Any:
    """Maps values to pixels from low to high, on a logarithmic axis with a little air."""
    least, most = math.log(min(values)), math.log(max(values))
    air = 0.03 * (most - least) + 1e-9
    scale = (high - low) / (most - least + 2 * air)
    return lambda value: low + (math.log(value) - least + air) * scale


def ticks(values: Sequence[float]) -> list[float]:
    least, most = min(values), max(values)
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    marks = (1.0,) if most > 1e3 * least else (1.0, 2.0, 5.0)
    return [m * 10.0**d for d in decades for m in marks if least <= m * 10.0**d <= most]


def text(x: float, y: float, words: str, fill: str = INK, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{fill}" text-anchor="{anchor}" {extra}>{html.escape(words)}</text>'


def apart(places: list[float], least: float, low: float, high: float) -> list[float]:
    """The places, in order, moved so that neighbours are `least` apart and all lie between low and high."""
    moved = list(places)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + least)
    if moved and moved[-1] > high:
        moved[-1] = high
        for i in range(len(moved) - 2, -1, -1):
            moved[i] = min(moved[i], moved[i + 1] - least)
    return [max(low, place) for place in moved]


def panel(content: Mapping[str, Any], left: float) -> list[str]:
    most = MOST * min(min(points)[1] for points in content["curves"].values() if points)
    shown = {name: [(x, y) for x, y in sorted(points) if y <= most] for name, points in content["curves"].items()}
    curves: dict[str, Curve] = {name: points for name, points in shown.items() if points}
    everything = [point for points in curves.values() for point in points]
    levels = [y for _, y in everything] + ([content["floor"]] if content["floor"] else [])
    start, end = left + LEFT, left + PANEL - NAMES
    across = logarithmic([x for x, _ in everything], start, end)
    up = logarithmic(levels, TOP + HEIGHT, TOP)
    parts = [text(start, TOP - 12, content["title"], extra='font-weight="bold"')]
    parts.append(f'<path d="M{start} {TOP}V{TOP + HEIGHT}H{end}" fill="none" stroke="{SOFT}"/>')
    for x in (x for x in (1, 2, 4, 6, 8, 10, 16, 20, 32, 50, 80) if min(p[0] for p in everything) <= x):
        if x <= max(p[0] for p in everything):
            parts.append(text(across(x), TOP + HEIGHT + 16, f"{x:g}", anchor="middle"))
    for y in ticks(levels):
        parts.append(text(start - 6, up(y) + 4, f"{y:g}", anchor="end"))
        parts.append(f'<path d="M{start} {up(y):.1f}H{end}" stroke="#eeeeee"/>')
    parts.append(text((start + end) / 2, TOP + HEIGHT + 34, "network calls", anchor="middle"))
    middle = TOP + HEIGHT / 2
    turned = f'transform="rotate(-90 {left + 12:.0f} {middle:.0f})"'
    parts.append(text(left + 12, middle, content["axis"], anchor="middle", extra=turned))
    if content["floor"]:
        level = up(content["floor"])
        parts.append(f'<path d="M{start} {level:.1f}H{end}" stroke="{SOFT}" stroke-dasharray="5 4"/>')
        parts.append(text(start + 6, level - 5, content["words"], fill="#777"))
    best = sorted(curves, key=lambda name: at(curves[name], AT))[:NAMED]
    for name in sorted(curves, key=lambda name: name in best):
        colour = COLOURS[best.index(name) % len(COLOURS)] if name in best else GREY
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curves[name])
        width = 2.2 if name in best else 1.2
        title = f"<title>{html.escape(name)}</title>"
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
            f'stroke-linejoin="round">{title}</polyline>'
        )
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.4" fill="{colour}"/>' for x, y in curves[name]]
    ranked = sorted(best, key=lambda name: up(curves[name][-1][1]))
    places = apart([up(curves[name][-1][1]) for name in ranked], 15.0, TOP + 4, TOP + HEIGHT)
    for name, place in zip(ranked, places):
        colour, (x, y) = COLOURS[best.index(name) % len(COLOURS)], curves[name][-1]
        parts.append(
            f'<path d="M{across(x) + 3:.1f} {up(y):.1f}L{end + 8} {place:.1f}" stroke="{colour}" stroke-width="0.8"/>'
        )
        parts.append(text(end + 11, place + 4, name if len(name) < 30 else name[:28] + "…", fill=colour))
    return parts


def draw(record: Mapping[str, Any]) -> str:
    """The SVG of a record of benchmarks/solvers.py."""
    shown = panels(record)
    width, height = PANEL * len(shown), TOP + HEIGHT + BOTTOM
    head = f"Quality against network calls: the best {NAMED} at {AT} calls are named, the rest are grey (hover to read)"
    parts = [text(8, 18, head, extra='font-weight="bold"')]
    grids = "Default grids (Karras, rho 7; scm: its own); lower is better; points off the scale are left out"
    parts.append(text(8, 36, f"{grids}; {record['date'][:10]}"))
    for number, content in enumerate(shown):
        parts += panel(content, number * PANEL)
    style = f'font-family="sans-serif" font-size="12" fill="{INK}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f"{style}>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    for given in map(Path, sys.argv[1:]):
        given.with_suffix(".svg").write_text(draw(json.loads(given.read_text())), encoding="utf-8")
        print(f"drawn: {given.with_suffix('.svg')}")
