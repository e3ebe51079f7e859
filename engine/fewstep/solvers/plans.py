"""A sampler as data: a `Plan` is a list of `Stage`s, each a network evaluation and a matrix, computed once in
float64.

A stage calls the network on the scaled x, then maps its inputs to its outputs: outputs = matrix @ inputs. The registers
are "x" (the state), "base" (a kept state), "d0", "d1", .. (slots of a ring of past clean-sample estimates), the
network's columns "cond" and "uncond", "noise" (unit noise, always the last input), and the output "input" (what the
next network call reads, already scaled).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.diffusion import guidance as guiding
from fewstep.diffusion import prediction as predictions
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose

FORMAT = "fewstep.plan/1"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One network evaluation at `time` and the linear map towards `target`.

    `noise` is 0, or k >= 1 for the k-th stochastic stage (its Philox stream, and its place in carried noise);
    `nonlinear` names a pointwise part between network and map (none of today's solvers has one).
    """

    time: float
    target: float
    network_time: float
    input_scale: float
    guidance: float | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    noise: int = 0
    nonlinear: str | None = None

    @property
    def guided(self) -> bool:
        return "uncond" in self.inputs

    def row(self, output: str) -> dict[str, float]:
        """The coefficients of one output by input name."""
        return dict(zip(self.inputs, self.matrix[self.outputs.index(output)]))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled sampler. Equal plans hold bit-equal numbers; `Plan.from_json(plan.to_json()) == plan`.

    `options` are the keywords `plan()` was called with besides prediction and guidance, so that `plan(p.solver,
    p.schedule, steps, prediction=p.prediction, guidance=p.guidance, **p.options)` builds the same sampler for other
    steps.
    """

    solver: str
    schedule: Schedule
    prediction: Prediction
    stages: tuple[Stage, ...]
    initial_scale: float
    options: dict[str, Any]
    _device_cache: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        return hash((self.solver, self.schedule, self.prediction, self.stages, self.initial_scale))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_device_cache": {}}

    @property
    def evaluations(self) -> int:
        """Network calls; a guided call, which is one call of doubled batch, counts 1."""
        return len(self.stages)

    @property
    def stochastic_stages(self) -> int:
        """How many stages draw noise: what carried noise [B, 1 + S, ...] must hold beyond the initial one."""
        return sum(stage.noise > 0 for stage in self.stages)

    @property
    def guidance(self) -> float | None:
        """The largest guidance scale of any stage, None for an unguided plan."""
        return max((stage.guidance for stage in self.stages if stage.guidance is not None), default=None)

    @property
    def times(self) -> tuple[float, ...]:
        """Evaluation times in order, and the time at which the plan ends."""
        return (*(stage.time for stage in self.stages), self.stages[-1].target)

    def to_json(self) -> str:
        """The plan as JSON; floats are written so that they read back bit for bit."""
        return json.dumps(
            {
                "format": FORMAT,
                "solver": self.solver,
                "schedule": self.schedule.to_dict(),
                "prediction": self.prediction.to_dict(),
                "initial_scale": self.initial_scale,
                "options": self.options,
                "stages": [dataclasses.asdict(stage) for stage in self.stages],
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan that `to_json` wrote; UserError if it is something else."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise UserError(f"a plan of format {data['format']!r} cannot be read here; expected {FORMAT!r}.")
            return cls(
                solver=str(data["solver"]),
                schedule=schedules.from_dict(data["schedule"]),
                prediction=predictions.from_dict(data["prediction"]),
                stages=tuple(_stage(stage) for stage in data["stages"]),
                initial_scale=float(data["initial_scale"]),
                options=dict(data["options"]),
            )
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"this is not a plan ({type(error).__name__}: {error}); expected JSON of {FORMAT!r}."
            ) from None

    def __str__(self) -> str:
        """A readable table: one line a stage, coefficients to four digits."""
        options = (
            ", ".join(f"{key}={value}" for key, value in self.options.items() if value is not None) or "default grid"
        )
        head = (
            f"{self.solver} on {self.schedule.name} ({options}), prediction {self.prediction.kind}; "
            f"{self.evaluations} evaluations, {self.stochastic_stages} with noise; starts at {self.initial_scale:.6g}"
        )
        lines = [head, f"{'':>3} {'time':>10} {'target':>10} {'tau':>10} {'net time':>10} {'scale':>9} {'w':>5}  map"]
        for number, stage in enumerate(self.stages):
            scale = "" if stage.guidance is None else f"{stage.guidance:g}"
            maps = "; ".join(f"{name} = {_terms(stage.row(name))}" for name in stage.outputs)
            lines.append(
                f"{number:>3} {stage.time:>10.5g} {stage.target:>10.5g} {self.schedule.ratio(stage.time):>10.4g} "
                f"{stage.network_time:>10.5g} {stage.input_scale:>9.4g} {scale:>5}  {maps}"
            )
        return "\n".join(lines)


def _terms(row: Mapping[str, float]) -> str:
    terms = [f"{value:+.4g} {name}" for name, value in row.items() if value != 0.0]
    return " ".join(terms) or "0"


def _stage(data: Mapping[str, Any]) -> Stage:
    matrix = tuple(tuple(float(value) for value in row) for row in data["matrix"])
    stage = Stage(**{**data, "inputs": tuple(data["inputs"]), "outputs": tuple(data["outputs"]), "matrix": matrix})
    if len(matrix) != len(stage.outputs) or any(len(row) != len(stage.inputs) for row in matrix):
        raise UserError(
            f"a stage of this plan has {len(matrix)} rows for outputs {stage.outputs} and inputs {stage.inputs}."
        )
    known = (*_ORDER, "noise")
    for name in (*stage.inputs, *(output for output in stage.outputs if output != "input")):
        if name not in known:
            raise choose("register", name, known)
    return stage


@dataclasses.dataclass(frozen=True)
class Row:
    """One evaluation as a solver family writes it, in terms of the clean-sample estimate "D", the noise estimate "E"
    or the raw output "F" of this evaluation.

    `outputs` maps "x", "base" or a history slot ("d0", "d1", ..) to coefficients on "x", "base", "D", "E", "F", past
    slots and "noise". `step` is the step of the grid it belongs to (guidance is chosen by step).
    """

    time: float
    target: float
    outputs: Mapping[str, Mapping[str, float]]
    step: int


def compiled(
    solver: str,
    schedule: Schedule,
    prediction: Prediction,
    rows: Sequence[Row],
    *,
    guidance: Sequence[float | None],
    initial_scale: float,
    options: Mapping[str, Any],
) -> Plan:
    """Rows in D and E to a plan on raw network outputs: D = c_x x + c_out (w cond + (1 - w) uncond) is folded in (and E
    likewise), outputs that nothing reads are dropped, and the next network input's scaling becomes one more row.
    """
    stages: list[Stage] = []
    streams = 0
    scales = [float(prediction.input_scale(schedule, row.time)) for row in rows]
    scale_of = [guidance[row.step] if guiding.is_guided(guidance[row.step]) else None for row in rows]
    for index, row in enumerate(rows):
        weight = scale_of[index]
        columns = {"cond": 1.0}
        if weight is not None:
            of_cond, of_uncond = guiding.coefficients(weight)
            columns = {"cond": float(of_cond), "uncond": float(of_uncond)}

        outputs: dict[str, dict[str, float]] = {}
        for name, terms in row.outputs.items():
            if name != "x" and not _is_read(name, rows[index + 1 :]):
                continue
            folded = {key: float(value) for key, value in terms.items() if key not in _ESTIMATES and value != 0.0}
            for estimate, coefficients_of in _ESTIMATES.items():
                if terms.get(estimate, 0.0) == 0.0:
                    continue
                of_x, of_output = (float(value) for value in coefficients_of(prediction, schedule, row.time))
                folded["x"] = folded.get("x", 0.0) + terms[estimate] * of_x
                for key, value in columns.items():
                    folded[key] = folded.get(key, 0.0) + terms[estimate] * (of_output * value)
            outputs[name] = folded
        last = index + 1 == len(rows)
        if not last and (scales[index + 1] != 1.0 or scale_of[index + 1] is not None):
            outputs["input"] = {key: value * scales[index + 1] for key, value in outputs["x"].items()}

        used = {key for terms in outputs.values() for key, value in terms.items() if value != 0.0}
        network = {"cond"} | ({"uncond"} if weight is not None else set())
        inputs = tuple(name for name in _ORDER if name in used | network) + tuple(["noise"] if "noise" in used else [])
        streams += "noise" in used
        stages.append(
            Stage(
                time=row.time,
                target=row.target,
                network_time=float(prediction.network_time(schedule, row.time)),
                input_scale=scales[index],
                guidance=weight,
                inputs=inputs,
                outputs=tuple(outputs),
                matrix=tuple(tuple(terms.get(name, 0.0) for name in inputs) for terms in outputs.values()),
                noise=streams if "noise" in used else 0,
            )
        )
    plain = json.loads(json.dumps(dict(options)))
    return Plan(solver, schedule, prediction, tuple(stages), float(initial_scale), plain)


_ESTIMATES = {
    "D": Prediction.coefficients,
    "E": Prediction.noise_coefficients,
    "F": lambda prediction, schedule, t: (0.0, 1.0),
}
_ORDER = ("x", "base", "cond", "uncond", "d0", "d1", "d2", "d3", "d4", "d5")


def _is_read(name: str, later: Sequence[Row]) -> bool:
    for row in later:
        if any(terms.get(name, 0.0) != 0.0 for terms in row.outputs.values()):
            return True
        if name in row.outputs:
            return False
    return False
