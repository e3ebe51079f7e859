"""Latency and throughput of teacher and student in each runner, measured side by side in one run.

Every runner draws from the same noise, and must give eager PyTorch's images before it is timed. Rounds are interleaved:
each gives every row a slice of time in turn, so a slow moment of the machine falls on all of them and ratios hold.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError, choose
from fewstep.runtime.sampler import Sampler
from fewstep.runtime.student import Student, load
from fewstep.solvers import Plan

Draw = Callable[[Tensor, Tensor | None], Tensor]

RUNNERS = {
    "eager": "PyTorch eager",
    "compile": "torch.compile on the network, the plan's linear maps by fewstep's operators",
    "onnx": "ONNX Runtime, network and solver in one graph (above 8 evaluations: the network's graph in the executor)",
}
MOST_UNROLLED = 8  # evaluations in one ONNX graph: exporting one costs about a second
TEACHER_EVALUATIONS = 32
STUDENT_STEPS = (1, 4)
BATCHES = (1, 16)
TOLERANCE = 1e-3  # float32 runners that order sums differently, over up to 32 evaluations with guidance
WARMUP_CALLS = 2
ROUNDS = 5


class _Unavailable(Exception):
    """A runner that this machine cannot run; its text says why."""


@dataclass
class _Case:
    """One row: a model in a runner at a batch size, and the seconds of each timed call."""

    model: str
    plan: Plan
    runner: str
    batch: int
    draw: Draw
    noise: Tensor
    condition: Tensor | None
    max_abs_error: float
    method: str | None = None
    seconds: list[float] = field(default_factory=list)

    def run(self) -> float:
        begun = time.perf_counter()
        self.draw(self.noise, self.condition)
        if self.noise.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def bench_artefacts(
    teacher: str | os.PathLike[str] | None,
    student: str | os.PathLike[str],
    seconds: float = 0.5,
    *,
    student_steps: Sequence[int] = STUDENT_STEPS,
    guidance: float = 1.5,
    batches: Sequence[int] = BATCHES,
    runners: Sequence[str] = tuple(RUNNERS),
    device: str = "cpu",
) -> dict[str, Any]:
    """Time the teacher at 32 guided evaluations and the student at `student_steps`, `seconds` for each row at least.

    The reference of all speed-ups is the teacher at 32 evaluations with the guidance that the student was distilled at
    (none, for most), in eager PyTorch: the one that the student's quality is compared with. Where that is not the
    `guidance` of the other rows, it is timed in eager PyTorch only.

    Returns rows (one for each model, runner and batch: p50, p90, p99 in milliseconds, images per second, calls, largest
    difference to eager, speed-up over the reference at the same batch), what was skipped and how it was measured.
    Raises UserError for an unknown runner, steps that are not offered, or a runner whose images differ from eager's.
    """
    for runner in runners:
        if runner not in RUNNERS:
            raise choose("runner", runner, RUNNERS)
    if not seconds > 0 or any(batch < 1 for batch in batches):
        raise UserError(f"seconds is {seconds} and batches are {list(batches)}; both must be above 0.")
    fast = load(student, device)
    models = [("student", fast, fast.plan(steps)) for steps in student_steps]
    reference: Plan | None = None
    only_eager: list[tuple[str, Student, Plan]] = []
    if teacher is not None:
        loaded = load(teacher, device)
        guided, reference = (teacher_plan(loaded, scale) for scale in (guidance, fast.artefact.guidance))
        models.insert(0, ("teacher", loaded, guided))
        if reference.guidance != guided.guidance:
            only_eager.append(("teacher", loaded, reference))
        else:
            reference = guided
    skipped: list[dict[str, str]] = []
    cases: list[_Case] = []
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as folder:
        for runner in runners:
            timed = [*only_eager, *models] if runner == "eager" else models
            try:
                drawers = [_RUNNERS[runner](sampler, plan, Path(folder)) for _, sampler, plan in timed]
            except _Unavailable as reason:
                skipped.append({"runner": runner, "reason": str(reason)})
                continue
            for (name, sampler, plan), draw in zip(timed, drawers):
                cases += [_checked(name, sampler, plan, runner, draw, batch) for batch in batches]
        prepared = time.perf_counter() - begun
        _time(cases, seconds)
    return {
        "rows": [_row(case, cases, reference) for case in cases],
        "skipped": skipped,
        "runners": {name: RUNNERS[name] for name in runners},
        "warmup_calls": WARMUP_CALLS,
        "rounds": ROUNDS,
        "least_seconds_for_each_row": seconds,
        "tolerance": TOLERANCE,
        "threads": torch.get_num_threads(),
        "device": device,
        "preparation_seconds": round(prepared, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def teacher_plan(teacher: Student, guidance: float | None, evaluations: int = TEACHER_EVALUATIONS) -> Plan:
    """The teacher's own solver with as many steps as `evaluations` network calls allow (a guided call counts one)."""
    scale = guidance if teacher.kind == "teacher" and teacher.classes is not None else None
    plans = (teacher.plan(steps, scale) for steps in range(evaluations, 0, -1))
    return next(plan for plan in plans if plan.evaluations <= evaluations)


