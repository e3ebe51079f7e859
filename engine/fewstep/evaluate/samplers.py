"""What the report calls each sampler, its colour, and the teacher that students are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TEACHER = "teacher"
REFERENCE_EVALUATIONS = 32  # of the teacher that students are compared with, in quality and in speed
_ACRONYMS = {"dmd": "DMD", "dmd2": "DMD2", "lcm": "LCM", "ctm": "CTM", "ladd": "LADD", "add": "ADD"}
_TEACHER_COLOUR, _GUIDED_COLOUR = "var(--c0)", "var(--c1)"
_STUDENT_COLOURS = tuple(f"var(--c{number})" for number in range(2, 8))
NEUTRAL = "var(--soft)"


@dataclass(frozen=True)
class Scored:
    """A set of images that was scored."""

    family: str
    guidance: float  # of a teacher's plan, or inside a student
    evaluations: int
    metrics: Mapping[str, Any]

    @property
    def is_teacher(self) -> bool:
        return self.family == TEACHER

    @property
    def name(self) -> str:
        return name(self.family, self.guidance if self.is_teacher else 1.0)


def scored(results: Mapping[str, Any]) -> list[Scored]:
    """Every scored set: the teacher's, by guidance and evaluations, then the students'."""
    return [*_scored(results)]


def _scored(results: Mapping[str, Any]) -> Iterator[Scored]:
    for guidance, group in (results.get("teacher") or {}).items():
        for evaluations, metrics in group.items():
            yield Scored(TEACHER, float(guidance), int(evaluations), metrics)
    for family, group in (results.get("students") or {}).items():
        for evaluations, metrics in group.items():
            yield Scored(family, float(metrics.get("guidance") or 1.0), int(evaluations), metrics)


def reference(results: Mapping[str, Any], guidance: float) -> Scored | None:
    """The teacher at 32 evaluations and that guidance, if it was scored."""
    wanted = (True, guidance, REFERENCE_EVALUATIONS)
    return next(
        (each for each in scored(results) if (each.is_teacher, each.guidance, each.evaluations) == wanted), None
    )


def name(family: str, guidance: float | None = None) -> str:
    """`dmd2` -> DMD2, `("teacher", 1.5)` -> teacher, guidance 1.5."""
    words = _ACRONYMS.get(family.lower(), family.replace("_", " "))
    return words if guidance in (None, 1.0) else f"{words}, guidance {guidance:g}"


def title(family: str, guidance: float | None = None) -> str:
    """As `name`, and a student is called one: `consistency` -> consistency student."""
    return name(family, guidance) if family in (TEACHER, "student") else f"{name(family)} student"


def at(words: str, evaluations: int, *, short: bool = False) -> str:
    """`teacher, guidance 1.5` at 32 -> teacher at 32 evaluations, guidance 1.5; short: without the word."""
    head, comma, rest = words.partition(",")
    return f"{head} at {evaluations if short else calls(evaluations)}{comma}{rest}"


def calls(evaluations: int) -> str:
    return f"{evaluations} evaluation" + ("s" if evaluations != 1 else "")


def read(text: str) -> tuple[str, float, int]:
    """`teacher@1.5/32` -> ("teacher", 1.5, 32), the parts of `fewstep.evaluate.suite.Name`; no number is 0."""
    whole, _, evaluations = text.partition("/")
    family, _, guidance = whole.partition("@")
    return family, float(guidance or 1.0), int(evaluations or 0)


def benchmarked(results: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The family that a row of latencies measured: the teacher, or the student that was exported or benchmarked."""
    if row["model"] == TEACHER:
        return TEACHER
    return str((results.get("export") or {}).get("student") or row.get("method") or row["model"])


def row_name(results: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The `name` of what a row of latencies measured; a student's guidance is inside."""
    family = benchmarked(results, row)
    return name(family, row.get("guidance") if family == TEACHER else None)


def colours(results: Mapping[str, Any]) -> dict[str, str]:
    """The colour of each sampler by its `name`, the same on the whole page."""
    families = [*dict.fromkeys([*(results.get("students") or {}), *(results.get("losses") or {})])]
    latency = (results.get("latency") or {}).get("rows") or []
    teachers = [row for row in latency if row["model"] == TEACHER]
    families += [benchmarked(results, row) for row in latency]
    students = [family for family in dict.fromkeys(families) if family != TEACHER]
    found = {name(TEACHER): _TEACHER_COLOUR}
    scales = [*map(float, results.get("teacher") or {}), *(row.get("guidance") for row in teachers)]
    found |= {name(TEACHER, scale): _GUIDED_COLOUR for scale in scales if scale not in (None, 1.0)}
    return found | {
        name(family): _STUDENT_COLOURS[number % len(_STUDENT_COLOURS)] for number, family in enumerate(students)
    }
