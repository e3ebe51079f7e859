"""What the demo keeps when it is resumed: this run's artefacts and no others."""

import os
import signal
import threading

import pytest

from fewstep import artefact, config, demo, solvers
from fewstep.train import checkpoint
from fewstep.train.checkpoint import Checkpoint
from tests.train import small

RECIPES = {"teacher": "digits_teacher.yaml", **demo.STUDENTS}


def finish(out, seed, names=tuple(RECIPES)):
    """Artefacts as the demo's jobs leave them (their networks are small and untrained), and a checkpoint of each."""
    made = small.teacher()
    plans = {1: solvers.plan("euler", made.schedule, 1, prediction=made.prediction)}
    for name in names:
        overrides = [f"seed={seed}", f"output={out / name}"]
        if name == "teacher":
            ranks = min(2, os.cpu_count() or 1)
            overrides += [f"train.ranks={ranks}", "train.strategy=ddp"] if ranks > 1 else []
            provenance = {}
        else:
            overrides.append(f"teacher={out / 'teacher'}")
            provenance = {"teacher": {"path": "", "sha256": artefact.load(out / "teacher").digest}}
        provenance["recipe"] = config.load(demo.recipe_path(RECIPES[name]), overrides).to_dict()
        about = {"image_shape": (1, 8, 8), "classes": 10, "provenance": provenance}
        artefact.save(out / name, denoiser=made, plans=plans, **about)
        checkpoint.write(out / name / "checkpoints", 9, Checkpoint({}, {}), keep=2)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Names of the jobs that the demo would start."""

    def start(seed=0, resume=True):
        jobs = []
        monkeypatch.setattr(demo, "side_by_side", lambda given, **options: jobs.extend(given))
        demo.train_digits(tmp_path, seed, resume)
        return jobs

    return start


def test_finished_artefacts_are_kept_wherever_their_folder_is_now(tmp_path, run):
    finish(tmp_path / "elsewhere", 0)
    for folder in (tmp_path / "elsewhere").iterdir():
        folder.rename(tmp_path / folder.name)
    assert run() == []


def test_artefacts_of_another_seed_are_not_kept(tmp_path, run):
    finish(tmp_path, 0)
    assert run(seed=1) == ["teacher", "consistency", "dmd2"]


def test_students_of_another_teacher_are_not_kept(tmp_path, run):
    finish(tmp_path, 0)
    finish(tmp_path, 1, ["teacher"])
    assert run(seed=1) == ["consistency", "dmd2"]


def test_a_damaged_artefact_is_made_again(tmp_path, run):
    finish(tmp_path, 0)
    (tmp_path / "dmd2/weights.safetensors").write_bytes(b"")
    assert run() == ["dmd2"]


def test_a_run_that_began_anew_keeps_nothing_of_the_one_before_it(tmp_path, run):
    """Interrupted before its students, it would otherwise be resumed with theirs."""
    finish(tmp_path, 0)
    run(resume=False)
    assert run(resume=True) == ["teacher", "consistency", "dmd2"]
    for name in RECIPES:
        assert not (tmp_path / name / "checkpoints").exists()
        assert (tmp_path / name / "checkpoints.previous/step_000009").is_dir()


STUBBORN = """
import signal, sys, time
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
print("ready", flush=True)
while len(heard) < 2:
    time.sleep(0.05)
open(sys.argv[-1], "w").close()
sys.exit(130)
"""


def test_a_second_interruption_is_handed_on_and_no_job_outlives_the_demo(tmp_path, monkeypatch):
    (tmp_path / "fewstep.py").write_text(STUBBORN)
    monkeypatch.chdir(tmp_path)  # where python -m finds the job first
    before = signal.getsignal(signal.SIGINT)
    real, told = demo._show, []

    def show(latest, last=False):
        real(latest, last)
        if len(told) < 2 and (told or latest.get("job") == "ready"):
            told.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(demo, "_show", show)
    with pytest.raises(KeyboardInterrupt):
        demo.side_by_side({"job": [str(tmp_path / "ended")]})
    assert (tmp_path / "ended").exists()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_stopped_stops_its_jobs(number):
    before = signal.getsignal(number)
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    with pytest.raises(KeyboardInterrupt):
        demo.side_by_side({"job": ["doctor"]})
        pytest.fail("the job was over before the signal came")
    assert signal.getsignal(number) == before


SLOW = """
import sys, time
print("ready", flush=True)
time.sleep(20)
open(sys.argv[-1], "w").close()
"""


def test_a_demo_in_a_scripts_background_stops_its_jobs_too(tmp_path, monkeypatch):
    """There Ctrl-C is ignored, by the demo and by all that it starts."""
    (tmp_path / "fewstep.py").write_text(SLOW)
    monkeypatch.chdir(tmp_path)  # where python -m finds the job first
    monkeypatch.setattr(
        demo, "_show", lambda latest, last=False: latest and not last and os.kill(os.getpid(), signal.SIGTERM)
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.side_by_side({"job": [str(tmp_path / "ended")]})
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "ended").exists()
