"""Rows of words as aligned columns that fit the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

LEAST_TEXT = 24  # characters; where fewer are left beside the other columns, the last one goes below them


def width() -> int:
    """Of the terminal, as COLUMNS or the terminal says; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def aligned(rows: Sequence[Sequence[str]], indent: int = 2, most: int | None = None) -> list[str]:
    """One row after another, each column as wide as its longest word, the last one wrapped to `most` characters."""
    most = most or width()
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    start = indent + sum(size + 2 for size in sizes)
    beside = most - start >= LEAST_TEXT
    lines = []
    for *heads, text in rows:
        first = " " * indent + "".join(f"{head:{size}}  " for head, size in zip(heads, sizes))
        hanging = " " * (start if beside else indent + 2)
        if not beside:
            lines.append(first.rstrip())
            first = hanging
        shown = textwrap.wrap(
            text,
            most,
            initial_indent=first,
            subsequent_indent=hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += shown or [first.rstrip()]
    return lines
