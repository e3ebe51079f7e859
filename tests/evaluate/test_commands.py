"""`fewstep evaluate`, `bench` and `report`, as a person meets them."""

from __future__ import annotations

import json
import shutil

import pytest

from fewstep.cli import main
from fewstep.evaluate import suite
from fewstep.runtime import bench


def refused(capsys, *arguments: object) -> str:
    """The one sentence with which a command ends in code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("fewstep: ") and said.endswith(".") and "\n" not in said and "Traceback" not in said
    return said


@pytest.fixture
def unworkable(monkeypatch) -> None:
    """Any work that is begun fails the test."""

    def begin(*arguments: object, **options: object) -> None:
        raise AssertionError("work was begun before the output was checked")

    monkeypatch.setattr(suite, "evaluate_artefacts", begin)
    monkeypatch.setattr(bench, "bench_artefacts", begin)


@pytest.mark.parametrize("command", ["evaluate", "bench"])
def test_an_output_that_cannot_be_written_is_named_before_any_work(capsys, tmp_path, unworkable, command):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out.json", tmp_path):
        assert str(place) in refused(capsys, command, "--out", place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_evaluate_without_arguments_scores_what_the_demo_made(
    capsys, tmp_path, monkeypatch, teacher_folder, student_folder
):
    monkeypatch.chdir(tmp_path)
    assert "runs/demo/teacher" in refused(capsys, "evaluate")
    for name, folder in (("teacher", teacher_folder), ("consistency", student_folder), ("dmd2", student_folder)):
        shutil.copytree(folder, tmp_path / "runs" / "demo" / name)
    asked: dict[str, object] = {}
    monkeypatch.setattr(suite, "evaluate_artefacts", lambda **options: asked.update(options) or {"format": 1})
    assert main(["evaluate"]) == 0
    assert asked["teacher"] == "runs/demo/teacher"
    assert asked["students"] == {"consistency": "runs/demo/consistency", "dmd2": "runs/demo/dmd2"}
    assert json.loads((tmp_path / "runs" / "evaluation.json").read_text()) == {"format": 1}
    assert main(["evaluate", "--teacher", "elsewhere"]) == 0
    assert (asked["teacher"], asked["students"]) == ("elsewhere", {})


@pytest.mark.parametrize("students", [["a=one", "a=two"], ["one/a", "two/a"], ["=one"], ["teacher=one"]])
def test_a_student_has_a_name_of_its_own(capsys, tmp_path, unworkable, students):
    words = [word for student in students for word in ("--student", student)]
    assert "NAME=FOLDER" in refused(capsys, "evaluate", *words, "--out", tmp_path / "out.json")


def test_a_file_without_results_is_refused_and_nothing_is_written(capsys, tmp_path):
    some = tmp_path / "some.json"
    some.write_text('{"rows": []}')
    said = refused(capsys, "report", some)
    assert str(some) in said and "`format` is missing" in said and "fewstep evaluate" in said
    assert "is a folder" in refused(capsys, "report", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]


def test_the_page_does_not_take_the_place_of_its_results(capsys, tmp_path):
    results = tmp_path / "results.json"
    metrics = dict.fromkeys(("frechet", "precision", "recall", "diversity", "accuracy"), 0.5) | {"count": 1}
    results.write_text(json.dumps({"format": 1, "students": {"dmd2": {"1": metrics}}}))
    assert "results file itself" in refused(capsys, "report", results, "--out", results)
    assert main(["report", str(results)]) == 0
    assert "DMD2" in (tmp_path / "report.html").read_text()
