"""Where a plot's axes put a number, and where its words find room."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Spot = tuple[float, float, str]  # x and baseline of some words, and their text-anchor: start, middle or end

LETTER = 6.9  # pixels of a letter at the plots' 12 px
_STRAY = 150.0  # square pixels
_CLOSEST = 24.0  # pixels between the ticks of a logarithmic axis, at least
_MANTISSAS = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))


class Axis:
    """Maps values to pixels from `begin` to `end`, with about five round ticks, or the given ones."""

    def __init__(
        self,
        values: Sequence[float],
        begin: float,
        end: float,
        *,
        log: bool = False,
        ticks: Sequence[float] | None = None,
        zero: bool = False,
        pad: float = 0.0,
    ) -> None:
        self.log, self.begin, self.end = log, begin, end
        low, high = min(values), max(values)
        from_zero = zero and low >= 0 and not log
        self.low, self.high = self._scaled(0.0 if from_zero else low), self._scaled(high)
        room = pad * (self.high - self.low) or (0.0 if self.high > self.low else 0.5)
        self.low, self.high = self.low - (0.0 if from_zero else room), self.high + room
        self.ticks = list(ticks) if ticks else self._log_ticks() if log else self._linear_ticks()

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.begin + (self.end - self.begin) * (self._scaled(value) - self.low) / (self.high - self.low)

    def _log_ticks(self) -> list[float]:
        """The finest of 1-1.5-2-3-5-7, 1-2-5, 1-3 and powers of ten that leaves room; else round numbers."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        found: list[float] = []
        for mantissas in _MANTISSAS:
            every = (float(f"{mantissa}e{power}") for power in powers for mantissa in mantissas)
            found = [tick for tick in every if self.low <= math.log10(tick) <= self.high]
            if all(abs(self(b) - self(a)) >= _CLOSEST for a, b in itertools.pairwise(found)):
                break
        if len(found) < 3:
            return [tick for tick in _round_numbers(10**self.low, 10**self.high) if tick > 0]
        return found[:: -(-len(found) // 9)]

    def _linear_ticks(self) -> list[float]:
        return _round_numbers(self.low, self.high)


def _round_numbers(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, first + 12) if step * n <= high + 1e-9 * step]


def number(value: float) -> str:
    """A tick's words: 2,000 or 0.25 or 3e-06."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{round(value):,}" if abs(value) >= 1e4 else f"{value:,.4g}"
    return f"{value:.3g}"


class Room:
    """The free space of a plot: what is drawn is kept clear, and words go where they cover least."""

    def __init__(self, frame: Box) -> None:
        self.frame = frame
        self.taken: list[Box] = []

    def keep_clear(self, boxes: Iterable[Box]) -> None:
        self.taken += boxes

    def keep_path_clear(self, points: Sequence[tuple[float, float]], reach: float = 2.0) -> list[Box]:
        """Small boxes along a polyline, one every four pixels."""
        boxes = [(x - reach, y - reach, x + reach, y + reach) for x, y in points[:1]]
        for (a, b), (c, d) in itertools.pairwise(points):
            pieces = max(1, math.ceil(math.hypot(c - a, d - b) / 4))
            for n in range(pieces + 1):
                x, y = a + (c - a) * n / pieces, b + (d - b) * n / pieces
                boxes.append((x - reach, y - reach, x + reach, y + reach))
        self.taken += boxes
        return boxes

    def place(
        self,
        words: str,
        spots: Sequence[Spot],
        fill: str = "",
        *,
        own: Sequence[Box] = (),
        others: Sequence[Box] = (),
    ) -> str:
        """`words` as an SVG text at the spot that covers least, the first of equals.

        A spot nearer to what belongs to others than to the words' own counts as if it covered two letters.
        """
        best, least = spots[0], math.inf
        for spot in spots:
            box = _extent(words, spot)
            price = self._covered(box)
            if price < least and others and _distance(box, others) < _distance(box, own):
                price += _STRAY
            if price < least:
                best, least = spot, price
            if not least:
                break
        self.taken.append(_extent(words, best))
        x, y, anchor = best
        colour = f' style="fill:{fill}"' if fill else ""
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{colour}>{html.escape(words)}</text>'

    def _covered(self, box: Box) -> float:
        left, top, right, bottom = self.frame
        outside = max(0.0, left - box[0]) + max(0.0, box[2] - right) + max(0.0, top - box[1]) + max(0, box[3] - bottom)
        return 1e3 * outside + sum(_overlap(box, other) for other in self.taken)


def around(x: float, y: float, far: float = 11.0) -> list[Spot]:
    """Spots for words about a point: right, left, above, below, then the corners."""
    return [
        *((x + far, y + 4, "start"), (x - far, y + 4, "end")),
        *((x, y - far, "middle"), (x, y + far + 9, "middle")),
        *((x + 6, y - 7, "start"), (x - 6, y - 7, "end"), (x + 6, y + 15, "start"), (x - 6, y + 15, "end")),
    ]


def _extent(words: str, spot: Spot) -> Box:
    width = LETTER * len(words)
    x, y, anchor = spot
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    return left - 5, y - 10, left + width + 5, y + 2


def _distance(box: Box, others: Sequence[Box]) -> float:
    """Pixels from a box to the nearest of the others."""
    gaps = (math.hypot(max(0.0, box[0] - o[2], o[0] - box[2]), max(0.0, box[1] - o[3], o[1] - box[3])) for o in others)
    return min(gaps, default=math.inf)


def _overlap(a: Box, b: Box) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * down if across > 0 and down > 0 else 0.0
