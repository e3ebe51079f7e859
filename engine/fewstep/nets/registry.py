"""Networks by name: what a recipe's `network:` section and an artefact's JSON are rebuilt from."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fewstep.errors import UserError, choose

_CLASSES = {
    "mlp": "fewstep.nets.mlp:MLP",
    "dit": "fewstep.nets.dit:DiT",
    "unet": "fewstep.nets.unet:UNet",
    "genie": "fewstep.nets.genie:Genie",
}


def names() -> list[str]:
    """The names that `build` knows."""
    return sorted(_CLASSES)


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network `{"name": ..., **options}` describes, with fresh weights; its `.config` is that mapping again.

    Raises `UserError` for a missing or unknown name and for options the network does not take.
    """
    options = dict(config)
    name = options.pop("name", None)
    if name not in _CLASSES:
        raise choose("network name", name, names())
    module, attribute = _CLASSES[name].split(":")
    network_class = getattr(importlib.import_module(module), attribute)
    known = [p for p in inspect.signature(network_class).parameters if p not in ("args", "kwargs")]
    for option in options:
        if option not in known:
            raise choose(f"option of network {name!r}", option, known)
    try:
        return network_class(**options)
    except TypeError as error:
        raise UserError(f"network {name!r} cannot be built from {options}: {error}.") from error
