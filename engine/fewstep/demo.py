"""The whole way on the embedded digits, station by station: what `make demo` runs and what the report shows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.doctor import machine, versions
from fewstep.errors import UserError

STUDENTS = {"consistency": "digits_consistency.yaml", "dmd2": "digits_dmd2.yaml"}
STEPS_OF_THE_SERVED_STUDENT = 4
# (student, its steps, the teacher's evaluations): the largest ratio of Frechet distances these recipes are held to
BOUNDS = {("dmd2", 1, 32): 1.5, ("dmd2", 1, 1): 0.25, ("consistency", 4, 32): 1.3}


class Stations:
    """Announces each station and keeps its seconds."""

    def __init__(self, names: list[str]):
        self.names, self.seconds = names, dict[str, float]()

    @contextmanager
    def station(self, name: str) -> Iterator[None]:
        print(f"\n[{self.names.index(name) + 1}/{len(self.names)}] {name}", flush=True)
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 1)


def recipe_path(name: str) -> Path:
    """A recipe of this repository by file name; UserError when the package was installed without them."""
    path = Path(__file__).resolve().parents[2] / "recipes" / name
    if not path.exists():
        raise UserError(f"{path} is missing: run `fewstep demo` from a clone of the repository (make install).")
    return path


def train_digits(
    out: Path,
    seed: int,
    resume: bool = False,
    stations: Stations | None = None,
    beside: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Path, dict[str, Path]]:
    """Train the teacher, then the students at once, under `out`. Returns artefact folders: teacher, {name: student}.

    resume: keep what is finished by the same recipes, seed and teacher, and go on with the rest; else begin anew.
    beside: further fewstep commands by name, for the cores that the first finished students leave.
    """
    stations = stations or Stations(["teacher", "students"])
    teacher, students = out / "teacher", {name: out / name for name in STUDENTS}
    if not resume:
        for target in (teacher, *students.values()):
            _make_way(target)

    def command(recipe: str, target: Path, *overrides: str) -> list[str]:
        return [str(recipe_path(recipe)), f"seed={seed}", f"output={target}", *overrides]

    def wanted(target: Path, arguments: Sequence[str], taught_by: Path | None = None) -> bool:
        if resume and _is_finished(target, arguments, taught_by):
            print(f"kept {target}")
            return False
        return True

    again = ["--resume"] if resume else []
    with stations.station("teacher"):
        # one process of one thread per core beats the threads of one on a small network: 31 to 24 updates/s
        ranks = min(2, os.cpu_count() or 1)
        halves = [f"train.ranks={ranks}", "train.strategy=ddp"] if ranks > 1 else []
        arguments = command("digits_teacher.yaml", teacher, *halves)
        if wanted(teacher, arguments):
            side_by_side({"teacher": ["train", *arguments, *again]}, processes=ranks)
    with stations.station("students"):
        commands = {name: command(STUDENTS[name], target, f"teacher={teacher}") for name, target in students.items()}
        jobs: dict[str, Sequence[str]] = {
            name: ["distill", *arguments, *again]
            for name, arguments in commands.items()
            if wanted(students[name], arguments, teacher)
        }
        if jobs:
            side_by_side({**jobs, **(beside or {})}, at_once=max(len(jobs), os.cpu_count() or 1))
    return teacher, students


def _make_way(target: Path) -> None:
    """Nothing that an earlier run left in `target` may pass for this one's when this one is resumed."""
    if not target.is_dir():
        return
    from fewstep.train import checkpoint

    (target / "artefact.json").unlink(missing_ok=True)
    if checkpoint.listed(target / "checkpoints"):
        print(f"starting anew: the earlier run's checkpoints are now in {checkpoint.set_aside(target / 'checkpoints')}")


def _is_finished(target: Path, arguments: Sequence[str], teacher: Path | None) -> bool:
    """Whether `target` holds, whole, what this recipe with these overrides makes of the teacher that is there now."""
    if not (target / "artefact.json").exists():
        return False
    from fewstep import artefact, config

    def of_the_run(recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in recipe.items() if key not in ("output", "teacher")}

    try:
        about = artefact.load(target).provenance
        taught_by = None if teacher is None else artefact.load(teacher).digest
    except UserError:
        return False
    recipe = json.loads(json.dumps(config.load(arguments[0], arguments[1:]).to_dict()))
    same = of_the_run(about.get("recipe") or {}) == of_the_run(recipe)
    return same and (about.get("teacher") or {}).get("sha256") == taught_by


