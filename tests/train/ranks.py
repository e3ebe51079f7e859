"""Start two gloo ranks of a script beside this file, and read what each found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fewstep
import fewstep_kernels

ROOT = Path(__file__).resolve().parents[2]


def two_ranks(script: str, folder: Path, *arguments: str) -> list[dict]:
    """[what rank 0 wrote, what rank 1 wrote]; the script writes folder/rank<r>.json."""
    sources = [str(Path(package.__file__).parents[1]) for package in (fewstep, fewstep_kernels)]
    started = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "FEWSTEP_STORE": str(folder / "store"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sources, os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
        }
        log = (folder / f"rank{rank}.log").open("w")
        command = [sys.executable, "-m", f"tests.train.{script}", str(folder), *arguments]
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=150) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-4000:] for rank in range(2))
    assert codes == [0, 0], logs
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
