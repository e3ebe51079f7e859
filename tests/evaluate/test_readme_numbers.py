"""README's numbers are those of the committed run."""

from __future__ import annotations

import base64
import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "benchmarks" / "demo.py"))


@pytest.fixture(scope="module")
def found(script):
    return json.loads(script["RECORD"].read_text(encoding="utf-8"))


def test_the_table_is_the_records(script, found):
    """`python benchmarks/demo.py` mends it."""
    page = script["PAGE"].read_text(encoding="utf-8")
    seeds = json.loads(script["SEEDS"].read_text(encoding="utf-8"))
    assert script["written"](page, found, seeds) == page


def test_every_scored_distance_is_in_the_table(script, found):
    page = script["PAGE"].read_text(encoding="utf-8")
    table = page[page.index("<!-- numbers: demo -->") : page.index("<!-- /numbers -->")]
    groups = [*found["teacher"].values(), *found["students"].values()]
    assert [len(group) for group in groups] == [7, 1, 3, 3]
    for group in groups:
        cells = [f"{metrics['frechet']:.2f}" for metrics in group.values()]
        assert f"| {' | '.join(cells)} |" in table


def test_the_picture_is_the_samples_pixel_for_pixel(script, found):
    pixels = np.random.default_rng(0).integers(0, 256, (35, 89, 4), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    sheet = base64.b64encode(stream.getvalue()).decode()
    drawn = np.asarray(script["picture"]({**found, "samples": dict.fromkeys(script["PANELS"], sheet)}))
    scale, title = script["SCALE"], script["TITLE"]
    assert np.array_equal(drawn[title : title + 35 * scale : scale, : 89 * scale : scale], pixels)
    assert np.array_equal(drawn[-35 * scale :: scale, -89 * scale :: scale], pixels)
