"""The benchmark times only runners that draw the right pictures."""

from __future__ import annotations

import shutil

import pytest
import torch

from fewstep.errors import UserError
from fewstep.runtime import bench, load


@pytest.fixture(scope="module")
def results(teacher_folder, student_folder):
    return bench.bench_artefacts(
        teacher_folder, student_folder, 0.02, runners=("eager", "onnx"), batches=(1, 3), student_steps=(1, 2)
    )


def test_every_model_runner_and_batch_has_a_row(results):
    rows = {(row["model"], row["evaluations"], row["runner"], row["batch"]) for row in results["rows"]}
    expected = {("teacher", 32), ("student", 1), ("student", 2)}
    assert rows == {(*who, runner, batch) for who in expected for runner in ("eager", "onnx") for batch in (1, 3)}
    assert results["skipped"] == []


def test_speed_is_against_the_teacher_that_quality_is_compared_with(results, teacher_folder, student_folder):
    """The student has no guidance inside, so its rival is the unguided teacher, timed in eager PyTorch."""
    teachers = [(row["guidance"], row["runner"]) for row in results["rows"] if row["model"] == "teacher"]
    assert set(teachers) == {(None, "eager"), (1.5, "eager"), (1.5, "onnx")}
    for row in results["rows"]:
        rival = next(
            each
            for each in results["rows"]
            if (each["model"], each["guidance"], each["batch"]) == ("teacher", None, row["batch"])
        )
        assert row["speedup_over_eager_teacher"] == pytest.approx(rival["p50_ms"] / row["p50_ms"])


def test_percentiles_rise_and_throughput_counts_images(results):
    for row in results["rows"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["calls"] >= results["rounds"]
        assert row["images_per_second"] <= row["batch"] * 1e3 / row["p50_ms"] * 2
        assert row["max_abs_error"] <= bench.TOLERANCE


def test_one_evaluation_is_faster_than_32_guided_ones(results):
    fast = next(r for r in results["rows"] if (r["model"], r["evaluations"], r["runner"]) == ("student", 1, "eager"))
    assert fast["speedup_over_eager_teacher"] > 4


def test_the_table_names_every_row_and_how_it_was_measured(results):
    text = bench.table(results)
    assert len(text.splitlines()) == len(results["rows"]) + 2
    assert "2 warm-up calls" in text and "interleaved" in text
    assert "speed-up over the teacher, unguided, eager, at the same batch." in text


def test_percentiles_of_known_times():
    times = [float(value) for value in range(1, 101)]
    assert [bench._percentile(times, share) for share in (0.5, 0.9, 0.99)] == [50.0, 90.0, 99.0]
    assert bench._percentile([2.0], 0.99) == 2.0


def test_a_runner_with_other_pictures_is_not_timed(student_folder, monkeypatch):
    def wrong(sampler, plan, folder):
        right = bench._eager(sampler, plan, folder)
        return lambda noise, condition: right(noise, condition) + 0.01

    monkeypatch.setitem(bench._RUNNERS, "onnx", wrong)
    with pytest.raises(UserError, match="onnx at batch 1 differs from eager PyTorch"):
        bench.bench_artefacts(None, student_folder, 0.01, runners=("eager", "onnx"), batches=(1,), student_steps=(1,))


def test_a_runner_that_cannot_run_is_reported_and_the_rest_go_on(student_folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    results = bench.bench_artefacts(
        None, student_folder, 0.01, runners=("eager", "compile"), batches=(1,), student_steps=(1,)
    )
    assert [row["runner"] for row in results["rows"]] == ["eager"]
    assert "C++ compiler" in results["skipped"][0]["reason"]
    assert "skipped compile" in bench.table(results)


def test_a_graph_exported_into_the_artefact_is_used_again(student_folder, graph, tmp_path):
    folder = shutil.copytree(student_folder, tmp_path / "copy")
    assert bench._exported(load(folder), load(folder).plan(4)) is None
    shutil.copy(graph, folder / "student_4.onnx")
    (folder / "broken.onnx").write_text("")
    assert bench._exported(load(folder), load(folder).plan(4)) is not None
    assert bench._exported(load(folder), load(folder).plan(2)) is None


def test_the_teachers_plan_has_as_many_calls_as_allowed(teacher_folder):
    teacher = load(teacher_folder)
    assert bench.teacher_plan(teacher, 1.5).evaluations == 32
    assert bench.teacher_plan(teacher, 1.5).guidance == 1.5


def test_a_wrong_request_is_one_sentence(student_folder):
    with pytest.raises(UserError, match="did you mean 'compile'"):
        bench.bench_artefacts(None, student_folder, runners=("compiled",))
    with pytest.raises(UserError, match="above 0"):
        bench.bench_artefacts(None, student_folder, 0.0)


@pytest.mark.slow
def test_the_compiled_runner_draws_eagers_pictures(student_folder):
    results = bench.bench_artefacts(
        None, student_folder, 0.05, runners=("eager", "compile"), batches=(4,), student_steps=(2,)
    )
    assert [row["runner"] for row in results["rows"]] == ["eager", "compile"]
    torch._dynamo.reset()
