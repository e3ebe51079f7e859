"""The benchmark of time grids runs, and compares like with like."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "digits_grids.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("digits_grids", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_grid_is_measured_under_every_solver_against_karras(script, teacher_folder, tmp_path):
    record = script.measured(teacher_folder, tmp_path, 80, 0, (3,), quick=True)
    assert set(record["solvers"]) == set(script.SOLVERS)
    for solver, grids in record["solvers"].items():
        assert set(grids) == {*script.FIXED, *script.SEARCHED} | ({"ddss"} if solver in script.DESCENDED else set())
        assert grids["karras"]["3"]["to_karras"] == 1.0
        for grid in grids.values():
            row = grid["3"]
            assert len(row["times"]) == 4 and row["times"][-1] == 0.0
            assert row["to_karras"] == pytest.approx(row["frechet"] / grids["karras"]["3"]["frechet"])
            low, high = row["interval"]
            assert low <= row["to_karras"] <= high
    assert record["solvers"]["euler"]["gits"]["3"]["times"] == record["solvers"]["ddpm"]["gits"]["3"]["times"]
    assert record["solvers"]["euler"]["ddss"]["3"]["times"] != record["solvers"]["dpmpp_2m"]["ddss"]["3"]["times"]
    for curve in record["dpm_solver_v3"].values():
        assert len(curve["3"]["times"]) == 4 and curve["3"]["frechet"] > 0.0
    picture = script.plotted(record)
    assert (
        picture.count("<polyline")
        == len(script.SOLVERS) * (len(script.FIXED) + len(script.SEARCHED)) + len(script.DESCENDED) + 3
    )
