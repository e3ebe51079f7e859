import contextlib
import copy
import json
import math
import random
import re

import pytest

from fewstep.errors import UserError
from fewstep.evaluate import samplers
from fewstep.evaluate.report import write_report
from fewstep.evaluate.results import read_results


def metrics(frechet, **more):
    """Numbers for a test of the page alone; no sampler has scored them."""
    return {
        "count": 10000,
        "guidance": 1.0,
        "frechet": frechet,
        "precision": 0.811,
        "recall": 0.722,
        "diversity": 0.933,
        "accuracy": 0.944,
        "seconds": 1.0,
        "fidelity": {"rmse": 0.155, "psnr": 22.2, "class_agreement": 0.966, "count": 10000},
        "copying": {
            "copied": 0.012,
            "threshold": 0.5,
            "median_ratio": 0.877,
            "real_median_ratio": 0.888,
            "passes": True,
        },
        **more,
    }


RESULTS = {
    "format": 1,
    "machine": {"processor": "Testing <Processor>", "cores": 2, "memory_gib": 4.0},
    "versions": {"torch": "9.9.9"},
    "data": {"name": "test digits", "train": 1437, "held_out": 360, "split_seed": 1},
    "measured": {
        "samples": 10000,
        "seed": 0,
        "labels": "i mod 10",
        "features": "test",
        "classifier_accuracy": 0.98,
        "resamples": 200,
        "confidence": 0.95,
        "neighbours": 3,
        "most_folds": 10,
        "reference": "teacher/64",
    },
    "floor": metrics(2.51),
    "copying_control": {**metrics(0)["copying"], "copied": 1.0, "passes": False},
    "teacher": {
        "1": {"1": metrics(24.01), "4": metrics(11.02), "32": metrics(3.83)},
        "1.5": {"32": metrics(5.94, guidance=1.5)},
    },
    "students": {
        "dmd2": {"1": metrics(4.15), "4": metrics(3.96)},
        "consistency": {"1": metrics(7.27), "4": metrics(4.38)},
    },
    "comparisons": [
        {
            "name_a": "dmd2/1",
            "name_b": "teacher/32",
            "a": 4.15,
            "b": 3.83,
            "difference": 0.32,
            "ratio": 1.084,
            "difference_interval": [0.21, 0.43],
            "ratio_interval": [1.051, 1.117],
            "confidence": 0.95,
            "bound": 1.5,
            "holds": True,
        }
    ],
    "samples": {"teacher/1": "AAAA", "dmd2/1": "BBBB", "held out": "CCCC"},
    "losses": {
        "teacher": {"student": [[1, 1.0], [2, 0.5]]},
        "dmd2": {"student": [[1, 2.0], [2, 1.5]], "critic": [[1, 0.5], [2, float("nan")]]},
    },
    "export": {"student": "consistency", "steps": 4},
    "latency": {
        "rows": [
            {
                "model": model,
                "evaluations": evaluations,
                "guidance": guidance,
                "runner": "eager",
                "batch": batch,
                "p50_ms": p50,
                "p90_ms": 1.2 * p50,
                "p99_ms": 1.4 * p50,
                "images_per_second": 1000 * batch / p50,
                "speedup_over_eager_teacher": 32.0 / p50,
            }
            for model, evaluations, guidance, p50 in (
                ("teacher", 32, None, 32.0),
                ("teacher", 32, 1.5, 64.0),
                ("student", 1, None, 2.0),
            )
            for batch in (1, 16)
        ],
        "skipped": [{"runner": "onnx", "reason": "it is not installed"}],
        "threads": 2,
    },
}


@pytest.fixture
def page(tmp_path):
    return write_report(RESULTS, tmp_path / "new" / "report.html").read_text()


def test_the_page_reaches_for_nothing_outside_itself(page):
    assert not re.search(
        r"(?:https?:)?//[a-z]|<script|@import|url\(|<link|<iframe", page.replace("<!doctype html>", "")
    )
    assert re.findall(r'src="([^"]{0,22})', page) == ["data:image/png;base64,"] * 3


def test_the_page_holds_all_the_numbers(page):
    for number in (
        "24.01",
        "11.02",
        "3.83",
        "5.94",
        "4.15",
        "7.27",
        "4.38",
        "2.51",
        "0.811",
        "0.722",
        "0.933",
        "0.944",
    ):
        assert f">{number}<" in page
    for words in (
        "0.155",
        "22.2",
        "1.051 to 1.117",
        "+0.21 to +0.43",
        "≤ 1.5",
        "16.0×",
        "76.8",
        "16× faster",
        "10,000",
    ):
        assert words in page
    for words in ("Testing &lt;Processor&gt;", "9.9.9", "it is not installed", "i mod 10", "1437 to train on", "fails"):
        assert words in page


def test_the_headline_compares_one_evaluation_with_the_teachers_32(page):
    headline = re.search("<h1>(.*?)</h1>", page)[1]
    assert headline == (
        "With one network evaluation the DMD2 student scores a Fréchet distance of 4.15; "
        "its teacher at 32 evaluations is at 3.83."
    )


