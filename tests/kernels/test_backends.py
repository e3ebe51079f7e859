"""Which backend serves what, and what the libraries export."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import fewstep_kernels as fk
from fewstep_kernels import backends, native

HEADER = Path(__file__).parents[2] / "csrc" / "include" / "fewstep_kernels.h"


CACHES = (native.cpu, native.cuda, backends.override, backends._missing, backends.choose)


@pytest.fixture
def fresh(monkeypatch):
    """Backends chosen anew inside the test, and again after it."""
    for cache in CACHES:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in CACHES:
        cache.cache_clear()


def test_report_names_a_backend_and_a_reason_for_every_operator():
    lines = fk.report()
    assert {line["operator"] for line in lines} == set(backends.OPERATORS)
    assert all(line["backend"] in ("reference", "cpu", "triton", "cuda") and line["why"] for line in lines)


def test_unknown_operators_are_refused():
    with pytest.raises(ValueError, match="choose one of lincomb"):
        fk.backend("linkomb", "cpu")


def test_an_unknown_override_is_refused_in_one_sentence(fresh):
    fresh.setenv("FEWSTEP_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'; it must be one of reference, cpu, triton, cuda, or unset"):
        fk.backend("lincomb", "cpu")


def test_the_reference_can_be_asked_for_and_differentiates(fresh):
    fresh.setenv("FEWSTEP_KERNELS", "reference")
    assert {line["backend"] for line in fk.report()} == {"reference"}
    x = torch.ones(2, 3, requires_grad=True)
    fk.lincomb([x], torch.full((1, 1), 2.0))[0].sum().backward()
    assert (x.grad == 2).all()
    average = torch.zeros(3)
    fk.ema_update([average], [torch.ones(3)], 0.5)
    assert (average == 0.5).all()
    assert torch.isfinite(fk.normal(torch.arange(2), (3,))).all()


def test_a_missing_library_leaves_the_reference_and_says_why(fresh, tmp_path):
    fresh.setattr(native, "__file__", str(tmp_path / "native.py"))
    line = next(line for line in fk.report() if line["operator"] == "lincomb")
    assert line["backend"] == "reference"
    assert "install g++ and run pip install again" in line["why"]
    assert (fk.lincomb([torch.ones(2, 3)], torch.ones(1, 1))[0] == 1).all()


def test_asking_for_a_missing_backend_is_refused_and_reported(fresh, tmp_path):
    fresh.setattr(native, "__file__", str(tmp_path / "native.py"))
    fresh.setenv("FEWSTEP_KERNELS", "cpu")
    with pytest.raises(RuntimeError, match=r"FEWSTEP_KERNELS=cpu cannot be met: libfewstep_cpu\.so was not built"):
        fk.lincomb([torch.ones(2, 3)], torch.ones(1, 1))
    assert {line["backend"] for line in fk.report()} == {"none"}


def test_a_library_of_another_version_is_not_called(fresh):
    fresh.setattr(native, "ABI", -1)
    assert fk.backend("lincomb", "cpu") == "reference"
    assert "another version" in fk.report()[0]["why"]


@pytest.mark.parametrize("kind", ("cpu", "cuda"))
def test_the_header_lists_every_exported_function(kind):
    path = Path(native.__file__).parent / "_lib" / f"libfewstep_{kind}.so"
    if not path.is_file():
        pytest.skip(f"{path.name} was not built")
    declared = set(re.findall(rf"\b(fewstep_{kind}_\w+)\(", HEADER.read_text()))
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in listing.splitlines() if " T " in line}
    assert {name for name in exported if name.startswith("fewstep")} == declared


def test_the_cuda_library_loads_and_checks_its_arguments_without_a_gpu():
    library = native.cuda()
    if library.missing:
        pytest.skip(library.missing)
    table = native.table([0] * 17)

    def lincomb(inputs, outputs, batch, count):
        return library.functions["lincomb"](native.table([inputs, outputs, batch, count, *[0] * 13]), None)

    assert lincomb(99, 1, 1, 1) == 1
    assert lincomb(1, 1, 0, 1) == 0
    assert lincomb(0, 1, 1, 1) == 1
    outputs_that_are_one = native.table([1, 2, 1, 4, 0, 0, 0, 0, 0, 0, 0, *(64, 4, 0), *(128, 4, 0), *(128, 4, 0)])
    assert library.functions["lincomb"](outputs_that_are_one, None) == 2
    assert library.functions["normal"](None, 1, 5, -1, None, 0, None) == 1
    assert library.functions["ema_update"](0, 1, table, None, None, None, None) == 0
    assert library.functions["ema_update"](1, 0, table, None, None, None, None) == 1
    assert library.functions["adamw_ema_step"](0, 5, table, None, None, None, None) == 1
    assert library.functions["multi_tensor_l2norm"](0, table, None, None, 1, None) == 1
