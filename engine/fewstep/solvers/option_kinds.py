"""Whether what a user gives for an option is of the kind that the function which takes it declares."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fewstep.errors import UserError

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a name", type(None): "None"}


def check(what: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises UserError for the first option that is not what `function` declares; what is no number, name, flag or
    sequence of numbers there is not looked at.
    """
    declared = _declared(function)
    for option, value in given.items():
        kinds = declared.get(option, ())
        if kinds and not any(_is(value, kind) for kind in kinds):
            raise UserError(f"{option} of {what} is {value!r}; give {' or '.join(map(_words, kinds))}.")


@functools.cache
def _declared(function: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """The kinds each option may have; none for those that are not checked."""
    found = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        union = isinstance(parameter.annotation, types.UnionType)
        kinds = typing.get_args(parameter.annotation) if union else (parameter.annotation,)
        found[name] = kinds if all(kind in _WORDS or _item(kind) is not None for kind in kinds) else ()
    return found


def _item(kind: Any) -> Any:
    """What a sequence holds; None for what is not a sequence of something known."""
    if typing.get_origin(kind) is not Sequence:
        return None
    (item,) = typing.get_args(kind)
    return item if item in (int, float) or _item(item) is not None else None


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind in _WORDS:
        return isinstance(value, kind)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return several and all(_is(one, _item(kind)) for one in value)


def _words(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    item = _item(kind)
    return "a list of " + ("lists of numbers" if _item(item) is not None else f"{_WORDS[item].removeprefix('a ')}s")
