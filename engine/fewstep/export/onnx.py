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

from torch import nn

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
    others: Mapping[str, Student | nn.Module] | None = None,
) -> Path:
    """Write the sampler of `steps` steps as an ONNX file (opset 20) and return its path.

    A teacher's plan exports too, guidance included, with one copy of the network's operators for each evaluation.
    others: the networks of further roles that the plan names, which come into the same graph: artefacts or modules.
    Raises UserError for steps that are not offered, a network too few or too many, an unwritable path, a missing
    package.
    """
    student = artefact if isinstance(artefact, Student) else load(artefact)
    plan = student.plan(steps, guidance)
    networks = _networks(plan, others or {})
    target = Path(out)
    _require_writable(target)
    converted = convert(student, plan, networks)
    model = converted.model
    model.producer_name, model.producer_version = "fewstep", artefacts.version()
    model.metadata_props.update(metadata(student, plan, others))
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
            converted.save(Path(beside) / target.name)
            for file in sorted(Path(beside).iterdir(), key=lambda file: file.name == target.name):
                os.replace(file, target.parent / file.name)  # weights that do not fit in the graph first
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r} ({error.strerror}); give a writable path.") from error
    return target


def _networks(plan: Plan, others: Mapping[str, Student | nn.Module]) -> dict[str, nn.Module]:
    for role in others:
        if role not in plan.roles:
            asked = f"asks for {', '.join(map(repr, plan.roles))}" if plan.roles else "asks no other network"
            raise UserError(f"others holds a network in the role {role!r} and this plan {asked}; leave it out.")
    found = {role: other.denoiser if isinstance(other, Student) else other for role, other in others.items()}
    for role in plan.roles:
        if not isinstance(found.get(role), nn.Module):
            given = type(found[role]).__name__ if role in found else "none"
            raise UserError(
                f"this plan asks a network in the role {role!r} and got {given}; give others={{{role!r}: artefact}} or "
                "a torch module."
            )
    return found


def metadata(student: Student, plan: Plan, others: Mapping[str, Student | nn.Module] | None = None) -> dict[str, str]:
    """What the ONNX file says about itself, all values JSON or plain text."""
    given = (others or {}).items()
    facts: dict[str, Any] = {
        "version": artefacts.version(),
        "artefact": student.artefact.digest,
        "others": json.dumps({role: _digest(other) for role, other in sorted(given)}),
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


def _digest(other: Student | nn.Module) -> str | None:
    return other.artefact.digest if isinstance(other, Student) else None


def _require_writable(target: Path) -> None:
    if target.is_dir():
        raise UserError(f"{str(target)!r} is a folder; give the name of the file to write.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r} ({error.strerror}); give a writable path.") from error
