"""What a stage asks its networks, and how their answers read: every estimate as coefficients of registers.

Where a form of guidance is linear this is all there is to it. Forms that need inner products, and bounds on the clean
estimate, put parts between the network and the map; the estimates then refer to what the parts made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fewstep.diffusion.guidance_forms import (
    Autoguidance,
    Classifier,
    GramGuidance,
    Guidance,
    Projected,
    ZeroStar,
)
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers.plans import Call, Part, Row, column

ESTIMATES = ("D", "E", "F", "U", "N", "G")
GUIDED, DENOISED, MOMENTUM, SHAPED = "guided", "denoised", "momentum", "shaped noise"
_NAMED = {"D": DENOISED, "E": "noise estimate"}  # registers of estimates that parts read
Terms = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A stage's calls and parts, and what the row's terms mean in registers."""

    conditions: tuple[str, ...] = ()
    others: tuple[Call, ...] = ()
    parts: tuple[Part, ...] = ()
    estimates: Mapping[str, Callable[[], Terms]] = dataclasses.field(default_factory=dict)
    answers: Mapping[str, Terms] = dataclasses.field(default_factory=dict)

    def folds(self, name: str) -> bool:
        return name in ESTIMATES or name in self.answers

    def terms(self, name: str) -> Terms:
        return self.answers[name] if name in self.answers else self.estimates[name]()

    def denoised(self) -> Terms:
        """The stage's read-out; nothing where the network was not asked, or where its answer does not say."""
        try:
            found = self.estimates["D"]() if self.estimates else {}
        except UserError:
            return {}
        made = {name for part in self.parts for name in part.outputs}
        columns = {*self.conditions, *made, *(name for call in self.others for name in call.columns)}
        return found if found.keys() <= {"x", *columns} else {}


def of(
    form: Guidance | None,
    prediction: Prediction,
    schedule: Schedule,
    row: Row,
    limit: Part | None,
    running: set[str],
) -> Reading:
    """The reading of one row. `running`: registers that parts of earlier stages keep."""
    named = {key for terms in row.outputs.values() for key in terms}
    wanted = named & {*ESTIMATES}
    asks = wanted | (named & {*row.answers}) | {name for part in row.parts for name in part.inputs if name != "noise"}
    if not asks and not row.others:
        return Reading(parts=row.parts)
    at = _At(prediction, schedule, row.time)
    read = _read(form, at, row.step, running)
    if wanted == {"G"}:
        used = {name for name, value in read.estimates["G"]().items() if value != 0.0}
        if not used & {*read.conditions} and not read.parts:
            read = dataclasses.replace(read, conditions=())
    if wanted == {"N"} and not row.parts:  # what guidance adds is not read here, so nobody is asked for it
        read = dataclasses.replace(_read(None, at, row.step, running), estimates=read.estimates)
    if limit is not None and named & {*row.answers}:
        raise UserError(
            f"clip and threshold bound one clean-sample estimate, and this sampler reads further answers "
            f"({', '.join(row.answers)}); leave them out."
        )
    if limit is not None and wanted & {"D", "E"}:
        read = _limited(read, at, limit)
    row_parts = [made for part in row.parts for made in _given_estimates(part, read)]
    if row.answers:
        read = dataclasses.replace(read, answers=_answers(form, read.conditions, row.answers))
    return dataclasses.replace(read, parts=(*read.parts, *row_parts))


def _given_estimates(part: Part, read: Reading) -> list[Part]:
    """The part, and before it the maps that make registers of the estimates it reads."""
    found, inputs = [], []
    for name in part.inputs:
        inputs.append(_NAMED.get(name, name))
        if name in _NAMED:
            terms = read.terms(name)
            matrix = (tuple(terms.values()),)
            found.append(Part("map", tuple(terms), (_NAMED[name],), matrix=matrix))
    return [*found, dataclasses.replace(part, inputs=tuple(inputs))]


