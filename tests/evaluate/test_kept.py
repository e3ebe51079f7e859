"""Kept images are used again exactly where they would be drawn again."""

from __future__ import annotations

import pytest
import torch

from fewstep import runtime
from fewstep.errors import UserError
from fewstep.evaluate.kept import Drawing, KeptImages
from fewstep.evaluate.suite import evaluate

SETTINGS = {"first seed": 0, "images": 4, "batch": 2}


@pytest.fixture
def drawing(teacher_folder):
    return Drawing(runtime.load(teacher_folder), 2)


@pytest.fixture
def kept(tmp_path, drawing):
    folder = KeptImages(tmp_path / "images")
    folder.keep("teacher/2", drawing, SETTINGS, torch.arange(4 * 64.0).view(4, 1, 8, 8), 1.25)
    return folder


def test_kept_images_come_back_bit_for_bit(kept, drawing):
    images, seconds = kept.find("teacher/2", drawing, SETTINGS)
    assert torch.equal(images, torch.arange(4 * 64.0).view(4, 1, 8, 8)) and seconds == 1.25


def test_other_weights_plans_seeds_or_counts_find_nothing(kept, drawing, student_folder):
    assert kept.find("teacher/2", Drawing(drawing.artefact, 4), SETTINGS) is None
    assert kept.find("teacher/2", Drawing(drawing.artefact, 2, 1.5), SETTINGS) is None
    assert kept.find("teacher/2", Drawing(runtime.load(student_folder), 2), SETTINGS) is None
    assert kept.find("teacher/4", drawing, SETTINGS) is None
    for changed in ({"first seed": 1}, {"images": 5}, {"batch": 4}):
        assert kept.find("teacher/2", drawing, {**SETTINGS, **changed}) is None


def test_a_damaged_file_is_drawn_anew(kept, drawing):
    (file,) = kept.folder.iterdir()
    for content in (b"", b"junk", file.read_bytes()[:-200]):
        file.write_bytes(content)
        assert kept.find("teacher/2", drawing, SETTINGS) is None


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep images in .*file"):
        KeptImages(tmp_path / "file" / "images")


def test_a_second_evaluation_draws_nothing_and_scores_the_same(tmp_path, drawing, monkeypatch):
    def scores():
        return evaluate({"teacher/2": drawing}, samples=360, kept=KeptImages(tmp_path), progress=lambda line: None)

    first = scores()
    monkeypatch.setattr(Drawing, "__call__", lambda *_: pytest.fail("drawn again"))
    second = scores()
    assert first["teacher"] == second["teacher"] and first["samples"] == second["samples"]
