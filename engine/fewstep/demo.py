"""The whole way on the embedded digits, station by station: what `make demo` runs and what the report shows."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep import config
from fewstep.doctor import machine, versions
from fewstep.errors import UserError

STUDENTS = {"consistency": "digits_consistency.yaml", "dmd2": "digits_dmd2.yaml"}
STEPS_OF_THE_SERVED_STUDENT = 4


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
    out: Path, seed: int, resume: bool = False, stations: Stations | None = None
) -> tuple[Path, dict[str, Path]]:
    """Train the teacher and both students under `out`. Returns the artefact folders: teacher, {name: student}."""
    from fewstep.train import train

    stations = stations or Stations(["teacher", *STUDENTS])

    def run(recipe: str, folder: str, *overrides: str) -> Path:
        target = out / folder
        if resume and (target / "artefact.json").exists():
            print(f"kept {target}")
            return target
        return train(config.load(recipe_path(recipe), [f"seed={seed}", f"output={target}", *overrides]), resume=resume)

    with stations.station("teacher"):
        teacher = run("digits_teacher.yaml", "teacher")
    students = {}
    for name, recipe in STUDENTS.items():
        with stations.station(name):
            students[name] = run(recipe, name, f"teacher={teacher}")
    return teacher, students


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
    stations = Stations(["teacher", *STUDENTS, "evaluate", "export", "bench", "report"])
    teacher, students = train_digits(out, seed, resume, stations)
    with stations.station("evaluate"):
        results = evaluate_artefacts(teacher=teacher, students=students, seed=seed)
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
        results["latency"] = bench_artefacts(teacher=teacher, student=served)
        print(table(results["latency"]))
    with stations.station("report"):
        results["losses"] = loss_curves({"teacher": teacher, **students})
        results["machine"], results["versions"] = machine(), versions()
        results["seconds"] = stations.seconds
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        report = out / "report.html"
        write_report(results, report)
    print(f"\n{sum(stations.seconds.values()):.0f} s in all. The report: {report.resolve()}")
    print(f"Serve the student: fewstep serve {served}")
    return report
