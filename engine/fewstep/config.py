"""Recipes: YAML files that say what to train, checked before anything runs.

Every failure is one sentence with the dotted key, the value and what is allowed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch.overrides import TorchFunctionMode

from fewstep import methods, nets
from fewstep.diffusion import prediction as predictions
from fewstep.diffusion import schedules, teacher_guidance
from fewstep.diffusion.guidance import Guidance
from fewstep.errors import UserError, choose
from fewstep.methods import OptimizerConfig
from fewstep.nets.lora import Lora

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Every = Annotated[int, Field(ge=0, le=10**12)]
LARGEST_SEED = 2**32 - 1  # numbers derived from it, as seed * 2^24 + sample, stay whole in 64 bits


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Where images come from.

    source: "digits" or a folder of images; batch_size: global, over all ranks and micro-batches.
    """

    source: str = "digits"
    loader: Literal["torch", "dali"] = "torch"
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 256
    workers: Annotated[int, Field(ge=0, le=1024)] = 0


class EmaConfig(_Section):
    """The sampling average of the student: its decay at each update, min(decay, (1 + n) / (10 + n)) with warmup."""

    decay: Fraction = 0.999
    warmup: bool = True


class TrainConfig(_Section):
    """How to train. updates: iterations of the method; warmup: updates over which the learning rate rises from 0;
    clip: largest gradient norm of an engine (null: no limit); ranks: local processes, launched when no launcher did it;
    deepspeed: entries merged into DeepSpeed's own configuration."""

    updates: Count = 1000
    accumulate: Count = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    warmup: Every = 0
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    non_finite: Literal["raise", "skip"] = "raise"
    ema: EmaConfig | None = EmaConfig()
    strategy: Literal["single", "ddp", "deepspeed"] = "single"
    ranks: Annotated[int, Field(ge=1, le=1024)] = 1
    zero_stage: Literal[1, 2, 3] = 2
    deepspeed: dict[str, Any] = {}
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: Every = 500
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    log_every: Count = 20
    sample_every: Every = 0


class Recipe(_Section):
    """One run. `teacher` (an artefact folder) for distillation, or `network`, `schedule`, `prediction` for training.

    adapters: low-rank adapters by network of the method, trained over the one teacher instead of copies of its weights.
    others, negatives: what a form of the teacher's guidance asks besides: artefact folders by role, and classes.
    """

    name: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    teacher: str | None = None
    network: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    adapters: dict[str, Lora] = {}
    others: dict[str, str] = {}
    negatives: tuple[Annotated[int, Field(ge=0)], ...] = ()
    data: DataConfig = DataConfig()
    method: dict[str, Any]
    train: TrainConfig = TrainConfig()
    output: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        given = [key for key in ("network", "schedule", "prediction") if getattr(self, key) is not None]
        if self.teacher is not None and given:
            raise UserError(f"{given[0]} is given together with teacher, which brings its own; remove {given[0]}.")
        if self.teacher is None and len(given) < 3:
            missing = next(key for key in ("network", "schedule", "prediction") if key not in given)
            raise UserError(
                f"{missing} is missing: give teacher (an artefact folder), or network, schedule and prediction."
            )
        if self.teacher is None and self.adapters:
            raise UserError(f"adapters.{min(self.adapters)} corrects a teacher and the recipe names none; set teacher.")
        if self.train.strategy == "single" and self.train.ranks > 1:
            raise UserError(
                f"train.ranks {self.train.ranks} needs more than one process; set train.strategy to ddp or deepspeed."
            )
        share = self.train.ranks * self.train.accumulate
        if self.data.batch_size % share:
            raise UserError(
                f"data.batch_size {self.data.batch_size} is not divisible by train.ranks x train.accumulate = {share}; "
                "choose a multiple."
            )
        if self.train.strategy == "deepspeed" and self.train.non_finite == "skip":
            raise UserError("train.non_finite 'skip' does not work with train.strategy 'deepspeed'; choose 'raise'.")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal recipe back."""
        return self.model_dump(mode="json")

    def method_config(self) -> methods.MethodConfig:
        """The method's own, validated configuration."""
        return _method_config(self.method)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides like `"train.optimizer.lr=1e-4"` (values are YAML).

    Raises `UserError` for an unreadable file, bad YAML, a duplicate, unknown or missing key, a wrong type or range.
    """
    content = _read(Path(path))
    for override in overrides:
        _override(content, override)
    try:
        return from_dict(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """The validated recipe of plain values."""
    recipe = _validated(Recipe, content, "")
    method = recipe.method_config()
    methods.check(methods.get(recipe.method["name"])(method))
    _check_asked(recipe, teacher_guidance.of_config(method))
    if recipe.network is not None:
        network = dict(recipe.network)
        if network.get("name") not in nets.names():
            raise choose("network.name", network.get("name"), nets.names())
        _checked("network", _tried, network)
        _checked("schedule", schedules.get, **_named("schedule", recipe.schedule, schedules.names()))
        _checked("prediction", predictions.from_dict, recipe.prediction)
    stored = method.model_dump(mode="json")
    return recipe.model_copy(update={"method": {"name": recipe.method["name"], **stored}})


def _check_asked(recipe: Recipe, form: Guidance | None) -> None:
    """Raises `UserError` where `others` and `negatives` are not what the teacher's guidance asks besides."""
    roles, conditions = ((), ()) if form is None else (form.roles, form.conditions)
    wanted = len({*conditions} - {"cond", "uncond"})
    for role in roles:
        if role not in recipe.others:
            raise UserError(
                f"method.guidance asks a network in the role {role!r}; set others.{role} to an artefact folder."
            )
    for role in recipe.others:
        if role not in roles:
            asked = f"asks for {', '.join(map(repr, roles))}" if roles else "asks no other network"
            raise UserError(f"others.{role} names an artefact and method.guidance {asked}; remove it.")
    if len(recipe.negatives) != wanted:
        raise UserError(
            f"negatives is {list(recipe.negatives)} and method.guidance takes {wanted}; give that many classes."
        )


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, in which 1e-3 is a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise UserError(
                    f"line {key_node.start_mark.line + 1}: the key {key!r} is neither a word nor a whole number."
                )
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice; keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {(error.strerror or str(error)).lower()}.") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read the recipe {path}: it is not UTF-8 text; give a YAML file.") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{path}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or 'unreadable'}."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no recipe: expected keys such as name, method and output.")
    return content


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r} is not of the form key=value, such as train.updates=500.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, UserError):
        raise UserError(f"override {override!r}: the value {text!r} is not valid YAML.") from None
    section = content
    for depth, part in enumerate(parts[:-1]):
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {'.'.join(parts[: depth + 1])} is a value, not a section.")
        section = inner
    section[parts[-1]] = value