def side_by_side(jobs: Mapping[str, Sequence[str]], processes: int | None = None, at_once: int | None = None) -> None:
    """Run fewstep commands at once, sharing the cores, and show how far each is.

    processes: how many they are in all, where one job starts several; the cores are shared among them.
    at_once: how many may run at the same time (default: all); the others wait in order.
    Ctrl-C is handed to all, and each leaves its checkpoint; so is every further one. This returns when all have ended.
    Raises UserError with a job's own sentence where one fails, KeyboardInterrupt after an interruption.
    """
    at_once = at_once or len(jobs)
    threads = max(1, (os.cpu_count() or 1) // max(1, processes or min(at_once, len(jobs))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    latest: dict[str, str] = {}
    waiting = dict(jobs)
    running: dict[str, subprocess.Popen[str]] = {}
    readers: list[threading.Thread] = []

    def read(name: str) -> None:
        for line in running[name].stdout or ():
            if line.strip():
                latest[name] = line.strip()

    def start(name: str) -> None:
        running[name] = subprocess.Popen(
            [sys.executable, "-m", "fewstep", *waiting.pop(name)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # the terminal's Ctrl-C reaches only us, and we hand it on once
        )
        readers.append(threading.Thread(target=read, args=(name,), daemon=True))
        readers[-1].start()

    # a script's background job and all it starts ignore Ctrl-C
    interrupt = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    asked = 0  # how often we were told to stop

    def stop(*_: object) -> None:
        nonlocal asked
        asked += 1

    def hand_on() -> None:
        for process in running.values():
            if process.poll() is None:
                process.send_signal(interrupt)

    before = {}  # a terminated demo, or one whose terminal is closed, stops its jobs too
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    told = 0
    try:
        while (waiting and not asked) or any(process.poll() is None for process in running.values()):
            while told < asked:
                told += 1
                hand_on()
            while waiting and not asked and sum(process.poll() is None for process in running.values()) < at_once:
                start(next(iter(waiting)))
            _show({name: line for name, line in latest.items() if running[name].poll() is None})
            time.sleep(0.2)
    finally:
        hand_on()  # after an error of our own
        for process in running.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        for reader in readers:
            reader.join()
        _show(latest, last=True)
    codes = {name: process.returncode for name, process in running.items()}
    if asked or 130 in codes.values():
        raise KeyboardInterrupt
    for name, code in codes.items():
        if code:
            raise UserError(f"{name} stopped with code {code}: {latest.get(name, 'it said nothing')}")


_shown_at = 0.0
_shown: dict[str, str] = {}


def _show(latest: dict[str, str], last: bool = False) -> None:
    """The newest line of each job: in place on a terminal, every five seconds elsewhere."""
    global _shown_at
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        share = max(20, width // max(1, len(latest)) - 3)
        line = " | ".join(text[:share].ljust(share) for text in latest.values())
        print(f"\r{line[: width - 1]}", end="\n" if last else "", flush=True)
    elif last or time.monotonic() - _shown_at > 5:
        _shown_at = time.monotonic()
        for name, text in latest.items():
            if _shown.get(name) != text:
                _shown[name] = text
                print(text, flush=True)


def loss_curves(runs: dict[str, Path]) -> dict[str, dict[str, list[list[float]]]]:
    """`{run: {network: [[update, loss], ...]}}` from each run's log.jsonl."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for name, folder in runs.items():
        curves[name] = {}
        for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for key, value in row.items():
                if key.startswith("loss/"):
                    curves[name].setdefault(key.removeprefix("loss/"), []).append([row["update"], value])
    return curves


def demo(out: Path, seed: int = 0, resume: bool = False) -> Path:
    """Run every station under `out`; returns the path of report.html. UserError where `out` cannot be written."""
    from fewstep.evaluate.report import write_report
    from fewstep.evaluate.results import write_results
    from fewstep.evaluate.suite import evaluate_artefacts
    from fewstep.export.onnx import export_onnx
    from fewstep.export.parity import check_parity
    from fewstep.export.tensorrt import build_engine
    from fewstep.runtime.bench import bench_artefacts, table

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; choose another folder with --out."
        ) from None
    stations = Stations(["teacher", "students", "evaluate", "export", "bench", "report"])
    images = out / "images"
    scores = ["evaluate", f"--teacher={out / 'teacher'}", f"--images={images}", f"--out={images / 'teacher.json'}"]
    teacher, students = train_digits(out, seed, resume, stations, {"its images": [*scores, f"--seed={seed}"]})
    with stations.station("evaluate"):
        results = evaluate_artefacts(teacher=teacher, students=students, seed=seed, bounds=BOUNDS, images=images)
    with stations.station("export"):
        served = out / "student"
        best = min(
            students,
            key=lambda name: results["students"][name][str(STEPS_OF_THE_SERVED_STUDENT)]["frechet"],
        )
        shutil.rmtree(served, ignore_errors=True)
        served.mkdir()
        for item in ("artefact.json", "weights.safetensors"):
            shutil.copy2(students[best] / item, served / item)
        steps = STEPS_OF_THE_SERVED_STUDENT
        model = export_onnx(served, served / f"student_{steps}.onnx", steps=steps)
        parity = check_parity(model, served, steps=steps)
        engine = build_engine(model, model.with_suffix(".engine"))
        results["export"] = {
            "student": best,
            "steps": steps,
            "onnx": {"file": model.name, "bytes": model.stat().st_size, **parity},
            "tensorrt": {
                "file": engine.path.name,
                "bytes": engine.bytes,
                "backend": engine.backend,
                "build_seconds": engine.seconds,
            },
        }
        print(f"{best} student at {steps} evaluations: ONNX differs from PyTorch by {parity['max_abs_error']:.1e}")
        print(
            f"{engine.path} built by {engine.backend} in {engine.seconds:.1f} s; it has not been run: that needs a GPU"
        )
    with stations.station("bench"):
        results["latency"] = bench_artefacts(teacher=teacher, student=served, seconds=0.25)
        print(table(results["latency"]))
    with stations.station("report"):
        results["losses"] = loss_curves({"teacher": teacher, **students})
        results["machine"], results["versions"] = machine(), versions()
        results["seconds"] = stations.seconds
        write_results(out / "results.json", results)
        report = out / "report.html"
        write_report(results, report)
    print(f"\n{sum(stations.seconds.values()):.0f} s in all. The report: {report.resolve()}")
    print(
        f"Serve the {best} student, the better one at {STEPS_OF_THE_SERVED_STUDENT} evaluations: fewstep serve {served}"
    )
    return report