@dataclasses.dataclass(frozen=True)
class _At:
    """Conversions of the network's output at one time."""

    prediction: Prediction
    schedule: Schedule
    time: float

    def clean(self, output: Mapping[str, float], kind: Prediction | None = None) -> Terms:
        """D = c_x x + c_out F, with F given by column."""
        of_x, of_output = (kind or self.prediction).coefficients(self.schedule, self.time)
        return {"x": float(of_x), **{name: float(of_output) * weight for name, weight in output.items()}}

    def noise(self, output: Mapping[str, float], kind: Prediction | None = None) -> Terms:
        """E, likewise."""
        of_x, of_output = (kind or self.prediction).noise_coefficients(self.schedule, self.time)
        return {"x": float(of_x), **{name: float(of_output) * weight for name, weight in output.items()}}

    def noise_of_clean(self, clean: Mapping[str, float]) -> Terms:
        """E = (x - alpha D)/sigma."""
        alpha, sigma = self.schedule.alpha(self.time), self.schedule.sigma(self.time)
        return _sum((1.0 / sigma, {"x": 1.0}), (-alpha / sigma, clean))

    def output_of_clean(self, clean: Mapping[str, float]) -> Terms:
        """F = (D - c_x x)/c_out."""
        of_x, of_output = (float(value) for value in self.prediction.coefficients(self.schedule, self.time))
        return _sum((1.0 / of_output, clean), (-of_x / of_output, {"x": 1.0}))

    def call(self, role: str, columns: tuple[str, ...], kind: Prediction | None = None) -> Call:
        asked = kind or self.prediction
        told, scale = asked.network_time(self.schedule, self.time), asked.input_scale(self.schedule, self.time)
        return Call(role, columns, float(told), float(scale), kind)

    def estimates(self, output: Mapping[str, float]) -> dict[str, Callable[[], Terms]]:
        """All estimates, where the guided output is linear in columns."""
        return {
            "D": lambda: self.clean(output),
            "E": lambda: self.noise(output),
            "F": lambda: dict(output),
            "U": lambda: self.clean({"uncond": 1.0}),
            "N": lambda: self.noise({"cond": 1.0}),
            "G": lambda: _sum((1.0, self.noise(output)), (-1.0, self.noise({"cond": 1.0}))),
        }

    def from_clean(self, clean: Mapping[str, float]) -> dict[str, Callable[[], Terms]]:
        """All estimates, where the guided clean estimate is what is known."""
        return {
            **self.estimates({}),
            "D": lambda: dict(clean),
            "E": lambda: self.noise_of_clean(clean),
            "F": lambda: self.output_of_clean(clean),
            "G": lambda: _sum((1.0, self.noise_of_clean(clean)), (-1.0, self.noise({"cond": 1.0}))),
        }


def _sum(*parts: tuple[float, Mapping[str, float]]) -> Terms:
    found: Terms = {}
    for factor, terms in parts:
        for name, value in terms.items():
            found[name] = found.get(name, 0.0) + factor * value
    return found


def _read(form: Guidance | None, at: _At, step: int, running: set[str]) -> Reading:
    if form is None:
        # "U" is then the one answer there is
        one = at.estimates({"cond": 1.0})
        return Reading(conditions=("cond",), estimates={**one, "U": one["D"]})
    if isinstance(form, ZeroStar) and step < form.zero_steps:
        return Reading(estimates=at.estimates({}))
    if isinstance(form, Autoguidance):
        return _autoguided(form, at)
    if isinstance(form, Classifier):
        return _classified(form, at)
    if isinstance(form, GramGuidance):
        return _weighed(form, at, running)
    weights = form.weights()
    assert weights is not None
    others = tuple(at.call(role, (role,)) for role in form.roles)
    return Reading(conditions=form.conditions, others=others, estimates=at.estimates(weights))


