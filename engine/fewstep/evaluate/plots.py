"""The report's plots as SVG, coloured by the page's variables so that they follow its light or dark theme.

Every plot is drawn twice, for a wide and for a narrow page, at one size of letters; the page's style shows one of them.
Curves are named where they run, not in a legend.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fewstep.evaluate.placing import LETTER, Axis, Box, Room, around, number

Point = tuple[float, float]
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 46  # pixels of margin around a plot's frame
WIDE, NARROW = (560, 340), (350, 320)


@dataclass(frozen=True)
class Series:
    """Points of one sampler or network; `words` beside each point, where given; `name` may be empty."""

    name: str
    points: Sequence[Point]
    colour: str
    words: Sequence[str] = field(default=())
    dashed: bool = False


def lines(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    floor: tuple[float, str] | None = None,
    marks: bool = True,
    ticks: Sequence[float] | None = None,
) -> str:
    """Curves with their names; `floor` is a level to mark with its words. Values not finite are left out."""
    kept = [_drawable(each, log_x, log_y) for each in series]
    floor = None if floor and log_y and floor[0] <= 0 else floor
    everything = [point for each in kept for point in each.points]
    if not everything:
        return '<p class="note">No finite value to draw.</p>'
    levels = [b for _, b in everything] + ([floor[0]] if floor else [])

    def draw(width: int, height: int) -> str:
        across = Axis([a for a, _ in everything], _LEFT, width - _RIGHT, log=log_x, ticks=ticks)
        up = Axis(levels, height - _BOTTOM, _TOP, log=log_y, zero=True, pad=0.09 if log_y else 0.04)
        room = Room((_LEFT, 0, width, height - _BOTTOM))
        parts = [_frame(across, up, width, height, x, y)]
        paths = [[(across(a), up(b)) for a, b in each.points] for each in kept]
        boxes = [room.keep_path_clear(path) for path in paths]
        if marks:
            room.keep_clear((a - 5, b - 5, a + 5, b + 5) for path in paths for a, b in path)
        if floor:
            level = up(floor[0])
            parts.append(
                f'<line class="floor" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" '
                'stroke="var(--soft)" stroke-dasharray="5 4"/>'
            )
            ends = ((_LEFT + 4, "start"), (width - _RIGHT, "end"))
            parts.append(room.place(floor[1], [(at, level + down, to) for down in (15, -6) for at, to in ends]))
        for each, path in zip(kept, paths):
            parts.append(_path(path, each))
            if marks:
                parts += [
                    _dot(*at, each.colour, f"{each.name}: {number(a)}, {b:.4g}")
                    for at, (a, b) in zip(path, each.points)
                ]
        parts += _names(room, kept, paths, boxes)
        return "".join(parts)

    return _twice(draw, f"{y} against {x}")


def scatter(series: Sequence[Series], *, x: str, y: str) -> str:
    """Points with their words, those of a series joined in order by a thin line."""
    everything = [point for each in series for point in each.points]
    if not everything:
        return '<p class="note">No point to draw.</p>'

    def draw(width: int, height: int) -> str:
        across = Axis([a for a, _ in everything], _LEFT, width - _RIGHT, pad=0.1)
        up = Axis([b for _, b in everything], height - _BOTTOM, _TOP, pad=0.1)
        room = Room((_LEFT, 0, width, height - _BOTTOM))
        parts = [_frame(across, up, width, height, x, y)]
        paths = [[(across(a), up(b)) for a, b in each.points] for each in series]
        boxes = [room.keep_path_clear(path, reach=1.0) for path in paths]
        room.keep_clear((a - 5, b - 5, a + 5, b + 5) for path in paths for a, b in path)
        for each, path in zip(series, paths):
            parts.append(_path(path, each, thin=True))
            words = each.words or [""] * len(path)
            for at, (a, b), word in zip(path, each.points, words):
                hint = f"{each.name}{', ' if word else ''}{word}: {a:.4g}, {b:.4g}"
                parts.append(_dot(*at, each.colour, hint))
                if word:
                    parts.append(room.place(word, around(*at)))
        parts += _names(room, series, paths, boxes)
        return "".join(parts)

    return _twice(draw, f"{y} against {x}")


@dataclass(frozen=True)
class Bar:
    label: str
    p50: float
    p90: float
    colour: str


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, unit: str) -> str:
    """Horizontal bars from zero under the heads of their groups, with a whisker to p90."""
    every = [bar for _, group in groups for bar in group]
    most = max((max(bar.p50, bar.p90) for bar in every), default=0) or 1.0
    names = max((len(bar.label) for bar in every), default=0) * LETTER + 10

    def draw(width: int, beside: bool) -> tuple[str, int]:
        left = names if beside else 0.0
        room = width - left - 70
        parts, top = [], 0
        for head, group in groups:
            parts.append(f'<text class="head" x="0" y="{top + 15}">{html.escape(head)}</text>')
            top += 25
            for bar in group:
                parts.append(f'<text class="value" x="0" y="{top + 12}">{html.escape(bar.label)}</text>')
                top += 0 if beside else 18
                length, reach = left + room * bar.p50 / most, left + room * bar.p90 / most
                parts.append(
                    f'<rect x="{left:.1f}" y="{top + 1}" width="{max(length - left, 1.5):.1f}" height="14" rx="2" '
                    f'fill="{bar.colour}"><title>p50 {bar.p50:.4g} {unit}, p90 {bar.p90:.4g} {unit}</title></rect>'
                    + (_whisker(length, reach, top + 8) if reach - length > 3 else "")
                    + f'<text class="value" x="{max(length, reach) + 8:.1f}" y="{top + 12}">{bar.p50:.3g} {unit}</text>'
                )
                top += 22 if beside else 24
            top += 10
        return "".join(parts), max(top - 10, 1)

    label = f"latency in {unit}"
    wide, narrow = draw(WIDE[0], True), draw(NARROW[0], False)
    return _svg("wide", WIDE[0], wide[1], wide[0], label) + _svg("narrow", NARROW[0], narrow[1], narrow[0], label)


def _drawable(series: Series, log_x: bool, log_y: bool) -> Series:
    points = [
        (a, b)
        for a, b in series.points
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x) and (b > 0 or not log_y)
    ]
    return Series(series.name, points, series.colour, (), series.dashed)


def _names(
    room: Room, series: Sequence[Series], paths: Sequence[Sequence[Point]], boxes: Sequence[Sequence[Box]]
) -> list[str]:
    """The series' names, each beside its end if there is room, else along it."""
    names = []
    for index, (each, path) in enumerate(zip(series, paths)):
        if each.name and path:
            near = [path[-1], path[0], *path[:: -(-len(path) // 24)]]
            spots = [spot for far in (11.0, 17.0, 26.0) for a, b in near for spot in around(a, b, far)]
            others = [box for at, group in enumerate(boxes) if at != index for box in group]
            names.append(room.place(each.name, spots, each.colour, own=boxes[index], others=others))
    return names


def _path(path: Sequence[Point], series: Series, thin: bool = False) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in path)
    style = 'stroke-opacity=".45"' if thin else 'stroke-width="2.2" stroke-linejoin="round" stroke-linecap="round"'
    dashes = ' stroke-dasharray="6 5"' if series.dashed else ""
    return f'<polyline points="{points}" fill="none" stroke="{series.colour}" {style}{dashes}/>'


def _whisker(begin: float, end: float, height: float) -> str:
    return f'<path d="M{begin:.1f} {height}H{end:.1f}M{end:.1f} {height - 4}v8" stroke="var(--ink)" fill="none"/>'


def _frame(across: Axis, up: Axis, width: int, height: int, x: str, y: str) -> str:
    base = height - _BOTTOM
    parts = [
        f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}" stroke="var(--line)"/>'
        f'<text x="{_LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in up.ticks
    ]
    parts += [
        f'<text x="{across(tick):.1f}" y="{base + 20}" text-anchor="middle">{number(tick)}</text>'
        for tick in across.ticks
    ]
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - 4}" text-anchor="middle">{html.escape(x)}</text>')
    return "".join(parts)


def _dot(x: float, y: float, colour: str, words: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" stroke="var(--card)" stroke-width="1.5">'
        f"<title>{html.escape(words)}</title></circle>"
    )


def _twice(draw: Callable[[int, int], str], label: str) -> str:
    return _svg("wide", *WIDE, draw(*WIDE), label) + _svg("narrow", *NARROW, draw(*NARROW), label)


def _svg(name: str, width: int, height: int, content: str, label: str) -> str:
    return (
        f'<svg class="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">'
        f"{content}</svg>"
    )
