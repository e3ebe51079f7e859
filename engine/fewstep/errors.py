"""What a user did wrong, said in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints its one sentence and exits with code 2."""


def choose(what: str, given: object, choices: Iterable[object]) -> UserError:
    """The error for a name that is not among the choices, with the nearest one as a hint."""
    names = sorted(str(choice) for choice in choices)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"{what} {given!r} is not known{hint}; choose one of: {', '.join(names)}.")
