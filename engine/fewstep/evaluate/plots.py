"""The report's plots as SVG, coloured by the page's variables so that they follow its light or dark theme."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Point = tuple[float, float]
COLOURS = 5
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 14, 50


def colour(number: int) -> str:
    return f"var(--c{number % COLOURS})"


def legend(names: Sequence[str]) -> str:
    items = (f'<li><i style="background:{colour(n)}"></i>{html.escape(name)}</li>' for n, name in enumerate(names))
    return f'<ul class="legend">{"".join(items)}</ul>'


def lines(
    series: Mapping[str, Sequence[Point]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    floor: tuple[float, str] | None = None,
    marks: bool = True,
    ticks: Sequence[float] | None = None,
    size: tuple[int, int] = (560, 330),
) -> str:
    """Curves by name, with their legend; `floor` is a level to mark with its words. Values not finite are left out."""
    kept = {
        name: [p for p in points if all(map(math.isfinite, p)) and (p[0] > 0 or not log_x) and (p[1] > 0 or not log_y)]
        for name, points in series.items()
    }
    everything = [point for points in kept.values() for point in points]
    if not everything:
        return '<p class="note">No finite value to draw.</p>'
    width, height = size
    levels = [p[1] for p in everything] + ([floor[0]] if floor else [])
    across = _Axis([p[0] for p in everything], log_x, _LEFT, width - _RIGHT, ticks, tight=True)
    up = _Axis(levels, log_y, height - _BOTTOM, _TOP, None, zero=not log_y)
    parts = [_frame(across, up, width, height, x, y)]
    if floor:
        level = up(floor[0])
        parts.append(
            f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="var(--soft)" '
            f'stroke-dasharray="5 4"/><text x="{width - _RIGHT}" y="{level + 16:.1f}" text-anchor="end">'
            f"{html.escape(floor[1])}</text>"
        )
    for number, (name, points) in enumerate(kept.items()):
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour(number)}" stroke-width="2.2" '
            'stroke-linejoin="round" stroke-linecap="round"/>'
        )
        if marks:
            parts += [_dot(across(a), up(b), number, f"{name}: {a:g}, {b:.4g}") for a, b in points]
    return legend(list(kept)) + _svg(width, height, "".join(parts), f"{y} against {x}")


def scatter(
    series: Mapping[str, Sequence[tuple[float, float, str]]], *, x: str, y: str, size: tuple[int, int] = (560, 330)
) -> str:
    """Points (x, y, label) by series, joined in order by a thin line."""
    everything = [point for points in series.values() for point in points]
    if not everything:
        return '<p class="note">No point to draw.</p>'
    width, height = size
    across = _Axis([p[0] for p in everything], False, _LEFT, width - _RIGHT - 10, None, pad=0.12)
    up = _Axis([p[1] for p in everything], False, height - _BOTTOM, _TOP, None, pad=0.12)
    parts = [_frame(across, up, width, height, x, y)]
    for number, (name, points) in enumerate(series.items()):
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b, _ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour(number)}" stroke-opacity=".4"/>')
        for a, b, label in points:
            parts.append(_dot(across(a), up(b), number, f"{name}, {label}: {a:.4g}, {b:.4g}"))
            parts.append(f'<text x="{across(a) + 8:.1f}" y="{up(b) - 6:.1f}">{html.escape(label)}</text>')
    return legend(list(series)) + _svg(width, height, "".join(parts), f"{y} against {x}")


def bars(rows: Sequence[tuple[str, float, float, int]], *, unit: str, width: int = 560) -> str:
    """Horizontal bars (label, p50, p90, colour number) from zero, with a whisker to p90."""
    most = max((max(p50, p90) for _, p50, p90, _ in rows), default=0) or 1.0
    room = width - 96
    parts = []
    for number, (label, p50, p90, shade) in enumerate(rows):
        top = number * 46
        length, reach = room * p50 / most, room * p90 / most
        parts.append(
            f'<text class="value" x="0" y="{top + 13}">{html.escape(label)}</text>'
            f'<rect x="0" y="{top + 20}" width="{max(length, 1.5):.1f}" height="14" rx="2" fill="{colour(shade)}">'
            f"<title>p50 {p50:.4g} {unit}, p90 {p90:.4g} {unit}</title></rect>"
            f'<path d="M{length:.1f} {top + 27}H{reach:.1f}M{reach:.1f} {top + 23}v8" stroke="var(--ink)" fill="none"/>'
            f'<text class="value" x="{max(length, reach) + 8:.1f}" y="{top + 32}">{p50:.3g} {unit}</text>'
        )
    return _svg(width, 46 * len(rows), "".join(parts), f"latency in {unit}")


class _Axis:
    def __init__(
        self,
        values: Sequence[float],
        log: bool,
        begin: float,
        end: float,
        ticks: Sequence[float] | None,
        *,
        tight: bool = False,
        zero: bool = False,
        pad: float = 0.04,
    ) -> None:
        self.log, self.begin, self.end = log, begin, end
        low, high = min(values), max(values)
        if zero and low >= 0:
            low = 0.0
        self.low, self.high = self._scaled(low), self._scaled(high)
        span = self.high - self.low or 1.0
        if not tight:
            self.high += pad * span
            if not (zero and low == 0):
                self.low -= pad * span
        elif self.high == self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.ticks = list(ticks) if ticks else self._ticks()

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.begin + (self.end - self.begin) * (self._scaled(value) - self.low) / (self.high - self.low)

    def _ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            steps = (1, 2, 5) if self.high - self.low < 2 else (1,)
            every = [step * 10.0**power for power in powers for step in steps]
            return [tick for tick in every if self.low <= math.log10(tick) <= self.high]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, first + 12) if step * n <= self.high + 1e-9 * step]


def _frame(across: _Axis, up: _Axis, width: int, height: int, x: str, y: str) -> str:
    base = height - _BOTTOM
    parts = [
        f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}" stroke="var(--line)"/>'
        f'<text x="{_LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        for tick in up.ticks
    ]
    parts += [
        f'<text x="{across(tick):.1f}" y="{base + 20}" text-anchor="middle">{tick:.4g}</text>' for tick in across.ticks
    ]
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - 4}" text-anchor="middle">{html.escape(x)}</text>')
    return "".join(parts)


def _dot(x: float, y: float, number: int, words: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour(number)}" stroke="var(--card)" stroke-width="1.5">'
        f"<title>{html.escape(words)}</title></circle>"
    )


def _svg(width: int, height: int, content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">{content}</svg>'