def table(results: dict[str, Any]) -> str:
    """The rows as text, the skipped runners and how it was measured below."""
    names = [_name(row) for row in results["rows"]]
    width = max(map(len, names), default=0)
    lines = [
        f"{'model':{width}} {'calls':>5} {'runner':8} {'batch':>5} {'p50 ms':>9} {'p90 ms':>9} {'p99 ms':>9} "
        f"{'images/s':>9} {'speed-up':>8}"
    ]
    for name, row in zip(names, results["rows"]):
        ratio = row["speedup_over_eager_teacher"]
        lines.append(
            f"{name:{width}} {row['evaluations']:5} {row['runner']:8} {row['batch']:5} {row['p50_ms']:9.3f} "
            f"{row['p90_ms']:9.3f} {row['p99_ms']:9.3f} {row['images_per_second']:9.1f} "
            + (f"{ratio:7.1f}x" if ratio is not None else f"{'-':>8}")
        )
    lines += [f"skipped {entry['runner']}: {entry['reason']}" for entry in results["skipped"]]
    against = next((row for row in results["rows"] if row["speedup_over_eager_teacher"] == 1.0), None)
    what = f"; speed-up over the {_name(against)}, eager, at the same batch." if against else "."
    lines.append(
        f"calls: network evaluations (a guided one counts once). {results['warmup_calls']} warm-up calls, then "
        f"{results['rounds']} interleaved rounds, {results['threads']} threads{what}"
    )
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    scale = row["guidance"]
    if row["model"] == "teacher":
        return f"teacher, guidance {scale:g}" if scale not in (None, 1.0) else "teacher, unguided"
    return f"{row['model']}, {row['method']}" if row["method"] else row["model"]


def _eager(sampler: Student, plan: Plan, folder: Path) -> Draw:
    return _without_gradients(Sampler(sampler.denoiser, plan))


def _compiled(sampler: Student, plan: Plan, folder: Path) -> Draw:
    """The network compiled once for any batch above one and once for batch 1; two compile threads bound memory."""
    if sampler.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise _Unavailable("torch.compile needs a C++ compiler on the CPU, and g++ was not found.")
    import torch._inductor.config as inductor

    inductor.compile_threads = min(2, os.cpu_count() or 1)
    source = sampler.denoiser
    network = torch.compile(source.net, dynamic=True)
    return _without_gradients(Sampler(Denoiser(network, source.schedule, source.prediction), plan))  # type: ignore[arg-type]


