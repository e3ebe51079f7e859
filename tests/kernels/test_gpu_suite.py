"""The script for the day there is a GPU, tried on the CPU: small tensors, every stage, numbers that mean nothing."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.ahead_of_time import ROOT

SUITE = ROOT / "benchmarks" / "gpu_suite.sh"


def suite(*arguments, **environment):
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | environment
    return subprocess.run([SUITE, *arguments], capture_output=True, text=True, env=given, cwd=ROOT)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("stage", "said"), (("sync", "no wait"), ("graph", "replays equal eager calls")))
def test_no_program_waits_and_every_replay_is_right(stage, said):
    done = suite("--dry-run", stage)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [
        line for line in done.stdout.splitlines() if line.startswith(("sampler", "maps", "attention", "optimiser"))
    ]
    assert len(lines) >= 8 and all(line.endswith(said) for line in lines), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_benchmark_writes_its_record(tmp_path):
    done = suite("--dry-run", "bench", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("kernels_*_gpu.json")]
    assert len(records) == 9
    for record in records:
        assert record["device"] == "cpu" and "accelerator" in record["machine"] and record["date"]
        assert all(case["results"] and case["working_set_bytes"] for case in record["cases"])


def test_an_unknown_stage_is_refused_and_help_lists_them():
    refused = suite("measure")
    assert refused.returncode == 2
    assert "unknown stage 'measure'; choose build, test, sync, graph, bench or all." in refused.stderr
    assert "gpu_suite.sh bench [operator ...]" in suite("help").stdout
