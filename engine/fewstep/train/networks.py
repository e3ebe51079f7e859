"""The networks of a run: made whole on the device, then given to engines, to their homes, and to the method."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fewstep import artefact, methods, nets
from fewstep.diffusion import prediction as predictions
from fewstep.diffusion import schedules, teacher_guidance
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.train.ema import Average
from fewstep.train.strategies import Engine, Strategy

if TYPE_CHECKING:
    from fewstep.config import Recipe
    from fewstep.diffusion.schedules import Schedule

SAMPLING = "sampling_average"  # the student's average that is sampled from and saved
_FAILURES = (RuntimeError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError)


def make(
    recipe: Recipe, method: methods.Method, strategy: Strategy, teacher: Denoiser | None
) -> tuple[dict[str, nn.Module], list[Average]]:
    """Every module of the run by name, the teacher and the sampling average among them, and what averages what.

    Sets the method's schedule and prediction. Nothing is sharded yet. Raises `UserError` where the method needs what
    recipe or strategy lack.
    """
    if teacher is None and method.needs.teacher:
        raise UserError(f"method {method.name!r} needs a teacher; set teacher to an artefact folder.")
    if method.needs.tangent and not strategy.exact_tangents:
        raise UserError(
            f"method {method.name!r} takes tangents (forward mode), which ZeRO-3 cannot; "
            "set train.zero_stage to 1 or 2."
        )
    if teacher is not None:
        method.schedule, method.prediction = teacher.schedule, teacher.prediction
    else:
        method.schedule = schedules.from_dict(_scheduled(recipe.schedule or {}))
        method.prediction = predictions.from_dict(recipe.prediction or {})
    described = recipe.network
    network = None if described is None else (lambda: nets.build(described))
    modules: dict[str, nn.Module] = methods.build(method, teacher, network, recipe.adapters)
    averages = [
        Average(name, str(spec.start), spec.average.decay)
        for name, spec in method.networks.items()
        if spec.average is not None
    ]
    if recipe.train.ema is not None:
        modules[SAMPLING] = copy.deepcopy(modules[method.result]).requires_grad_(False).eval()
        averages.append(Average(SAMPLING, method.result, recipe.train.ema.decay, recipe.train.ema.warmup))
    if teacher is not None:
        modules["teacher"] = teacher.requires_grad_(False)
    for module in modules.values():
        module.to(strategy.device)
    return modules, averages


def fit(module: nn.Module, loader: Any, teacher_shape: tuple[int, ...] | None) -> bool:
    """Whether the network takes the data's conditions: one that knows no classes leaves them out.

    Raises `UserError` where images or classes of the data are not those that the network, or the teacher's artefact,
    is made for.
    """
    shape, classes = getattr(loader, "image_shape", None), getattr(loader, "classes", None)
    if shape is None:
        return True
    if teacher_shape is not None and tuple(shape) != tuple(teacher_shape):
        raise UserError(
            f"the data has images of {_by(shape)} and the teacher makes images of {_by(teacher_shape)}; set "
            "data.source to data like those it was trained on."
        )
    config = nets.registry.described(getattr(module, "net", None))
    for key, actual in (("channels", shape[0]), ("image_size", shape[-1])):
        if config.get(key, actual) != actual:
            raise UserError(
                f"network.{key} is {config[key]} and the data has images of {_by(shape)}; set it to {actual}."
            )
    known = config.get("classes", classes)
    if known is not None and classes is not None and known != classes:
        raise UserError(
            f"the network knows {known} classes and the data has {classes}; set network.classes to {classes} "
            "(or null), or train on other data."
        )
    return known is not None


def guide(
    recipe: Recipe, method: methods.Method, strategy: Strategy, conditional: bool, known: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """Give the method what its teacher's guidance asks besides; where that is from: {role: {"path", "sha256"}}.

    conditional: whether networks are told a condition. known: the teacher's "image shape" and "number of classes",
    where anything says them. Raises `UserError` where guidance wants a condition and there is none, and for an artefact
    or a class that does not go with the teacher.
    """
    form, classes = teacher_guidance.of_config(method.config), known["number of classes"]
    if form is not None and form.acts and "uncond" in form.conditions and not conditional:
        given = method.config.guidance
        raise UserError(f"method.guidance is {given!r} and the teacher knows no classes; leave guidance out.")
    for label in recipe.negatives:
        if classes is not None and label >= classes:
            raise UserError(f"negatives holds {label}, it must hold classes of the teacher from 0 to {classes - 1}.")
    networks, origins = {}, {}
    for role, path in recipe.others.items():
        loaded = artefact.load(path)
        for what, own, wanted in (
            ("schedule", loaded.denoiser.schedule, method.schedule),
            ("image shape", loaded.image_shape, known["image shape"]),
            ("number of classes", loaded.classes, classes),
        ):
            if wanted is not None and own != wanted:
                raise UserError(
                    f"others.{role} is {path}, whose {what} {own!r} is not the teacher's {wanted!r}; name another."
                )
        module = loaded.denoiser.requires_grad_(False).eval().to(strategy.device)
        attempt_loaded(f"others.{role}", path, module, loaded.image_shape, loaded.classes)
        networks[role] = strategy.network(strategy.frozen(module))
        origins[role] = {"path": path, "sha256": loaded.digest}
    method.others, method.negatives = networks, recipe.negatives
    return origins


def attempt(module: Any, shape: tuple[int, ...]) -> None:
    """Ask a described network once, so that one that cannot run is refused before the loop. Raises `UserError`."""
    try:
        _asked(module, module, shape)
    except _FAILURES as error:
        raise UserError(f"network: it cannot take images of {_by(shape)} ({_said(error)}); mend its options.") from None


def attempt_loaded(role: str, path: str, module: Denoiser, shape: tuple[int, ...], classes: int | None) -> None:
    """Ask an artefact's network once, as methods will. Raises `UserError` where it is no denoiser of such images."""
    try:
        answer = _asked(module, module.raw, shape, classes)
        told = list(answer.shape[1:]) if isinstance(answer, torch.Tensor) else type(answer).__name__
        problem = "" if told == list(shape) else f"its network answers {told} to an image {list(shape)}"
    except _FAILURES as error:
        problem = _said(error)
    if problem:
        raise UserError(f"{role} is {path}, which is no plain denoiser ({problem}); name an artefact that is one.")


