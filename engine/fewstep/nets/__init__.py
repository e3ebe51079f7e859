"""Small reference networks, and `Network`: the one way a method holds a network."""

from __future__ import annotations

from fewstep.nets.network import Network, same_masks
from fewstep.nets.registry import build, names, register

__all__ = ["Network", "build", "names", "register", "same_masks"]
