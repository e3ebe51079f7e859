"""Searched grids as JSON: the grids by number of steps, and what they were searched for.

    {"format": "fewstep.searched-grid/1", "schedule": {...}, "searched": {...}, "nodes": [...], "costs": [[...], ...],
     "grids": {"4": {"times": [t_0, .., t_4], "cost": c}, ...}}

"costs" holds, for each node but the last, what a step to every later node costs (null: never), so that other numbers of
steps are found without asking the teacher again. "searched" is what decided them: the teacher's digest and the options.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.diffusion import schedules
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError

FORMAT = "fewstep.searched-grid/1"
Times = dict[int, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class SearchedGrid:
    """grids: steps -> N + 1 times; prices: steps -> cost; costs: [T, ...] rows above the diagonal."""

    schedule: Schedule
    searched: dict[str, Any]
    nodes: tuple[float, ...]
    costs: tuple[tuple[float, ...], ...]
    grids: Times
    prices: dict[int, float]
    origin: str = "a searched grid"

    def for_schedule(self, schedule: Schedule) -> Times:
        """The grids, if they were searched on this schedule."""
        if schedule != self.schedule:
            raise UserError(
                f"{self.origin} was searched on schedule {self.schedule!r} and not on {schedule!r}; search it again."
            )
        return self.grids

    def matrix(self) -> list[list[float]]:
        """[T + 1, T + 1], infinite on and below the diagonal."""
        size = len(self.nodes)
        return [[math.inf] * (size - len(row)) + list(row) for row in (*self.costs, ())]

    def to_json(self) -> str:
        grids = {str(n): {"times": list(times), "cost": self.prices[n]} for n, times in sorted(self.grids.items())}
        return json.dumps(
            {
                "format": FORMAT,
                "schedule": self.schedule.to_dict(),
                "searched": self.searched,
                "grids": grids,
                "nodes": list(self.nodes),
                "costs": [[None if math.isinf(value) else value for value in row] for row in self.costs],
            }
        )


def read(path: str | os.PathLike[str]) -> SearchedGrid:
    """The searched grid in a file; UserError, one sentence, for anything else."""
    where = f"{os.fspath(path)!r}"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the searched grid {where} ({error.strerror}); make it with `fewstep search-grid`."
        ) from None
    except ValueError:
        raise UserError(f"{where} is not JSON; give a file that `fewstep search-grid` wrote.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{where} is not of format {FORMAT!r}; give a file that `fewstep search-grid` wrote.")
    try:
        schedule = schedules.from_dict(data["schedule"])
        nodes = tuple(_number(value) for value in data["nodes"])
        costs = tuple(tuple(math.inf if v is None else _number(v) for v in row) for row in data["costs"])
        if [len(row) for row in costs] != list(range(len(nodes) - 1, 0, -1)):
            raise ValueError("its costs do not fit its nodes")
        grids = checked({steps: entry["times"] for steps, entry in data["grids"].items()}, schedule)
        prices = {int(steps): _number(entry["cost"]) for steps, entry in data["grids"].items()}
        return SearchedGrid(schedule, dict(data["searched"]), nodes, costs, grids, prices, where)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise UserError(f"{where} is not a valid searched grid ({reason}); search it again.") from None


def checked(grids: Any, schedule: Schedule) -> Times:
    """A mapping from steps to times whose every grid falls, has one time more than steps and lies in the schedule."""
    if not isinstance(grids, Mapping) or not grids:
        raise UserError(f"a searched grid maps numbers of steps to their times; {grids!r} does not.")
    found: Times = {}
    for steps, times in grids.items():
        if not str(steps).isdecimal() or not isinstance(times, Sequence) or len(times) != int(steps) + 1:
            raise UserError(f"a searched grid of {steps!r} steps needs one time more than steps; got {times!r}.")
        values = tuple(_number(value) for value in times)
        inside = schedule.t_clean <= values[-1] and values[0] <= schedule.last_time
        if not inside or any(after >= before for before, after in itertools.pairwise(values)):
            raise UserError(
                f"the searched grid of {steps} steps does not fall from at most {schedule.last_time:g} to at least "
                f"{schedule.t_clean:g}: {list(values)!r}; search it again."
            )
        found[int(steps)] = values
    return found


def write(grid: SearchedGrid, path: str | os.PathLike[str]) -> None:
    """Write beside `path` and rename, so that what is there is whole at any moment. UserError where it cannot be."""
    target = Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as stream:
            temporary = stream.name
            stream.write(grid.to_json() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r} ({error.strerror}); give a writable place.") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def writable(path: str | os.PathLike[str]) -> None:
    """Raises UserError where `write` could not write, so that a long search is not lost at its end."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r} ({error.strerror}); give a writable place.") from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"a searched grid holds finite numbers, and {value!r} is none.")
    return float(value)
