"""Pages of the command line fit the terminal they are printed on."""

from __future__ import annotations

import pytest

from fewstep import columns, doctor
from fewstep.cli import main
from fewstep_kernels.self_test import Check


def test_columns_are_as_wide_as_their_longest_word():
    rows = [("a", "cpu", "one"), ("a_long_name", "reference", "two")]
    assert columns.aligned(rows, most=60) == ["  a            cpu        one", "  a_long_name  reference  two"]


def test_the_last_column_is_wrapped_below_its_own_beginning():
    lines = columns.aligned([("name", "word " * 20)], most=40)
    assert len(lines) > 2 and all(len(line) <= 40 for line in lines)
    assert all(line.startswith(" " * 8 + "word") for line in lines[1:])


def test_where_nothing_is_left_for_it_it_goes_below():
    lines = columns.aligned([("a" * 20, "word " * 10)], most=40)
    assert lines[0].strip() == "a" * 20 and all(line.startswith("    word") and len(line) <= 40 for line in lines[1:])


@pytest.mark.parametrize("size", [60, 80, 200])
@pytest.mark.parametrize("command", [["methods"], ["solvers"], ["doctor"]])
def test_no_page_is_wider_than_the_terminal(command, size, capsys, monkeypatch):
    """But for single words, such as a path, that are wider."""
    checks = [Check(f"{name}_operator_of_a_long_name", backend, "cpu", 1e-7, "")
              for name in ("one", "another") for backend in ("reference", "cpu", "triton", "cuda")]  # fmt: skip
    monkeypatch.setattr(doctor.fewstep_kernels, "self_test", lambda: checks)
    monkeypatch.setenv("COLUMNS", str(size))
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    wide = [line for line in lines if len(line) > size and len(max(line.split(), key=len)) < size // 2]
    assert len(lines) > 5 and not wide
