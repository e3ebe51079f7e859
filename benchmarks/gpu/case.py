"""One case of a GPU benchmark: its candidates are held to float64, then timed in turn with the floors of its bytes."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from streaming import nothing
from timing import launches, timed
from torch import Tensor

from fewstep_kernels import backends

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from measure import summary

Call = Callable[[], object]


class Wrong(Exception):
    """A value of ours beyond its bound."""


@dataclasses.dataclass
class Case:
    """candidates: those of ours first. truth: their results in float64. moved: bytes read and written at best."""

    name: str
    candidates: dict[str, Call]
    truth: Callable[[], Sequence[Tensor]]
    floors: dict[str, Call]
    read: int
    written: int
    working_set: int
    bound: float = 1e-5  # of the largest value
    gradients: bool = False  # whether the calls differentiate
    capture: bool = True  # in a CUDA graph, where a candidate allows it
    check: Callable[[Call], Sequence[Tensor]] | None = None  # a candidate's results, where its call does not give them
    least_percent: float | None = None  # of the floor: the target for ours
    most_empty: float | None = None  # times an empty kernel's time
    peak: Callable[[], float] | None = None  # peak memory over inputs and outputs
    device: str = "cuda"


def ways(operator: str, device: str) -> list[str]:
    """Our backends for an operator on a device, the one that serves it first."""
    serving = backends.backend(operator, device)
    here = [way for way in backends.OPERATORS[operator] if backends.runs_on(way, device)]
    return [serving, *(way for way in here if way != serving)]


@dataclasses.dataclass(frozen=True)
class By:
    """A call by one of our backends. It may not fail; asking for the backend anew costs the host some microseconds."""

    way: str
    call: Call

    def __call__(self) -> object:
        with backends.asking(self.way):
            return self.call()


def error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest, as a share of the truth's largest value; NaN where a result is not finite."""
    errors = [((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() for x, y in zip(found, truth)]
    return max(errors) if all(e == e for e in errors) else float("nan")


def checked(case: Case) -> dict[str, Call]:
    """The candidates whose values are right. A rival that raises or is wrong is named and left out.

    Raises Wrong for one of ours, and whatever one of ours raises.
    """
    truth = list(case.truth())
    kept = {}
    first = next(iter(case.candidates))
    for name, call in case.candidates.items():
        ours = name == first or isinstance(call, By)
        try:
            given = case.check(call) if case.check else call()
        except Exception as problem:  # whatever a rival raises on what it does not take
            if ours:
                raise
            print(f"{name} does not run here: {(str(problem).splitlines() or [''])[0][:140]}")
            continue
        found = [given] if isinstance(given, Tensor) else list(given)  # type: ignore[call-overload]
        wrong = error(found, truth)
        if wrong < case.bound:
            kept[name] = call
        elif ours:
            raise Wrong(f"{case.name}: {name} is wrong by {wrong:.2e} of the largest value: no times are printed.")
        else:
            print(f"{case.name}: {name} is wrong by {wrong:.2e} of the largest value: left out.")
    return kept


def measured(case: Case, rounds: int) -> dict:
    """The record of a case, as measure.publish takes it."""
    with torch.set_grad_enabled(case.gradients):
        candidates = checked(case)
        counts = {name: launches(call, case.device) for name, call in candidates.items()}
        empty = timed({"empty kernel": nothing(case.device)}, case.device, rounds)["empty kernel"]
        seconds = timed(candidates | case.floors, case.device, rounds, capture=case.capture)
    floor = min(case.floors, key=lambda name: statistics.median(seconds[name]))
    for name in case.floors:
        if name != floor:
            del seconds[name]
    ours = next(iter(candidates))
    results: dict[str, dict] = {**summary(seconds, ours, floor, case.read + case.written)}
    for name, count in counts.items():
        results[name]["launches"] = count
    of_empty = statistics.median(seconds[ours]) / statistics.median(empty)
    return {
        "case": case.name,
        "moved_bytes": case.read + case.written,
        "working_set_bytes": case.working_set,
        "read_to_write": f"{case.read / max(case.written, 1):.2f}:1" if case.written else "all read",
        "floor": floor,
        "empty_kernel_microseconds": round(statistics.median(empty) * 1e6, 3),
        "times_empty_kernel": round(of_empty, 3),
        "targets": list(targets(case, results[ours]["percent_of_floor"], of_empty)),
        "results": results,
    }


def targets(case: Case, percent: float, of_empty: float) -> list[dict]:
    """What the case is asked for, and what it does."""
    found = []
    if case.least_percent is not None:
        found.append({"what": "percent of the floor", "asked": f">= {case.least_percent}", "found": round(percent, 1)})
        found[-1]["met"] = percent >= case.least_percent
    if case.most_empty is not None:
        found.append({"what": "times an empty kernel", "asked": f"<= {case.most_empty}", "found": round(of_empty, 3)})
        found[-1]["met"] = of_empty <= case.most_empty
    return found
