"""A sampler as data: a `Plan` is a list of `Stage`s, each a network evaluation and a matrix, computed once in
float64.

A stage calls the network on the scaled x, then maps its inputs to its outputs: outputs = matrix @ inputs. The registers
are "x" (the state), "base" (a kept state), "d0", "d1", .. (slots of a ring of past clean-sample estimates), the
networks' columns ("cond", "uncond", .., see `Stage.conditions`, `answers` and `others`), what parts between network and
map make of them, "noise" (unit noise, always the last input), and the output "input" (what the next network call reads,
already scaled).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fewstep.diffusion import prediction as predictions
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose

FORMAT = "fewstep.plan/1"


@dataclasses.dataclass(frozen=True)
class Call:
    """A network asked beside the plan's own, known to a run by its role: a weak model, a classifier's gradient, a head.

    It reads x times `input_scale`, is told `network_time` and the condition, and fills `columns`: one, or several of
    equal channels. `prediction` is what a `Denoiser` in this role must predict, where that matters.
    """

    role: str
    columns: tuple[str, ...]
    network_time: float
    input_scale: float = 1.0
    prediction: Prediction | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """What stands between network and map where the map alone will not do: registers to registers, in order.

    `kind` "map" is matrix @ inputs; the others are named in `fewstep.solvers.parts` and take their numbers from
    `options`.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()
    matrix: tuple[tuple[float, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """One network evaluation at `time` and the linear map towards `target`.

    conditions: what the plan's network is asked, joined to one call: "cond", "uncond", "negative 0", ..; none for a
    stage without a call. answers: what the network gives beside its prediction, for each condition (see `column`).
    others: further networks. nonlinear: parts that stand between network and map. landing: the network time of the
    jump's end, where the network is told it (a two-time student's s). read_out: the clean-sample estimate, by register.
    noise: 0, or k >= 1 for the k-th stochastic stage (its Philox stream, and its place in carried noise).
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
    conditions: tuple[str, ...] = ("cond",)
    answers: tuple[str, ...] = ()
    others: tuple[Call, ...] = ()
    nonlinear: tuple[Part, ...] = ()
    landing: float | None = None
    read_out: tuple[tuple[str, float], ...] = ()

    @property
    def guided(self) -> bool:
        """Whether the network is asked with more than the condition, in one joined call."""
        return len(self.conditions) > 1

    @property
    def columns(self) -> tuple[str, ...]:
        """The registers that networks fill in this stage."""
        own = [column(condition, answer) for condition in self.conditions for answer in ("", *self.answers)]
        return (*own, *(name for call in self.others for name in call.columns))

    def row(self, output: str) -> dict[str, float]:
        """The coefficients of one output by input name."""
        return dict(zip(self.inputs, self.matrix[self.outputs.index(output)]))


def column(condition: str, answer: str = "") -> str:
    """The register of what a network answered: the condition's name for its prediction, the answer's for the rest."""
    if not answer:
        return condition
    return answer if condition == "cond" else f"{condition} {answer}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled sampler. Equal plans hold bit-equal numbers; `Plan.from_json(plan.to_json()) == plan`.

    `options` are the keywords `plan()` was called with besides prediction and guidance, so that `plan(p.solver,
    p.schedule, steps, prediction=p.prediction, guidance=p.guidance, **p.options)` builds the same sampler for other
    steps. `guided_by` is the guidance given, as JSON holds it.
    """

    solver: str
    schedule: Schedule
    prediction: Prediction
    stages: tuple[Stage, ...]
    initial_scale: float
    options: dict[str, Any]
    guided_by: Any = None
    _device_cache: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        return hash((self.solver, self.schedule, self.prediction, self.stages, self.initial_scale))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_device_cache": {}}

    @property
    def evaluations(self) -> int:
        """Network calls; a guided call, which is one call of doubled batch, counts 1."""
        return sum(bool(stage.conditions) + len(stage.others) for stage in self.stages)

    @property
    def stochastic_stages(self) -> int:
        """How many stages draw noise: what carried noise [B, 1 + S, ...] must hold beyond the initial one."""
        return sum(stage.noise > 0 for stage in self.stages)

    @property
    def guidance(self) -> float | None:
        """The largest guidance scale of any stage, None for an unguided plan."""
        return max((stage.guidance for stage in self.stages if stage.guidance is not None), default=None)

    def guidance_at(self, scale: float | None = None) -> Any:
        """What `plan` takes as guidance to guide other steps in the same form, at another scale or (None) its own."""
        if isinstance(self.guided_by, Mapping):
            return dict(self.guided_by) if scale is None else {**self.guided_by, "scale": scale}
        return self.guidance if scale is None else scale

    @property
    def roles(self) -> tuple[str, ...]:
        """The further networks a run must be given."""
        return tuple(dict.fromkeys(call.role for stage in self.stages for call in stage.others))

    @property
    def negatives(self) -> int:
        """How many negative conditions a run must be given."""
        return len({name for stage in self.stages for name in stage.conditions} - {"cond", "uncond"})

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
                "guidance": self.guided_by,
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
            schedule, kind = schedules.from_dict(data["schedule"]), predictions.from_dict(data["prediction"])
            if not data["stages"]:
                raise UserError("this plan has no stage.")
            return cls(
                solver=str(data["solver"]),
                schedule=schedule,
                prediction=kind,
                stages=tuple(_stage(stage, schedule, kind) for stage in data["stages"]),
                initial_scale=float(data["initial_scale"]),
                options=dict(data["options"]),
                guided_by=data.get("guidance"),
            )
        except UserError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
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
            parts = [f"{', '.join(part.outputs)} = {part.kind}({', '.join(part.inputs)})" for part in stage.nonlinear]
            maps = "; ".join([*parts, *(f"{name} = {_terms(stage.row(name))}" for name in stage.outputs)])
            lines.append(
                f"{number:>3} {stage.time:>10.5g} {stage.target:>10.5g} {self.schedule.ratio(stage.time):>10.4g} "
                f"{stage.network_time:>10.5g} {stage.input_scale:>9.4g} {scale:>5}  {maps}"
            )
        return "\n".join(lines)


def _terms(row: Mapping[str, float]) -> str:
    terms = [f"{value:+.4g} {name}" for name, value in row.items() if value != 0.0]
    return " ".join(terms) or "0"


def _stage(data: Mapping[str, Any], schedule: Schedule, prediction: Prediction) -> Stage:
    given = {key: _frozen(value) for key, value in data.items()}
    given["others"] = tuple(_call(call) for call in data.get("others", ()))
    given["nonlinear"] = tuple(
        Part(**{key: _frozen(value) for key, value in part.items()}) for part in data.get("nonlinear") or ()
    )
    if "conditions" not in data:  # a plan written before stages named them
        of_x, of_output = (float(value) for value in prediction.coefficients(schedule, data["time"]))
        weights = {"cond": 1.0}
        if "uncond" in data["inputs"]:
            weights = {"cond": data["guidance"], "uncond": 1.0 - data["guidance"]}
        given["conditions"] = tuple(weights)
        given["read_out"] = (("x", of_x), *((name, of_output * value) for name, value in weights.items()))
    stage = Stage(**given)
    _check_numbers(stage)
    matrix = stage.matrix
    if len(matrix) != len(stage.outputs) or any(len(row) != len(stage.inputs) for row in matrix):
        raise UserError(
            f"a stage of this plan has {len(matrix)} rows for outputs {stage.outputs} and inputs {stage.inputs}."
        )
    kept = ("x", "base", *stage.columns, *(name for part in stage.nonlinear for name in part.outputs))
    for name in (*stage.inputs, *(output for output in stage.outputs if output != "input")):
        if name not in (*kept, "noise") and not is_slot(name):
            raise choose("register", name, (*kept, "d0", "d1", "noise"))
    return stage


def _check_numbers(stage: Stage) -> None:
    """Raises UserError where a stage that was read holds something else, or what no float32 or int64 can be."""
    found = [(name, getattr(stage, name)) for name in ("time", "target", "network_time", "input_scale")]
    found += [(name, getattr(stage, name)) for name in ("guidance", "landing") if getattr(stage, name) is not None]
    found += [("matrix", value) for row in stage.matrix for value in row]
    for name, value in found:
        if type(value) not in (int, float) or not abs(value) <= (2**53 if type(value) is int else 1e38):
            raise UserError(f"{name} of a stage of this plan holds {value!r}; it must be a finite number.")
    if type(stage.noise) is not int or not 0 <= stage.noise < 2**31:
        raise UserError(f"noise of a stage of this plan is {stage.noise!r}; it must be a whole number from 0.")


def _call(data: Mapping[str, Any]) -> Call:
    kind = data.get("prediction")
    given = {key: _frozen(value) for key, value in data.items()}
    return Call(**{**given, "prediction": None if kind is None else predictions.from_dict(kind)})


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def is_slot(name: str) -> bool:
    """Whether a register is a slot of the history: "d0", "d1", .."""
    return name[:1] == "d" and name[1:].isdigit()


@dataclasses.dataclass(frozen=True)
class Row:
    """One evaluation as a solver family writes it, in terms of estimates of this evaluation: "D" of the clean sample,
    "E" of the noise, "F" the raw output; all guided. "U" is the unconditional "D", "N" the unguided "E", "G" = E - N
    what guidance adds.

    `outputs` maps "x", "base" or a history slot ("d0", "d1", ..) to coefficients on "x", "base", estimates, past slots,
    "noise", and registers named by what follows. `step` is the step of the grid it belongs to (guidance is chosen by
    step). answers: names of what the network gives beside its prediction, in order; as terms they are guided as the
    prediction is. others: further networks, role -> their columns. parts: what shapes registers before the map.
    landing: the time the network is told as the jump's end. A row without estimates and answers asks no network.
    """

    time: float
    target: float
    outputs: Mapping[str, Mapping[str, float]]
    step: int
    answers: tuple[str, ...] = ()
    others: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    landing: float | None = None