def _named(key: str, section: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    options = dict(section or {})
    if options.get("name") not in names:
        raise choose(f"{key}.name", options.get("name"), names)
    return options


def _method_config(section: Mapping[str, Any]) -> methods.MethodConfig:
    options = dict(section)
    name = options.pop("name", None)
    if name not in methods.names():
        raise choose("method.name", name, methods.names())
    return _validated(methods.get(name).Config, options, "method")


class _Undrawn(TorchFunctionMode):
    """Fills no tensor with random numbers, for which torch would import its compiler on "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"}:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _tried(network: Mapping[str, Any]) -> None:
    """Build a network without making its weights."""
    with torch.device("meta"), _Undrawn(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of layers without weights
        built = nets.build(network)
    empty = [name for name, parameter in built.named_parameters() if parameter.numel() == 0]
    if empty:
        raise ValueError(f"its {empty[0]} would be empty")


def _checked(key: str, build: Any, *given: Any, **options: Any) -> None:
    """Try to build a section; its error is told with the section's key."""
    try:
        build(*given, **options)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{key}: {dict(given[0]) if given else options} is not accepted ({reason}).") from None


def _validated(model: type[Any], content: Mapping[str, Any], prefix: str) -> Any:
    try:
        text = json.dumps(content)
    except (TypeError, ValueError):
        raise UserError(f"{prefix or 'the recipe'} holds a value that is not text, number, list or section.") from None
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _sentence(model, error, content, prefix) from None


def _sentence(model: type[BaseModel], error: ValidationError, content: Mapping[str, Any], prefix: str) -> UserError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if not _is_branch(part)]
    key = ".".join(([prefix] if prefix else []) + path)
    kind, context, value = first["type"], first.get("ctx", {}), first["input"]
    if kind == "extra_forbidden":
        section = key.rpartition(".")[0]
        return choose("key", key, [f"{section}.{name}" if section else name for name in _keys(model, path)])
    if kind == "missing":
        return UserError(f"{key} is missing; a recipe must give it.")
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'|(\d+)", str(context.get("expected", "")))
        return choose(key, value, [text or number for text, number in allowed])
    expected = _EXPECTED.get(kind)
    if expected is None and kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        expected = f"{words} {context[bound]}"
    if expected is None:
        reason = str(context.get("error", first["msg"])).rstrip(".")
        return UserError(f"{key} {value!r} is not accepted: {reason}." if key else f"{reason}.")
    return UserError(f"{key} is {value!r}; expected {expected}.")


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
}
_BOUNDS = {
    "greater_than": ("gt", "a number greater than"),
    "greater_than_equal": ("ge", "a number of at least"),
    "less_than": ("lt", "a number less than"),
    "less_than_equal": ("le", "a number of at most"),
}


def _is_branch(part: Any) -> bool:
    """Whether a location names a member of a union and not a key."""
    return isinstance(part, str) and (
        "[" in part or part in {"float", "int", "str", "bool", "EmaConfig", "constrained-float"}
    )


def _keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys of the section that holds the key at `path`."""
    section: Any = model
    for part in path[:-1]:
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), section)
    keys = list(section.model_fields)
    return keys
