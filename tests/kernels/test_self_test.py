"""The self-test finds what is broken, says it in one sentence, and leaves the choice of backends as it was."""

import importlib

import pytest

import fewstep_kernels as fk
from fewstep.cli import main
from fewstep_kernels import backends, native
from fewstep_kernels.self_test import ALLOWED, CHECKS

needs_cpu = pytest.mark.skipif(fk.backend("gram", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")


def test_every_operator_is_right_on_every_backend_here():
    before = fk.report()
    checks = fk.self_test()
    assert [check.problem for check in checks if check.problem] == []
    # float32 against float64: never exactly equal
    assert all(0 < check.error < ALLOWED for check in checks)
    found = {(check.operator, check.backend) for check in checks}
    assert {operator for operator, _ in found} == set(backends.OPERATORS) == set(CHECKS)
    here = [name for name in ("cpu", "triton", "cuda") if backends.runs_on(name, "cpu")]
    assert found >= {(name, which) for name in CHECKS for which in here if which in backends.OPERATORS[name]}
    assert fk.report() == before


@needs_cpu
def test_a_kernel_that_is_slightly_wrong_is_found(monkeypatch):
    module = importlib.import_module("fewstep_kernels.inner_products")
    honest = module._call_c

    def wrong(left, right, table, results):
        honest(left, right, table, results)
        results[0].mul_(1.0001)

    monkeypatch.setattr(module, "_call_c", wrong)
    problems = {check.operator: check.problem for check in fk.self_test() if check.problem}
    assert set(problems) == {"gram", "inner_products"}
    words = "gram by cpu on cpu errs by 1.0e-04 of the largest value, 1e-05 is allowed: install fewstep again"
    assert problems["gram"].startswith(words)


@needs_cpu
def test_doctor_ends_with_one_sentence_and_code_1_when_a_check_fails(monkeypatch, capsys):
    def broken(name, *arguments):
        raise RuntimeError(f"fewstep_cpu_{name} failed with code 7.\nand a second line")

    monkeypatch.setattr(native, "call", broken)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "cpu FAILED" in said.out
    assert said.err.count("\n") == 1 and said.err.startswith("fewstep: ")
    assert "by cpu on cpu raised RuntimeError: fewstep_cpu_" in said.err and "second line" not in said.err
    assert main(["doctor", "--no-self-test"]) == 0


def test_doctor_shows_an_error_for_every_operator_unless_told_not_to(capsys):
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out.partition("self-test in")[2]
    assert all(f"\n  {name} " in page for name in CHECKS)
    assert main(["doctor", "--no-self-test"]) == 0
    assert "self-test" not in capsys.readouterr().out


def test_asking_for_a_backend_ends_with_its_block():
    before = fk.backend("gram", "cpu")
    with backends.asking("reference"):
        assert fk.backend("gram", "cpu") == "reference"
        with pytest.raises(ZeroDivisionError), backends.asking("cpu"):
            _ = 1 / 0
        assert fk.backend("gram", "cpu") == "reference"
    assert fk.backend("gram", "cpu") == before
