"""A results file that is none is refused by one sentence that names what is missing or wrong."""

import json
import os

import pytest

from fewstep.errors import UserError
from fewstep.evaluate.results import check_writable, read_results, write_results

METRICS = {
    "count": 10000,
    "frechet": 2.8,
    "precision": 0.9,
    "recall": 0.9,
    "diversity": 0.9,
    "accuracy": 0.97,
}
ROW = {
    "model": "teacher",
    "evaluations": 32,
    "runner": "eager",
    "batch": 1,
    "p50_ms": 1.0,
    "p90_ms": 1.0,
    "p99_ms": 1.0,
    "images_per_second": 1e3,
}
RESULTS = {
    "format": 1,
    "teacher": {"1": {"32": METRICS}},
    "comparisons": [],
    "losses": {"teacher": {"student": [[20, 0.5]]}},
    "latency": {"rows": [ROW], "skipped": []},
}


def refused(path):
    with pytest.raises(UserError) as refusal:
        read_results(path)
    said = str(refusal.value)
    assert str(path) in said and "\n" not in said and said.endswith("fewstep evaluate`.")
    return said


def test_what_was_written_is_read(tmp_path):
    assert read_results(write_results(tmp_path / "new" / "results.json", RESULTS)) == RESULTS


@pytest.mark.parametrize(
    "content,words",
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b'{"format": 1, "teacher": {"1"', "is not whole JSON (line 1:"),
        (b"\xff\xfe\x00", "is not a text of JSON"),
        (b"[" * 100_000, "is not a text of JSON"),
        (b"[]", "its `format` is missing"),
        (b"3", "its `format` is missing"),
        (b'{"rows": []}', "its `format` is missing"),
        (b'{"format": "fewstep-artefact"}', "its `format` is 'fewstep-artefact'"),
        (b'{"format": true}', "its `format` is True"),
        (b'{"format": 1}', "`teacher` and `students` are missing"),
    ],
)
def test_a_file_that_holds_no_results(tmp_path, content, words):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    assert words in refused(file)


def test_a_missing_file_and_a_folder(tmp_path):
    assert "there is no file" in refused(tmp_path / "none.json")
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize(
    "key,value,words",
    [
        ("teacher", [], "`teacher` and `students` are missing"),
        ("teacher", 3, "`teacher` is 3"),
        ("teacher", {"1": {"32": {}}}, "`teacher.1.32.count` is missing"),
        ("teacher", {"1": {"32": {**METRICS, "frechet": "low"}}}, "`teacher.1.32.frechet` is 'low'"),
        ("teacher", {"1": {"32": {**METRICS, "frechet": float("nan")}}}, "`teacher.1.32.frechet` is nan"),
        ("teacher", {"1": {"many": METRICS}}, "`teacher.1.many` is 'many'"),
        ("teacher", {"strong": {"32": METRICS}}, "`teacher.strong` is 'strong'"),
        ("students", {"dmd2": {"1": {**METRICS, "copying": {"copied": 0.0}}}}, "`students.dmd2.1.copying.threshold`"),
        ("comparisons", [{"name_a": "a/1"}], "`comparisons.0.name_b` is missing"),
        ("losses", {"teacher": {"student": [[1, 2, 3]]}}, "`losses.teacher.student.0` is [1, 2, 3]"),
        ("latency", {"rows": [{"model": "teacher"}]}, "`latency.rows.0.evaluations` is missing"),
        ("samples", {"teacher/1": 5}, "`samples.teacher/1` is 5"),
        ("samples", {"teacher/few": "AAAA"}, "`samples.teacher/few`"),
        ("latency", {"rows": [{**ROW, "p50_ms": 0.0}]}, "`latency.rows.0.p50_ms` is 0.0"),
        ("seconds", {"teacher": "long"}, "`seconds.teacher` is 'long'"),
    ],
)
def test_a_value_that_is_missing_or_of_the_wrong_kind_is_named(tmp_path, key, value, words):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**RESULTS, key: value}))
    assert words in refused(file)


def test_losses_may_be_infinite_where_training_failed(tmp_path):
    results = {**RESULTS, "losses": {"dmd2": {"student": [[1, float("inf")]]}}}
    assert read_results(write_results(tmp_path / "results.json", results)) == results


def test_a_place_is_checked_without_a_trace(tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text("kept")
    assert check_writable(kept).read_text() == "kept"
    assert not check_writable(tmp_path / "new" / "out.json").exists()
    assert check_writable(os.devnull).exists()
    for place, reason in ((kept / "below.json", "on its way is a file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=rf"cannot write .*{place.name}' \(.*{reason}\)"):
            check_writable(place)


def test_writing_leaves_nothing_beside_and_devices_in_place(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_results(tmp_path / "folder", RESULTS)
    write_results(tmp_path / "out.json", RESULTS)
    write_results(tmp_path / "out.json", RESULTS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "out.json"]
    write_results(os.devnull, RESULTS)
    assert not os.path.isfile(os.devnull)
