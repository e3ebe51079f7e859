import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data import digits
from fewstep.errors import UserError
from fewstep.evaluate.suite import Name, evaluate, evaluate_artefacts, sheet


def perturbed(amount):
    """A stand-in sampler: a training digit of the wanted class with `amount` of the given noise."""
    images, labels = digits("train")
    rows = [images[labels == label] for label in range(10)]

    def draw(noise, labels, seeds):
        picked = torch.stack(
            [rows[label][seed % len(rows[label])] for label, seed in zip(labels.tolist(), seeds.tolist())]
        )
        return picked + amount * noise

    return draw


@pytest.fixture(scope="module")
def results():
    samplers = {
        "teacher/1": perturbed(0.9),
        "teacher/32": perturbed(0.2),
        "blur/1": perturbed(0.4),
        "blur/2": perturbed(0.0),
    }
    comparisons = [("blur/1", "teacher/32", 1.5), ("blur/1", "teacher/1", None)]
    return evaluate(samplers, samples=1000, reference="teacher/32", comparisons=comparisons, progress=lambda line: None)


def test_more_noise_scores_worse_in_every_measure(results):
    teacher, blur = results["teacher"]["1"], results["students"]["blur"]
    ordered = [blur["2"], teacher["32"], blur["1"], teacher["1"]]
    for measure, sign in (("frechet", 1), ("accuracy", -1)):
        values = [sign * metrics[measure] for metrics in ordered]
        assert values == sorted(values) and values[0] < values[-1]
    assert blur["2"]["accuracy"] > 0.96 and teacher["32"]["fidelity"]["rmse"] == 0
    assert blur["1"]["fidelity"]["rmse"] == pytest.approx(0.2, rel=0.02)  # 64,000 normals: 0.3% at one sigma


def test_the_floor_the_sizes_and_the_seed_are_stated(results):
    assert (
        results["floor"]["count"] == 1437 and 0 < results["floor"]["frechet"] < results["teacher"]["1"]["1"]["frechet"]
    )
    assert results["measured"]["samples"] == 1000 and results["measured"]["seed"] == 0
    assert all(m["count"] == 1000 for m in results["students"]["blur"].values())
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_comparisons_carry_paired_intervals_and_their_bounds(results):
    close, far = results["comparisons"]
    assert close["a"] == results["students"]["blur"]["1"]["frechet"] and close["difference"] == close["a"] - close["b"]
    assert close["ratio_interval"][0] < close["ratio"] < close["ratio_interval"][1]
    assert close["holds"] is (close["ratio"] <= 1.5) and "holds" not in far
    assert far["difference_interval"][1] < 0


def test_a_sampler_that_replays_training_digits_is_caught_and_so_is_the_control(results):
    assert not results["students"]["blur"]["2"]["copying"]["passes"]
    assert not results["copying_control"]["passes"]
    assert results["teacher"]["1"]["1"]["copying"]["passes"]


def test_samplers_get_the_same_noise_labels_and_seeds_whatever_the_batch():
    seen = []

    def watching(noise, labels, seeds):
        seen.append((noise, labels, seeds))
        return perturbed(0.1)(noise, labels, seeds)

    one = evaluate({"a/1": watching}, samples=400, batch=400, seed=7, progress=lambda line: None)
    two = evaluate({"a/1": watching}, samples=400, batch=150, seed=7, progress=lambda line: None)
    for part in range(3):
        assert torch.equal(seen[0][part], torch.cat([call[part] for call in seen[1:]]))
    assert seen[0][2][0] == 7 * 2**32 and seen[0][1][:12].tolist() == [*range(10), 0, 1]
    assert one["students"]["a"]["1"]["frechet"] == pytest.approx(two["students"]["a"]["1"]["frechet"], rel=1e-4)


def test_names_that_say_nothing_and_broken_samplers_are_one_sentence():
    assert Name.parse("teacher@1.5/32") == Name("teacher", 1.5, 32) and str(Name("dmd2", 1.0, 4)) == "dmd2/4"
    for samplers, options, words in [
        ({"teacher": perturbed(0)}, {}, "family"),
        ({"a/1": perturbed(0)}, {"samples": 20}, "at least 360"),
        ({"a/1": perturbed(0)}, {"reference": "b/1"}, "not among those evaluated: a/1"),
        ({"a/1": lambda noise, labels, seeds: noise / 0}, {"samples": 360}, "not finite"),
    ]:
        with pytest.raises(UserError, match=words):
            evaluate(samplers, progress=lambda line: None, **options)


def test_a_sheet_holds_the_images_pixel_for_pixel():
    images = digits("train")[0][:5]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(sheet(images, 3)))))
    assert pixels.shape == (17, 26, 4)
    assert np.abs(pixels[9:17, 0:8, 0] / 127.5 - 1 - images[3, 0].numpy()).max() < 1 / 255
    assert pixels[8].max() == 0 and pixels[9:, 18:].max() == 0


def test_artefacts_are_evaluated_as_they_lie_on_disk(teacher_folder, student_folder):
    said = []
    found = evaluate_artefacts(
        teacher_folder,
        {"mine": student_folder},
        samples=360,
        teacher_evaluations=(1, 32),
        bounds={("mine", 1, 32): 1e-9, ("mine", 4, 32): 1e9},
        progress=said.append,
    )
    assert said[:2] == [
        f"scoring teacher ({teacher_folder}) at 1, 32, and at 32 (guidance 1.5) evaluations, 360 images each",
        f"scoring mine ({student_folder}) at 1, 2, 4 evaluations, 360 images each",
    ]
    assert {scale: list(group) for scale, group in found["teacher"].items()} == {"1": ["1", "32"], "1.5": ["32"]}
    assert list(found["students"]["mine"]) == ["1", "2", "4"] and found["measured"]["reference"] == "teacher/32"
    pairs = [(row["name_a"], row["name_b"]) for row in found["comparisons"]]
    assert pairs == [
        ("mine/1", "teacher/32"),
        ("mine/1", "teacher/1"),
        ("mine/2", "teacher/32"),
        ("mine/4", "teacher/32"),
    ]
    assert [(row.get("bound"), row.get("holds")) for row in found["comparisons"]] == [
        (1e-9, False),
        (None, None),
        (None, None),
        (1e9, True),
    ]
