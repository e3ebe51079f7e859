"""A student's artefact as one ONNX file: network and solver, noise and class in, image out (see `runtime.onnx`).

The model's metadata says which schedule, prediction, plan and artefact it holds.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep import artefact as artefacts
from fewstep.errors import UserError
from fewstep.runtime.onnx import convert
from fewstep.runtime.student import Student, load
from fewstep.solvers import Plan

METADATA_PREFIX = "fewstep."


def export_onnx(
    artefact: str | os.PathLike[str] | Student,
    out: str | os.PathLike[str],
    steps: int | None = None,
    guidance: float | Mapping[str, Any] | None = None,
) -> Path:
    """Write the sampler of `steps` steps as an ONNX file (opset 20) and return its path.

    A teacher's plan exports too, guidance included, with one copy of the network's operators for each evaluation.
    Raises UserError for steps that are not offered, an unwritable path, a missing package.
    """
    student = artefact if isinstance(artefact, Student) else load(artefact)
    plan = student.plan(steps, guidance)
    if plan.roles or any(len(stage.conditions) > 2 for stage in plan.stages):
        asks = "another network" if plan.roles else "negatives"
        raise UserError(
            f"guidance {plan.guided_by!r} asks {asks}, and a graph takes noise and one condition; export at another "
            "form, or at a number."
        )
    target = Path(out)
    _require_writable(target)
    converted = convert(student, plan)
    model = converted.model
    model.producer_name, model.producer_version = "fewstep", artefacts.version()
    model.metadata_props.update(metadata(student, plan))
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
            converted.save(Path(beside) / target.name)
            for file in sorted(Path(beside).iterdir(), key=lambda file: file.name == target.name):
                os.replace(file, target.parent / file.name)  # weights that do not fit in the graph first
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r} ({error.strerror}); give a writable path.") from error
    return target


def metadata(student: Student, plan: Plan) -> dict[str, str]:
    """What the ONNX file says about itself, all values JSON or plain text."""
    facts: dict[str, Any] = {
        "version": artefacts.version(),
        "artefact": student.artefact.digest,
        "kind": student.kind,
        "schedule": json.dumps(student.denoiser.schedule.to_dict()),
        "prediction": json.dumps(student.denoiser.prediction.to_dict()),
        "plan": plan.to_json(),
        "evaluations": plan.evaluations,
        "noise_slots": 1 + plan.stochastic_stages,
        "image_shape": json.dumps(list(student.image_shape)),
        "classes": json.dumps(student.classes),
    }
    return {METADATA_PREFIX + name: str(value) for name, value in facts.items()}


def _require_writable(target: Path) -> None:
    if target.is_dir():
        raise UserError(f"{str(target)!r} is a folder; give the name of the file to write.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r} ({error.strerror}); give a writable path.") from error
