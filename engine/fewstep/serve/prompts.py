"""From the words of a prompt to a class."""

from __future__ import annotations

import re

from fewstep.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILLERS = {"a", "an", "the", "of", "handwritten", "hand", "written", "digit", "number", "numeral", "figure"} | {
    "class",
    "picture",
    "image",
    "drawing",
    "scan",
    "draw",
    "please",
}


def parse(prompt: str, classes: int | None) -> int:
    """The class that a prompt names: "7", "seven", "a handwritten 7".

    Raises UserError where the prompt names no class, several, one out of range, or says something not understood.
    """
    if classes is None:
        raise UserError("this model knows no classes, so it takes no prompt; leave prompt out.")
    found: list[int] = []
    for word in re.findall(r"[^\W_]+|-\d+|\S", prompt.lower()):
        if word.isascii() and word.isdigit() and len(word) <= 9:
            found.append(int(word))
        elif word in WORDS[:classes]:
            found.append(WORDS.index(word))
        elif word not in FILLERS and word not in {".", ",", "!", "'", '"', "-"}:
            raise UserError(f"the prompt's word {word[:40]!r} is not understood; {_expected(classes)}.")
    if len(set(found)) != 1 or not 0 <= found[0] < classes:
        many = "names no class" if not found else "names several classes" if len(set(found)) > 1 else "is out of range"
        raise UserError(f"the prompt {prompt[:80]!r} {many}; {_expected(classes)}.")
    return found[0]


def _expected(classes: int) -> str:
    last = classes - 1
    word = f' or "a handwritten {WORDS[min(7, last)]}"' if last > 0 else ""
    return f'name one class from 0 to {last}, such as "{min(7, last)}"{word}'
