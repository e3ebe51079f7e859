"""What argparse lacks: mistakes in one sentence, help pages that show defaults and an example, numbers with a range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

import yaml

from fewstep.errors import UserError, choose

LARGEST_SEED = 2**31 - 1


class Help(argparse.RawDescriptionHelpFormatter):
    """The default behind each option that has one, unless its own words tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        untold = default is None or isinstance(default, bool) or default in ([], argparse.SUPPRESS)
        if untold or "(default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """Raises `UserError` for what it cannot read; its help page ends with `example`, a line that works."""

    commands: Collection[str] = ()

    def __init__(self, prog: str | None = None, description: str = "", example: str = "") -> None:
        self.example = example
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=Help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.rstrip('.')}; `{self.prog} --help` tells what it takes.")


def read(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; overrides (key=value) may stand on either side of options. Raises `UserError`."""
    if argv and not argv[0].startswith("-") and argv[0] not in parser.commands:
        raise choose("command", argv[0], parser.commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        strange = [
            word for word in rest if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")
        ]
        if strange:
            raise UserError(
                f"{strange[0]!r} is not understood; `fewstep {arguments.command} --help` tells what it takes."
            )
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type for whole numbers from `least` to `most`."""
    bounds = f"from {least}" if most is None else f"from {least} to {most}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return value

    return convert


def number(least: float = -math.inf, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A type for finite numbers from `least` (or above it) to `most`."""
    low = "" if least == -math.inf else f" {'above' if above else 'from'} {least:g}"
    bounds = low + ("" if most == math.inf else f" to {most:g}")

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number{bounds}")
        return value

    return convert


def guidance(text: str) -> float | dict[str, Any]:
    """A type for a scale of guidance, or a form of it: {name: interval, scale: 2.0}."""
    if text.lstrip().startswith("{"):
        try:
            form = yaml.safe_load(text)
        except yaml.YAMLError:
            form = None
        if not isinstance(form, dict):
            raise argparse.ArgumentTypeError(f"{text!r} is not a form of guidance such as {{name: cfg, scale: 2.0}}")
        return form
    return number(-100, 100)(text)
