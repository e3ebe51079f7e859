"""Rows as solver families write them, to a plan on raw network outputs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.diffusion import guidance as guiding
from fewstep.diffusion.guidance import Guidance
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import reading
from fewstep.solvers.plans import Call, Part, Plan, Row, Stage
from fewstep.solvers.reading import ESTIMATES, Reading

Terms = dict[str, float]


def compiled(
    solver: str,
    schedule: Schedule,
    prediction: Prediction,
    rows: Sequence[Row],
    *,
    guidance: Sequence[Guidance | float | None],
    initial_scale: float,
    options: Mapping[str, Any],
    limit: Part | None = None,
    guided_by: Any = None,
) -> Plan:
    """Rows in D and E to a plan on raw network outputs: D = c_x x + c_out (w cond + (1 - w) uncond) is folded in (and E
    likewise), outputs that nothing reads are dropped, and the next network input's scaling becomes one more row.

    guidance: the form that acts in each step, or None. limit: the part that bounds every clean-sample estimate.
    """
    forms = [form if form is None or form.acts else None for form in map(guiding.get, guidance)]
    rows = [row for row in rows if not (_estimates(row) == {"G"} and forms[row.step] is None)]
    outputs = [_read_later(row, rows[index + 1 :]) for index, row in enumerate(rows)]
    running: set[str] = set()
    readings = []
    for row in rows:
        found = reading.of(forms[row.step], prediction, schedule, row, limit, running)
        running |= {name for part in found.parts for name in part.outputs}
        readings.append(found)

    stages: list[Stage] = []
    streams = 0
    scales = [float(prediction.input_scale(schedule, row.time)) for row in rows]
    for index, (row, read) in enumerate(zip(rows, readings)):
        folded = {name: _folded(terms, read) for name, terms in outputs[index].items()}
        if index + 1 < len(rows):
            following = readings[index + 1].conditions
            if following and (scales[index + 1] != 1.0 or len(following) > 1):
                folded["input"] = {key: value * scales[index + 1] for key, value in folded["x"].items()}
        used = {key for terms in folded.values() for key, value in terms.items() if value != 0.0}
        if not read.parts:
            used |= set(read.conditions)
        noisy = "noise" in used or any("noise" in part.inputs for part in read.parts)
        streams += noisy
        form = forms[row.step]
        stage = Stage(
            time=row.time,
            target=row.target,
            network_time=float(prediction.network_time(schedule, row.time)),
            input_scale=scales[index],
            guidance=None if form is None else form.scale,
            inputs=(),
            outputs=tuple(folded),
            matrix=(),
            noise=streams if noisy else 0,
            conditions=read.conditions,
            answers=row.answers if read.conditions else (),
            others=(*read.others, *_further(row, prediction, schedule, scales[index])),
            nonlinear=read.parts,
            landing=None if row.landing is None else _landing(prediction, schedule, row.landing),
            read_out=tuple(read.denoised().items()),
        )
        inputs = _ordered(used, stage)
        matrix = tuple(tuple(terms.get(name, 0.0) for name in inputs) for terms in folded.values())
        stages.append(dataclasses.replace(stage, inputs=inputs, matrix=matrix))
    plain = json.loads(json.dumps(dict(options)))
    return Plan(solver, schedule, prediction, tuple(stages), float(initial_scale), plain, guiding.shown(guided_by))


def _estimates(row: Row) -> set[str]:
    return {key for terms in row.outputs.values() for key in terms if key in ESTIMATES}


def _folded(terms: Mapping[str, float], read: Reading) -> Terms:
    """Terms in estimates and answers as terms in registers."""
    found = {key: float(value) for key, value in terms.items() if not read.folds(key) and value != 0.0}
    for key in (*ESTIMATES, *read.answers):
        if terms.get(key, 0.0) != 0.0:
            for name, coefficient in read.terms(key).items():
                found[name] = found.get(name, 0.0) + terms[key] * coefficient
    return found


def _read_later(row: Row, later: Sequence[Row]) -> dict[str, Mapping[str, float]]:
    return {name: terms for name, terms in row.outputs.items() if name == "x" or _is_read(name, later)}


def _is_read(name: str, later: Sequence[Row]) -> bool:
    for row in later:
        if any(terms.get(name, 0.0) != 0.0 for terms in row.outputs.values()):
            return True
        if any(name in part.inputs for part in row.parts):
            return True
        if name in row.outputs:
            return False
    return False


def _further(row: Row, prediction: Prediction, schedule: Schedule, scale: float) -> list[Call]:
    told = float(prediction.network_time(schedule, row.time))
    return [Call(role, tuple(columns), told, scale) for role, columns in row.others.items()]


def _landing(prediction: Prediction, schedule: Schedule, time: float) -> float:
    if prediction.kind == "edm" and schedule.sigma(time) == 0.0:
        raise UserError(
            "a two-time network of prediction 'edm' is told log(sigma/alpha)/4 of where it lands, which is infinite at "
            "sigma = 0; end the grid above it, for example with {'zero': 'none'}."
        )
    return float(prediction.network_time(schedule, time))


def _ordered(used: set[str], stage: Stage) -> tuple[str, ...]:
    """State, networks' columns, what parts made, history, and noise last."""
    made = [name for part in stage.nonlinear for name in part.outputs]
    known = dict.fromkeys(("x", "base", *stage.columns, *made))
    noises = ("noise", reading.SHAPED)
    slots = sorted(used - known.keys() - {*noises}, key=lambda name: (len(name), name))
    first = [name for name in known if name in used and name not in noises]
    return (*first, *slots, *(name for name in reversed(noises) if name in used))