def _said(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _asked(module: nn.Module, call: Any, shape: Sequence[int], classes: int | None = None) -> Any:
    """What the module's `call` answers to two black images at the largest time."""
    device = next((parameter.device for parameter in module.parameters()), None)
    x = torch.zeros(2, *shape, device=device)
    cond = None if classes is None else torch.zeros(2, dtype=torch.int64, device=device)
    training, schedule = module.training, cast("Schedule", module.schedule)
    try:
        module.eval()
        with torch.no_grad():
            return call(x, torch.full((2,), float(schedule.t_max), device=device), cond)
    finally:
        module.train(training)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def place(
    recipe: Recipe, method: methods.Method, strategy: Strategy, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Engine], dict[str, Engine]]:
    """Give trained modules to engines, the others to their homes, and all of them to the method.

    Returns the engines by name, and the engine of each trained network.
    """
    train, specs = recipe.train, method.networks
    owned: dict[str, dict[str, nn.Module]] = {}
    for name, spec in specs.items():
        if spec.average is None and any(p.requires_grad for p in modules[name].parameters()):
            owned.setdefault(spec.engine or name, {})[name] = modules[name]
    micro_batch = recipe.data.batch_size // (strategy.world * train.accumulate)
    engines = {
        engine: strategy.engine(
            engine,
            networks,
            {name: specs[name].optimizer or train.optimizer for name in networks},
            clip=train.clip,
            warmup=train.warmup,
            micro_batch=micro_batch,
            accumulate=train.accumulate,
        )
        for engine, networks in owned.items()
    }
    engine_of = {name: engines[engine] for engine, networks in owned.items() for name in networks}
    for name, module in modules.items():
        engine = engine_of.get(name)
        home = module if engine is not None else strategy.frozen(module)
        if name != SAMPLING:
            setattr(method, name, strategy.network(home, engine.forward(name) if engine else None))
    return engines, engine_of


def sizes(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """The number of trained parameters of each network that has any; ask before anything is sharded."""
    counted = {name: sum(p.numel() for p in module.parameters() if p.requires_grad) for name, module in modules.items()}
    return {name: count for name, count in counted.items() if count}


def _scheduled(section: dict[str, Any]) -> dict[str, Any]:
    options = dict(section)
    return schedules.get(options.pop("name"), **options).to_dict()