def _autoguided(form: Autoguidance, at: _At) -> Reading:
    weak, w = form.of_weak(at.prediction), form.scale
    others = (at.call("weak", ("weak",), weak),)
    if weak == at.prediction:
        output = {"cond": w, "weak": 1.0 - w}
        return Reading(conditions=("cond",), others=others, estimates=at.estimates(output))

    def clean() -> Terms:
        return _sum((w, at.clean({"cond": 1.0})), (1.0 - w, at.clean({"weak": 1.0}, weak)))

    def noise() -> Terms:
        return _sum((w, at.noise({"cond": 1.0})), (1.0 - w, at.noise({"weak": 1.0}, weak)))

    estimates = {
        **at.estimates({}),
        "D": clean,
        "E": noise,
        "F": lambda: at.output_of_clean(clean()),
        "G": lambda: _sum((1.0, noise()), (-1.0, at.noise({"cond": 1.0}))),
    }
    return Reading(conditions=("cond",), others=others, estimates=estimates)


def _classified(form: Classifier, at: _At) -> Reading:
    sigma, alpha = at.schedule.sigma(at.time), at.schedule.alpha(at.time)
    call = Call("gradient", ("gradient",), float(at.schedule.network_time(at.time)))
    plain = {"cond": 1.0}

    def clean() -> Terms:
        if alpha <= 0.0:
            raise UserError(
                f"guidance 'classifier' says nothing where alpha is zero (t={at.time!r}); start at a smaller t_max."
            )
        return _sum((1.0, at.clean(plain)), (form.scale * sigma * sigma / alpha, {"gradient": 1.0}))

    push = {"gradient": -form.scale * sigma}
    estimates = {
        **at.estimates(plain),
        "D": clean,
        "E": lambda: _sum((1.0, at.noise(plain)), (1.0, push)),
        "F": lambda: at.output_of_clean(clean()),
        "G": lambda: dict(push),
    }
    return Reading(conditions=("cond",), others=(call,), estimates=estimates)


def _weighed(form: GramGuidance, at: _At, running: set[str]) -> Reading:
    options = tuple((key, value) for key, value in form.numbers().items() if value is not None)
    outputs: tuple[str, ...] = (GUIDED,)
    inputs = form.conditions
    before: tuple[Part, ...] = ()
    if form.of == "denoised":
        outputs, inputs = (DENOISED,), tuple(f"clean {name}" for name in form.conditions)
        rows = [at.clean({name: 1.0}) for name in form.conditions]
        names = ("x", *form.conditions)
        matrix = tuple(tuple(row.get(name, 0.0) for name in names) for row in rows)
        before = (Part("map", names, inputs, matrix=matrix),)
    if isinstance(form, Projected) and form.momentum != 0.0:
        outputs = (*outputs, MOMENTUM)
        inputs = (*inputs, MOMENTUM) if MOMENTUM in running else inputs
    parts = (*before, Part(form.name, inputs, outputs, options))
    if form.of == "denoised":
        estimates = at.from_clean({DENOISED: 1.0})
    else:
        estimates = at.estimates({GUIDED: 1.0})
    return Reading(conditions=form.conditions, parts=parts, estimates=estimates)


def _limited(read: Reading, at: _At, limit: Part) -> Reading:
    """With the clean estimate bounded; the noise estimate then follows from it, the raw output stays."""
    clean = read.estimates["D"]()
    parts = read.parts
    if clean != {DENOISED: 1.0}:
        names = tuple(name for name, value in clean.items() if value != 0.0)
        parts = (*parts, Part("map", names, (DENOISED,), matrix=(tuple(clean[name] for name in names),)))
    bounded = dataclasses.replace(limit, inputs=(DENOISED,), outputs=(DENOISED,))
    followed = at.from_clean({DENOISED: 1.0})
    estimates = {**read.estimates, "D": followed["D"], "E": followed["E"]}
    return dataclasses.replace(read, parts=(*parts, bounded), estimates=estimates)


def _answers(form: Guidance | None, conditions: tuple[str, ...], answers: tuple[str, ...]) -> dict[str, Terms]:
    """What the network gives beside its prediction, guided as that is."""
    weights: dict[str, Any] | None = {"cond": 1.0} if form is None else form.weights()
    if weights is None or not weights.keys() <= {*conditions}:
        raise UserError(
            f"what the network answers beside its prediction ({', '.join(answers)}) cannot be guided by "
            f"{form.name if form else None!r}; use guidance 'cfg', or none."
        )
    return {answer: {column(name, answer): weight for name, weight in weights.items()} for answer in answers}
