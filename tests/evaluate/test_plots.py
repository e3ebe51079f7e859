"""The report's plots: axes that can be read, names that cover nothing."""

import itertools
import math
import re

import pytest

from fewstep.evaluate import plots
from fewstep.evaluate.placing import Axis, Room, around, number


@pytest.mark.parametrize(
    "values",
    [(2.5, 57.0), (2.78, 3.44), (0.0012, 0.0033), (1e-5, 3.0), (1.0, 1.02), (7.0, 7.0), (0.9, 1e9)],
    ids=str,
)
def test_a_logarithmic_axis_has_at_least_three_ticks_apart_and_inside(values):
    axis = Axis(values, 300, 14, log=True, pad=0.09)
    places = [axis(tick) for tick in axis.ticks]
    assert 3 <= len(places) <= 14
    assert places == sorted(places, reverse=True) and all(14 <= place <= 300 for place in places)
    assert min(a - b for a, b in itertools.pairwise(places)) > 13  # a line of letters


def test_equal_ratios_are_equal_lengths_on_a_logarithmic_axis():
    axis = Axis((1, 64), 0, 600, log=True)
    assert [axis(2**n) for n in range(7)] == pytest.approx([100 * n for n in range(7)])


@pytest.mark.parametrize("value,words", [(0.5, "0.5"), (2000, "2,000"), (50000, "50,000"), (2e-6, "2e-06"), (0, "0")])
def test_ticks_are_written_as_people_write_numbers(value, words):
    assert number(value) == words


def test_words_move_away_from_what_is_drawn():
    room = Room((0, 0, 300, 200))
    first = room.place("one", around(100, 100))
    room.keep_path_clear([(105, 100), (300, 100)])
    second = room.place("two", around(100, 100))
    assert 'x="111.0" y="104.0" text-anchor="start"' in first  # on the right, where nothing was yet
    assert 'text-anchor="end"' in second  # on the left


def test_words_stay_inside_the_frame():
    room = Room((0, 0, 100, 100))
    assert 'text-anchor="end"' in room.place("a long name", around(95, 50))


def test_words_stand_nearer_to_their_own_curve():
    room = Room((0, 0, 300, 200))
    own = room.keep_path_clear([(0, 100), (100, 100)])
    other = room.keep_path_clear([(0, 111), (300, 111)])
    text = room.place("own", around(100, 100), own=own, others=other)
    assert 'y="89.0" text-anchor="middle"' in text  # above: to the right the other is nearer
    assert 'y="104.0" text-anchor="start"' in Room(room.frame).place("own", around(100, 100), own=own)


def boxes(drawing):
    """Where the coloured names of a plot lie, in letters of 6.9 pixels."""
    found = []
    for x, y, anchor, words in re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" style[^>]*>([^<]+)<', drawing
    ):
        width = 6.9 * len(words)
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        found.append((left, float(y) - 9, left + width, float(y) + 2))
    return found


@pytest.mark.parametrize("shape", [plots.WIDE, plots.NARROW])
def test_names_of_curves_close_together_do_not_overlap(shape):
    series = [
        plots.Series(f"curve {n}", [(2**k, 3 + 0.4 * n + 20 / 2**k) for k in range(7)], f"var(--c{n})")
        for n in range(4)
    ]
    wide, narrow = plots.lines(series, x="x", y="y", log_x=True, log_y=True, floor=(2.5, "floor")).split("</svg>")[:2]
    names = boxes(wide if shape == plots.WIDE else narrow)
    assert len(names) == 4
    for a, b in itertools.combinations(names, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert all(left >= 0 and right <= shape[0] for left, _, right, _ in names)


def test_bars_are_as_long_as_their_numbers():
    rows = [plots.Bar("slow", 80.0, 100.0, "red"), plots.Bar("fast", 20.0, 21.0, "blue")]
    drawing = plots.bars([("runner", rows)], unit="ms")
    slow, fast = (float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawing)[:2])
    assert slow / fast == pytest.approx(4, rel=0.01)  # written with one decimal of a pixel
    assert drawing.count(">20 ms<") == 2  # wide and narrow


@pytest.mark.parametrize("nothing", [[], [plots.Series("none", [(1.0, math.nan), (2.0, -1.0)], "red")]])
def test_a_plot_of_nothing_says_so(nothing):
    assert "No finite value" in plots.lines(nothing, x="x", y="y", log_y=True)