def _onnx(sampler: Student, plan: Plan, folder: Path) -> Draw:
    from fewstep.runtime.onnx import OnnxNetwork, OnnxSampler, convert, convert_network

    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise _Unavailable(f"{package} is not installed: pip install {package}.")
    exported = _exported(sampler, plan)
    if exported is not None:
        return exported
    file = folder / f"{sampler.kind}_{plan.evaluations}.onnx"
    if plan.evaluations <= MOST_UNROLLED:
        convert(sampler, plan).save(file)
        return OnnxSampler(file)
    convert_network(sampler).save(file)
    source = sampler.denoiser
    network = OnnxNetwork(source.net, file)
    return _without_gradients(Sampler(Denoiser(network, source.schedule, source.prediction), plan))


def _exported(sampler: Student, plan: Plan) -> Draw | None:
    """The graph that was exported into the artefact's folder from this artefact and plan, if there is one."""
    from fewstep.runtime.onnx import OnnxSampler

    for file in sorted(sampler.artefact.path.glob("*.onnx")):
        try:
            graph = OnnxSampler(file)
        except UserError:
            continue
        wanted = (sampler.artefact.digest, plan.to_json())
        if (graph.metadata.get("fewstep.artefact"), graph.metadata.get("fewstep.plan")) == wanted:
            return graph
    return None


_RUNNERS: dict[str, Callable[[Student, Plan, Path], Draw]] = {"eager": _eager, "compile": _compiled, "onnx": _onnx}


def _without_gradients(module: Sampler) -> Draw:
    def draw(noise: Tensor, condition: Tensor | None) -> Tensor:
        with torch.no_grad():
            return module(noise, condition)

    return draw


def _checked(name: str, sampler: Student, plan: Plan, runner: str, draw: Draw, batch: int) -> _Case:
    """The row, warmed up, and only if it draws eager's images."""
    seeds = torch.arange(batch, dtype=torch.int64, device=sampler.device)
    noise = sampler.noise(seeds, plan)
    condition = None if sampler.classes is None else seeds % sampler.classes
    expected = _eager(sampler, plan, Path())(noise, condition).clone()
    for _ in range(WARMUP_CALLS):
        got = draw(noise, condition)
    error = float((got.cpu() - expected.cpu()).abs().max())
    if not error <= TOLERANCE:
        raise UserError(
            f"{runner} at batch {batch} differs from eager PyTorch by {error:.1e} for the {name} at {plan.evaluations} "
            f"evaluations, above {TOLERANCE:.0e}; its time is not reported."
        )
    return _Case(name, plan, runner, batch, draw, noise, condition, error, sampler.artefact.method)


def _time(cases: list[_Case], seconds: float) -> None:
    for _ in range(ROUNDS):
        for case in cases:
            spent = 0.0
            while spent < seconds / ROUNDS:
                taken = case.run()
                case.seconds.append(taken)
                spent += taken


def _row(case: _Case, cases: list[_Case], reference: Plan | None) -> dict[str, Any]:
    times = sorted(case.seconds)
    middle = statistics.median(times)
    eager = (other for other in cases if (other.runner, other.batch) == ("eager", case.batch))
    rival = next((other for other in eager if other.model == "teacher" and other.plan is reference), None)
    return {
        "model": case.model,
        "method": case.method,
        "evaluations": case.plan.evaluations,
        "guidance": case.plan.guidance,
        "solver": case.plan.solver,
        "runner": case.runner,
        "batch": case.batch,
        "calls": len(times),
        "p50_ms": 1e3 * middle,
        "p90_ms": 1e3 * _percentile(times, 0.90),
        "p99_ms": 1e3 * _percentile(times, 0.99),
        "images_per_second": case.batch * len(times) / sum(times),
        "max_abs_error": case.max_abs_error,
        "speedup_over_eager_teacher": statistics.median(rival.seconds) / middle if rival else None,
    }


def _percentile(ordered: list[float], fraction: float) -> float:
    """The least time that `fraction` of the calls did not exceed (with few calls, the largest)."""
    return ordered[math.ceil(len(ordered) * fraction) - 1]
