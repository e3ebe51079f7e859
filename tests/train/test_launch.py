"""`train.strategy` and `train.ranks` in a recipe are all it takes; a launcher's processes are used."""

import fcntl
import importlib.util
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import yaml

import fewstep
import fewstep_kernels
from fewstep import artefact, config
from fewstep.errors import UserError
from fewstep.train import checkpoint, train
from fewstep.train.strategies import start
from fewstep.train.strategies.launch import _wait

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def recipe(folder, **section):
    content = {
        "name": "launched",
        "network": {"name": "mlp", "dim": 64, "width": 16, "classes": 10},
        "schedule": {"name": "edm"},
        "prediction": {"kind": "edm", "sigma_data": 0.5},
        "method": {"name": "denoising"},
        "data": {"batch_size": 16},
        "train": {"device": "cpu", "updates": 4, "checkpoint_every": 2, **section},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def environment(**more):
    sources = [str(Path(package.__file__).parents[1]) for package in (fewstep, fewstep_kernels)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sources), **more}


def command(*arguments):
    return [sys.executable, "-m", "fewstep", "train", *map(str, arguments)]


@pytest.mark.slow
@needs_deepspeed
def test_two_ranks_from_a_recipe_are_interrupted_together_and_resume_to_the_same_numbers(tmp_path):
    path = recipe(tmp_path, strategy="deepspeed", zero_stage=3, ranks=2, updates=100_000, checkpoint_every=5)
    running = subprocess.Popen(command(path), env=environment(), stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "run/checkpoints"
    deadline = time.monotonic() + 60
    while not checkpoint.listed(folder) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, shown = running.communicate(timeout=30)
    assert running.returncode == 130, shown
    assert shown.count("interrupted after update") == 1 and "--resume" in shown and "Traceback" not in shown
    at, problems = checkpoint.newest_good(folder)
    assert not problems
    more = [f"train.updates={at + 2}", "train.strategy=single", "train.ranks=1"]  # a checkpoint knows no strategy
    train(config.load(path, more), resume=True)
    assert artefact.load(tmp_path / "run").provenance["updates"] == at + 2


def test_a_run_whose_terminal_is_closed_leaves_a_checkpoint_and_ends_with_130(tmp_path):
    """The terminal's end hangs up, and so does a shell that ran in it; then whatever is printed fails."""
    own, its = pty.openpty()
    running = subprocess.Popen(
        command(recipe(tmp_path, updates=100_000, log_every=1)),
        env=environment(TERM="xterm"),
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    folder = tmp_path / "run/checkpoints"
    deadline = time.monotonic() + 60
    while not checkpoint.listed(folder) and time.monotonic() < deadline and running.poll() is None:
        if select.select([own], [], [], 0.05)[0]:
            os.read(own, 65536)
    log = tmp_path / "run/log.jsonl"
    os.close(own)
    running.send_signal(signal.SIGHUP)
    assert running.wait(timeout=30) == 130
    at, problems = checkpoint.newest_good(folder)
    assert not problems and at == json.loads(log.read_text().splitlines()[-1])["update"]


@pytest.mark.slow
def test_a_mistake_found_by_two_processes_is_told_once(tmp_path):
    """The first cannot write; the other only sees it go."""
    (tmp_path / "run").write_text("in the way")
    done = subprocess.run(
        command(recipe(tmp_path, strategy="ddp", ranks=2)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "cannot write to the output folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_process_that_failed_is_found(tmp_path):
    """Code 2, a user's mistake, explains the others' ends, whoever is seen first."""
    ends = [subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"]) for code in (3, 2, 0)]
    for end in ends:
        end.wait()
    assert _wait(ends) == (2, 1)


@pytest.mark.slow
def test_torchrun_ranks_train_one_artefact(tmp_path):
    path = recipe(tmp_path, strategy="ddp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fewstep"]
    done = subprocess.run(
        [*torchrun, "train", str(path)], env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    train(config.load(path, ["train.strategy=single", f"output={tmp_path / 'alone'}"]))
    states = [artefact.load(tmp_path / name).denoiser.state_dict() for name in ("run", "alone")]
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-5)  # sums over ranks in another order


@pytest.mark.parametrize(
    ("variables", "section", "part"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, "'single' was launched with 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, {"strategy": "ddp"}, "not divisible by 3 ranks"),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            {"strategy": "ddp", "ranks": 4},
            "train.ranks is 4 but the launcher started 2",
        ),
        ({}, {"device": "cuda"}, "torch sees no CUDA device"),
    ],
)
def test_processes_that_do_not_fit_the_recipe_are_refused(tmp_path, monkeypatch, variables, section, part):
    if "device" in section and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=part):
        start(config.load(recipe(tmp_path, **section)))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("options", ["{zero_optimization: 3}", "{zero_optimization: {reduce_bucket_size: -5}}"])
def test_options_that_deepspeed_refuses_are_one_sentence(tmp_path, options):
    words = [recipe(tmp_path, strategy="deepspeed"), f"train.deepspeed={options}"]
    done = subprocess.run(command(*words), env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("fewstep: DeepSpeed does not take train.deepspeed")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@needs_deepspeed
def test_one_rank_of_deepspeed_needs_no_launcher(tmp_path):
    done = subprocess.run(
        command(recipe(tmp_path, strategy="deepspeed", zero_stage=2)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert artefact.load(tmp_path / "run").kind == "teacher"
