"""Draw README's picture from a demo's results: benchmarks/picture.py [runs/demo/results.json] -> docs/digits.png."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image

PANELS = [
    ("teacher/1", "teacher, 1 call"),
    ("teacher/32", "teacher, 32 calls"),
    ("consistency/1", "consistency student, 1 call"),
    ("dmd2/1", "DMD2 student, 1 call"),
]


def main() -> None:
    results = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/results.json")
    samples = json.loads(results.read_text(encoding="utf-8"))["samples"]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 1.75), dpi=110)
    for axis, (key, title) in zip(axes, PANELS, strict=True):
        axis.imshow(Image.open(io.BytesIO(base64.b64decode(samples[key]))), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).parents[1] / "docs" / "digits.png")


if __name__ == "__main__":
    main()
