"""Does an exported graph draw the same images as PyTorch, whatever the batch?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.export.onnx import metadata
from fewstep.runtime.onnx import OnnxSampler
from fewstep.runtime.student import Student, load

TOLERANCE = 1e-4  # two runtimes in float32 differ by rounding, about 1e-6 for each evaluation
BATCH_TOLERANCE = 1e-5  # one runtime at two batch sizes: the same sums in another order


class ParityError(UserError):
    """An exported graph that does not draw the artefact's images."""


def check_parity(
    model: str | os.PathLike[str],
    artefact: str | os.PathLike[str] | Student,
    steps: int | None = None,
    *,
    guidance: float | Mapping[str, Any] | None = None,
    others: Mapping[str, Student | nn.Module] | None = None,
    seeds: int = 64,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Compare the graph in ONNX Runtime with PyTorch on `seeds` seeds, and its batch 1 with its batch 16.

    others: the networks of further roles that the plan names, as they were exported.

    Returns seeds, max_abs_error, max_batch_difference, the two tolerances and onnxruntime's version.
    Raises ParityError where a difference is above its tolerance or the graph was exported from another plan.
    """
    if type(seeds) is not int or seeds < 1:
        raise UserError(f"seeds is {seeds!r}, it must be a whole number of seeds to compare, from 1.")
    student = artefact if isinstance(artefact, Student) else load(artefact)
    plan = student.plan(steps, guidance)
    graph = OnnxSampler(model)
    if graph.metadata.get("fewstep.plan") != plan.to_json():
        raise ParityError(
            f"{str(model)!r} holds another plan than the artefact's {plan.evaluations} evaluations; export it again."
        )
    if graph.metadata.get("fewstep.artefact") != student.artefact.digest:
        raise ParityError(f"{str(model)!r} was exported from another artefact; export it again.")
    if graph.metadata.get("fewstep.others", "{}") != metadata(student, plan, others)["fewstep.others"]:
        raise ParityError(f"{str(model)!r} was exported with other networks in its roles; export it again.")
    chosen = torch.arange(seeds, dtype=torch.int64)
    noise = student.noise(chosen.to(student.device), plan)
    condition = None if student.classes is None else (chosen % student.classes).to(student.device)
    away = [(chosen + 1 + k) % (student.classes or 1) for k in range(plan.negatives)]
    expected = student.sample(noise, condition, steps, guidance=guidance, others=others, negatives=away).cpu()

    def drawn(some: slice) -> Tensor:
        return graph(noise[some], None if condition is None else condition[some], [one[some] for one in away])

    error = _largest(drawn(slice(None)), expected)
    alone = torch.cat([drawn(slice(i, i + 1)) for i in range(min(16, seeds))])
    batch_difference = _largest(alone, drawn(slice(0, 16)))
    if not error <= tolerance:
        raise ParityError(
            f"{str(model)!r} differs from PyTorch by {error:.2e} on {seeds} seeds, at most {tolerance:.0e} is allowed."
        )
    if not batch_difference <= BATCH_TOLERANCE:
        raise ParityError(
            f"{str(model)!r} differs by {batch_difference:.2e} between batch 1 and 16, at most {BATCH_TOLERANCE:.0e} "
            "is allowed."
        )
    import onnxruntime

    return {
        "seeds": seeds,
        "max_abs_error": error,
        "tolerance": tolerance,
        "max_batch_difference": batch_difference,
        "batch_tolerance": BATCH_TOLERANCE,
        "evaluations": plan.evaluations,
        "onnxruntime": onnxruntime.__version__,
    }


def _largest(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference; NaN where either holds one, which no tolerance passes."""
    return float((left.double() - right.double()).abs().max())
