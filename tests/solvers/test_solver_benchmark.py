"""benchmarks/solvers.py runs from end to end: values agree with diffusers' before a time is taken, and errors fall."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers==0.42.1")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "solvers.py"


def test_a_dry_run_writes_its_records_and_its_plot(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    cases = json.loads((tmp_path / "solvers_cost.json").read_text())["cases"]
    assert [case["solver"] for case in cases] == ["DDIM", "Euler", "DPM++2M", "UniPC", "LCM"]
    for case in cases:
        ours, theirs = case["counts"]["fewstep"], case["counts"]["diffusers"]
        assert ours["host_reads_per_step"] == 0.0 and ours["operators_per_step"] < 5 < theirs["operators_per_step"]
    mixture = json.loads((tmp_path / "solvers_quality.json").read_text())["mixture"]
    ddim = mixture["curves"]["ddim"]["points"]
    assert ddim["10"]["median"] < ddim["4"]["median"] and mixture["curves"]["sa"]["stochastic"]
    assert ElementTree.parse(tmp_path / "solvers_quality.svg").getroot().tag.endswith("svg")
