"""Networks by name: what a recipe's `network:` section and an artefact's JSON are rebuilt from."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from fewstep.errors import UserError, choose

N = TypeVar("N", bound=type[nn.Module])
_CLASSES: dict[str, str | type[nn.Module]] = {
    "mlp": "fewstep.nets.mlp:MLP",
    "dit": "fewstep.nets.dit:DiT",
    "unet": "fewstep.nets.unet:UNet",
    "genie": "fewstep.nets.genie:Genie",
}


def register(name: str) -> Callable[[N], N]:
    """Class decorator: makes a network of your own known by `name`, to `build` and so to artefacts, in this process.

    Its options are the arguments of its `__init__`; they are stored as JSON. A `config` of its own stays its own.
    Raises ValueError where the name is taken.
    """

    def add(network: N) -> N:
        known = _CLASSES.get(name)
        own = f"{network.__module__}:{network.__qualname__}"
        known = known if known is None or isinstance(known, str) else f"{known.__module__}:{known.__qualname__}"
        if known not in (None, own):
            raise ValueError(f"two networks are called {name!r}: {known} and {own}.")
        _CLASSES[name] = network
        return network

    return add


def is_registered(name: str) -> bool:
    """Whether `register` made the name known; what such a network's options mean, only its author knows."""
    return isinstance(_CLASSES.get(name), type)


def names() -> list[str]:
    """The names that `build` knows."""
    return sorted(_CLASSES)


def described(net: Any) -> dict[str, Any]:
    """The config that `build` makes the network of again, which of a registered class `build` itself keeps beside any
    `config` that the class has; empty where there is none."""
    for attribute in ("fewstep_config", "config"):
        config = getattr(net, attribute, None)
        if isinstance(config, Mapping) and config.get("name") in _CLASSES:
            return dict(config)
    return {}


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network `{"name": ..., **options}` describes, with fresh weights; what `described` tells builds it again.

    Raises `UserError` for a missing or unknown name, for options the network does not take, and for what the `__init__`
    of a registered class raises.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"a network is described by its name and options and got {config!r}; give a mapping of them.")
    options = dict(config)
    name = options.pop("name", None)
    if name not in _CLASSES:
        raise choose("network name", name, names())
    network_class: Any = _CLASSES[name]
    if isinstance(network_class, str):
        module, attribute = network_class.split(":")
        network_class = getattr(importlib.import_module(module), attribute)
    known = [p for p in inspect.signature(network_class).parameters if p not in ("args", "kwargs")]
    for option in options:
        if option not in known:
            raise choose(f"option of network {name!r}", option, known)
    try:
        net = network_class(**options)
    except TypeError as error:
        raise UserError(f"network {name!r} cannot be built from {options}: {_first_line(error)}.") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if not is_registered(name):
            raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"network {name!r} cannot be built from {options} ({reason}); mend its options.") from error
    if is_registered(name):
        net.fewstep_config = dict(config)
    return net


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
