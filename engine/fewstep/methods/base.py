"""The method interface: what a distillation method declares, and what it may use.

A method is a generator of updates. `iteration(batch, rng)` yields `Update(network, loss)`; the trainer does backward,
clip, step and averages, then resumes the generator, which now sees the new weights. Order, update ratios, reuse of
pre-update samples, several optimiser steps an iteration: all are just Python. A method of one loss defines only `loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from fewstep import solvers
from fewstep.diffusion import guidance as guiding
from fewstep.diffusion import teacher_guidance
from fewstep.diffusion.guidance import joined
from fewstep.diffusion.linear import combine
from fewstep.methods.batch import Batch, map_tensors
from fewstep.methods.rng import Rng
from fewstep.nets.lora import Lora
from fewstep.nets.network import Network, Way

if TYPE_CHECKING:
    from fewstep.diffusion.prediction import Prediction
    from fewstep.diffusion.schedules import Schedule
    from fewstep.solvers import Plan


Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
# a scale, or a form such as {name: interval, scale: 3, sigma_high: 1.6}; see docs/guidance.md
TeacherGuidance = Annotated[float | dict[str, Any] | None, BeforeValidator(teacher_guidance.stored)]


class MethodConfig(BaseModel):
    """Base of every method's `Config`: unknown keys and infinite numbers are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class OptimizerConfig(BaseModel):
    """An optimiser by name; numbers are floats, since torch 2.13's Adam refuses betas (0, 0.9)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    name: Literal["adamw", "torch_adamw", "adam", "radam", "sgd"] = "adamw"
    """adamw moves the network's averages in the same pass; torch_adamw is torch's own, by the same formula."""
    lr: NotNegative = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0


@dataclass(frozen=True)
class Average:
    """An exponential moving average of another network: average <- decay * average + (1 - decay) * network."""

    decay: float


@dataclass(frozen=True)
class NetworkSpec:
    """A network a method needs.

    start: "teacher", "random" (the recipe's network with fresh weights), another network's name, or a factory called
        with the modules built so far (pixels, voxels, a discriminator head that sizes itself on the critic).
    inputs: what the module is called with, of x t s w steps z noise camera; "s" makes a two-time network.
    read_out: "denoiser", "skip" (identity at t_min), "jump" (G(x, t, s)), "plain" (the module as it is), or a callable
        (net, schedule, prediction) -> module.
    adapter: low-rank corrections of the teacher, trained instead of a copy of its weights (start must be "teacher");
        the recipe's `adapters` come before it.
    engine: networks trained by ONE loss share one engine and optimiser, named by the network that owns it; "": its own.
    average: an average of network `start`, never trained.
    optimizer: None for the recipe's.
    """

    start: str | Callable[[Mapping[str, nn.Module]], nn.Module] = "teacher"
    inputs: tuple[str, ...] = ("x", "t")
    read_out: str | Callable[..., nn.Module] = "denoiser"
    adapter: Lora | None = None
    engine: str = ""
    average: Average | None = None
    optimizer: OptimizerConfig | None = None


@dataclass(frozen=True)
class Needs:
    """What a method asks of the recipe and the trainer.

    data: "samples" (x0), "pairs" (noise, teacher's answer), "paths" (recorded states), "none" (conditions only).
    teacher: whether there must be one; tangent: forward mode through a network (not under ZeRO-3);
    double_backward: gradients of gradients (not under ZeRO-3).
    """

    data: Literal["samples", "pairs", "paths", "none"] = "samples"
    teacher: bool = True
    tangent: bool = False
    double_backward: bool = False


@dataclass(frozen=True)
class Pairs:
    """Pairs (z, x0_hat) to generate before a stage: `count` runs of `network` along `plan`."""

    count: int
    plan: Plan
    network: str = "teacher"


@dataclass(frozen=True)
class TrainingStage:
    """A stretch of training.

    updates: iterations of the method, None for the recipe's number. Before it starts: `copies` {"teacher": "student"}
    are made (destination: source), the optimisers named in `restart` start anew, and `make` is generated. `values` is
    what the method reads back through `self.stage.values`.
    """

    name: str = "main"
    updates: int | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    restart: tuple[str, ...] = ()
    make: Pairs | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Update:
    """One optimiser step: `network` names a trained network, whose engine's parameters the loss moves."""

    network: str
    loss: Tensor
    log: dict[str, Any] = field(default_factory=dict)


class Method:
    """A distillation method. Subclasses give `Config`, `networks`, `needs`, `loss` or `iteration`, and `sampling`.

    The trainer sets `schedule`, `prediction`, `teacher` (a `Network`, where there is one), one attribute per network,
    `others` and `negatives` of the recipe, and `stage` before each stage. The artefact holds network `result` with a
    plan by `sampling` for each number of evaluations in `steps_offered`. `networks`, `needs` and `steps_offered` may be
    properties that read `config`; no option of `config` has a meaning of its own to anybody else, but for those
    `teacher_step` names and `guidance`, the teacher's scale or form that was distilled: at that scale `fewstep
    evaluate` compares student and teacher.
    """

    class Config(MethodConfig):
        """No options."""

    name: str = ""
    result: str = "student"  # the network the artefact holds
    steps_offered: Sequence[int] = (1, 2, 4)  # the numbers of evaluations it records a plan for
    networks: Mapping[str, NetworkSpec] = {"student": NetworkSpec()}
    needs: Needs = Needs()

    schedule: Schedule
    prediction: Prediction
    teacher: Network
    student: Network
    stage: TrainingStage
    others: Mapping[str, Network] = {}  # what the teacher's guidance asks besides, by role
    negatives: Sequence[int] = ()  # the classes that it steers away from

    def __init__(self, config: MethodConfig | Mapping[str, Any] | None = None) -> None:
        given = {} if config is None else config
        self.config: Any = given if isinstance(given, MethodConfig) else self.Config(**given)
        self.stage = TrainingStage()

    def stages(self) -> Iterator[TrainingStage]:
        """The stretches of training, in order."""
        yield TrainingStage()

    def iteration(self, batch: Batch, rng: Rng) -> Iterator[Update]:
        """The updates of one iteration. Between two yields the network just named has stepped."""
        yield Update("student", self.loss(batch, rng))

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        """The one loss of a simple method: a scalar, the mean over the micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} defines neither loss nor iteration.")

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond networks and optimisers: tensors and plain values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""

    def sampling(self, steps: int, **options: Any) -> Plan:
        """The plan a finished student samples with in `steps` evaluations; the artefact stores it."""
        raise NotImplementedError(f"{type(self).__name__} defines no sampling plan.")

    def noised(self, x0: Tensor, t: Tensor, rng: Rng, purpose: str = "noise") -> tuple[Tensor, Tensor]:
        """(x_t, noise) with x_t = alpha(t) x0 + sigma(t) noise; x0 [B, ...], t [B]."""
        noise = rng.normal(x0, purpose)
        return self.schedule.add_noise(x0, noise, t), noise

    def guided(
        self,
        network: Network,
        x: Tensor,
        t: Tensor,
        cond: Any,
        null: Any = None,
        guidance: float | Tensor | Mapping[str, Any] | None = None,
        way: Way = "value",
    ) -> Tensor:
        """The network's guided clean estimate, by one call on the batch of all conditions; t [B].

        guidance: w of uncond + w (cond - uncond), which may be [B] (Ho and Salimans 2022, arXiv:2207.12598, in our
        convention: w = 1 or None is the conditional answer alone); or a form of `fewstep.diffusion.teacher_guidance`.
        `null` None asks the network for its null condition.
        """
        call = network.by(way)
        form = None if isinstance(guidance, Tensor) else teacher_guidance.get(guidance)
        if guidance is None or (form is not None and not form.acts):
            return call(x, t, cond)
        names = ("cond", "uncond") if form is None else form.conditions
        if cond is None and names != ("cond",):
            return call(x, t, cond)
        given = {"cond": cond, **{f"negative {k}": torch.full_like(cond, n) for k, n in enumerate(self.negatives)}}
        if "uncond" in names:
            given["uncond"] = network.null(cond) if null is None else null
        size = len(names)
        every = call(torch.cat([x] * size), torch.cat([t] * size), joined(*(given[name] for name in names)))
        answers = dict(zip(names, every.split(len(x))))
        if form is None or not isinstance(guidance, Mapping):
            return combine([*answers.values()], [guiding.coefficients(guidance)])[0]  # type: ignore[arg-type]
        for role in form.roles:
            answers[role] = self.others[role].by(way)(x, t, cond)
        return teacher_guidance.guided(form, x, t, answers, network.schedule, network.prediction)

    def teacher_step(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Any = None) -> Tensor:
        """x_s: one step of the teacher from times t to s [B], by `config.solver` and guided by `config.guidance`."""
        guidance = getattr(self.config, "guidance", None)

        def denoise(x: Tensor, time: Tensor) -> Tensor:
            return self.guided(self.teacher, x, time, cond, guidance=guidance)

        with torch.no_grad():
            return solvers.step(getattr(self.config, "solver", "euler"), denoise, self.schedule, x_t, t, s)

    def condition_dropout(self, cond: Any, probability: float, rng: Rng, network: Network) -> Any:
        """`cond` with each sample's condition replaced by the null condition with the given probability."""
        if cond is None or probability == 0.0:
            return cond
        null = network.null(cond)
        dropped = rng.uniform(None, "condition dropout") < probability
        size = len(dropped)
        pairs = map_tensors(lambda value: value.reshape(2, size, *value.shape[1:]), joined(cond, null))

        def choose_rows(value: Tensor) -> Tensor:
            return torch.where(dropped.reshape(-1, *[1] * (value.dim() - 2)), value[1], value[0])

        return map_tensors(choose_rows, pairs)
