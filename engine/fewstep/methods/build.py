"""The modules of a method's networks, from their declarations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError, choose
from fewstep.methods.base import Method, NetworkSpec
from fewstep.nets import registry
from fewstep.nets.conditioning import SCALARS, Conditioned
from fewstep.nets.lora import Adapted, Lora
from fewstep.nets.read_out import read_out


def build(
    method: Method,
    teacher: Denoiser | None = None,
    network: Callable[[], nn.Module] | None = None,
    adapters: Mapping[str, Lora] | None = None,
) -> dict[str, nn.Module]:
    """{name: module} for every network of `method`, in the order of declaration; the teacher is not among them.

    `network` makes the bare network of the recipe with fresh weights, for start="random"; without it "random" means the
    teacher's architecture with fresh weights. A network of `adapters`, or whose declaration has one, is the teacher
    with low-rank corrections of its own, and shares its weights. Averages come without trained parameters.
    `method.schedule` and `method.prediction` must be set. Raises `UserError` where the declaration asks for what is not
    there.
    """
    built: dict[str, nn.Module] = {} if teacher is None else {"teacher": teacher}
    adapters = adapters or {}
    for name in adapters:
        if name not in method.networks:
            raise choose("network to adapt", name, method.networks)
    for name, spec in method.networks.items():
        lora = adapters.get(name, spec.adapter)
        module = _module(method, name, spec, built, network) if lora is None else _adapted(method, name, lora, built)
        module.requires_grad_(spec.average is None)
        module.train(spec.average is None or module.training)
        built[name] = module
    return {name: module for name, module in built.items() if name != "teacher"}


def _module(
    method: Method,
    name: str,
    spec: NetworkSpec,
    built: dict[str, nn.Module],
    network: Callable[[], nn.Module] | None,
) -> nn.Module:
    if spec.average is not None:
        if not isinstance(spec.start, str) or spec.start not in method.networks:
            raise choose(f"network that {name!r} averages", spec.start, method.networks)
        return copy.deepcopy(built[spec.start])
    if not isinstance(spec.start, str):
        net = spec.start(built)
    elif spec.start == "random":
        net = _fresh(name, built, network)
    elif spec.start in built:
        net = copy.deepcopy(_bare(built[spec.start]))
    elif spec.start == "teacher":
        raise UserError(
            f"network {name!r} starts from a teacher and the recipe names none; set `teacher:` to an artefact."
        )
    else:
        raise choose(f"start of network {name!r}", spec.start, ["teacher", "random", *built])
    return read_out(spec.read_out, _told(net, spec.inputs), method.schedule, method.prediction, spec.inputs)


def _adapted(method: Method, name: str, lora: Lora, built: dict[str, nn.Module]) -> nn.Module:
    spec = method.networks[name]
    if spec.start != "teacher" or spec.average is not None or "teacher" not in built:
        start = repr(spec.start) if isinstance(spec.start, str) else "what its method makes"
        raise UserError(
            f"network {name!r} starts from {start} and an adapter corrects a teacher; adapt a network that "
            "starts from the teacher."
        )
    base: nn.Module = _bare(built["teacher"])
    if _further(base, spec.inputs):
        raise UserError(
            f"network {name!r} takes the inputs {', '.join(spec.inputs)}, which the teacher does not, and an adapter "
            "adds no inputs; train it whole."
        )
    return read_out(spec.read_out, Adapted(base, lora), method.schedule, method.prediction, spec.inputs)


def _told(net: nn.Module, inputs: tuple[str, ...]) -> nn.Module:
    """`net`, taking the further scalars of `inputs` too where it can; it answers as before until it is trained."""
    further = _further(net, inputs)
    return net.with_inputs(*further) if further and isinstance(net, Conditioned) else net


def _further(net: nn.Module, inputs: tuple[str, ...]) -> list[str]:
    config = registry.described(net)
    return [name for name in inputs if name in SCALARS and name not in config.get("inputs", ())]


def _fresh(name: str, built: dict[str, nn.Module], network: Callable[[], nn.Module] | None) -> nn.Module:
    if network is not None:
        return network()
    config = registry.described(_bare(built["teacher"])) if "teacher" in built else {}
    if not config:
        raise UserError(
            f"network {name!r} starts from fresh weights and the recipe describes none; give a `network:` section."
        )
    return registry.build(config)


def _bare(module: nn.Module) -> nn.Module:
    inner = getattr(module, "net", module)
    return inner if isinstance(inner, nn.Module) else module