def section(page, title):
    """The page from a heading to the next."""
    begin = page.index(f"<h2>{title}</h2>")
    end = page.find("<h2>", begin + 4)
    return page[begin : end if end > 0 else None]


def test_curves_run_down_where_numbers_fall_and_the_floor_is_the_lowest_line(page):
    curve = section(page, "Quality against evaluations")
    points = [float(pair.split(",")[1]) for pair in re.search('points="([^"]+)"', curve)[1].split()]
    assert points == sorted(points) and len(points) == 3
    floor = float(re.search(r'class="floor"[^>]* y1="([\d.]+)"', curve)[1])
    assert floor > max(points)  # SVG's y grows downward


def test_quality_and_speed_are_held_against_the_same_teacher(page):
    tiles = re.findall('<div class="tile"><b>(.*?)</b><span class="soft">(.*?)</span>', page)
    assert tiles[1] == ("1.08×", "the distance of the teacher at 32 evaluations (3.83)")
    assert tiles[2] == (
        "16× faster",
        "consistency student at 1 evaluation than the teacher at 32 evaluations; PyTorch eager, batch 1, same run",
    )
    assert "Speed-up: over the teacher at 32 evaluations in PyTorch eager" in page


def test_there_is_no_speed_against_another_teacher(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["latency"]["rows"] = [
        row for row in results["latency"]["rows"] if row["guidance"] or row["evaluations"] == 1
    ]
    assert "× faster" not in write_report(results, tmp_path / "report.html").read_text()


def test_few_images_are_a_caution_and_no_bound_no_column(page, tmp_path):
    results = copy.deepcopy(RESULTS)
    results["measured"]["samples"] = 500
    results["comparisons"][0]["bound"] = None
    few = write_report(results, tmp_path / "report.html").read_text()
    assert "mostly bias" in few and "<th>bound</th>" not in few
    assert "mostly bias" not in page and "<th>bound</th>" in page


def test_bars_and_rows_say_which_student_was_measured(page):
    latency = section(page, "Latency")
    assert latency.count(">consistency at 1 evaluation<") == 4  # two batches, drawn wide and narrow
    assert latency.count("</i>consistency</span>") == 2 and "student at" not in latency


def test_a_sampler_has_one_colour_on_the_whole_page(page):
    colours = samplers.colours(RESULTS)
    assert len(set(colours.values())) == len(colours) == 4
    curve, latency, losses = (
        section(page, title) for title in ("Quality against evaluations", "Latency", "Training losses")
    )
    for name, colour in colours.items():
        assert f'style="fill:{colour}">{name}</text>' in curve
    assert f'fill="{colours["consistency"]}"><title>p50 2 ms' in latency
    assert f'stroke="{colours["DMD2"]}"' in losses and f'style="background:{colours["teacher"]}"' in losses
    for name in colours:
        assert f'<i style="background:{colours[name]}"></i>{name}</span>' in section(page, "All numbers")


def test_the_loss_of_a_teacher_is_the_teachers(page):
    losses = section(page, "Training losses")
    teacher, dmd2 = losses[: losses.index("DMD2")], losses[losses.index("DMD2") :]
    assert "Teacher</span></h3>" in teacher and "tudent" not in teacher
    assert ">critic</text>" in dmd2 and ">DMD2 student</text>" in dmd2


def test_prose_holds_no_identifiers(page):
    shown = re.sub("<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    assert not re.findall(r"\w+_\w+|\w+@\d|[a-z]\w*/\d+", shown)
    assert "against the teacher at 64 evaluations" in shown


def test_a_table_wider_than_the_page_says_so(page):
    assert page.count('<div class="scroll" tabindex="0"') == page.count("Swipe sideways: ") == 4


@pytest.mark.parametrize("missing", [*RESULTS, "all"])
def test_a_page_is_drawn_whatever_is_missing(tmp_path, missing):
    results = (
        {} if missing == "all" else {key: value for key, value in copy.deepcopy(RESULTS).items() if key != missing}
    )
    assert "</html>" in write_report(results, tmp_path / "report.html").read_text()


def changed(results, rng):
    """The results with one value, anywhere, replaced or left out."""
    place = results = copy.deepcopy(results)
    while True:
        key = rng.choice([*place] if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        place[key] = rng.choice([None, "x", -1, 0, 1e300, True, [], {}, [1], {"a": 1}, math.nan, math.inf])
        if rng.random() < 0.2:
            del place[key]
        return results


def test_what_the_reader_lets_through_can_be_drawn(tmp_path):
    """A changed file is refused by its reader or drawn: there is nothing between."""
    rng, file, drawn = random.Random(0), tmp_path / "results.json", 0
    for _ in range(100):
        file.write_text(json.dumps(changed(RESULTS, rng)))
        with contextlib.suppress(UserError):
            results = read_results(file)
            assert "</html>" in write_report(results, tmp_path / "report.html").read_text()
            drawn += 1
    assert 15 < drawn < 85


def test_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(RESULTS, tmp_path / "file" / "report.html")
