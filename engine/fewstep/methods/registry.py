"""Methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fewstep.errors import choose
from fewstep.methods.base import Method

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Class decorator: makes a method known by `name`."""

    def add(method: M) -> M:
        if name in _METHODS and _METHODS[name].__qualname__ != method.__qualname__:
            raise ValueError(f"two methods are called {name!r}: {_METHODS[name].__module__} and {method.__module__}.")
        method.name = name
        _METHODS[name] = method
        return method

    return add


def names() -> list[str]:
    """The registered methods."""
    return sorted(_METHODS)


def get(name: str) -> type[Method]:
    """The method class of that name; `UserError` with the choices for an unknown one."""
    if name not in _METHODS:
        raise choose("method", name, names())
    return _METHODS[name]
