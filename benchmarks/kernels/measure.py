"""How the operator benchmarks measure: interleaved rounds, medians, a copy of the same bytes as floor, one JSON and one
plot per script.

Candidates take turns within a round, so a busy neighbour slows all of them alike; ratios are medians of per-round
ratios.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import page
import plot
import torch

from fewstep import doctor

RESULTS = Path(__file__).parents[1] / "results"


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, each timed right after an untimed call of its own.

    So none inherits another's caches: with working sets near the last-level cache, whoever ran second on the same
    tensors would look up to 1.5 times faster.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + rounds):
        for name, call in candidates.items():
            call()
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def copy_of(read_bytes: int, written_bytes: int) -> Callable[[], object]:
    """A copy that moves as many bytes: half of them read, half written, in float32."""
    count = (read_bytes + written_bytes) // 8
    source, target = torch.randn(count), torch.zeros(count)
    return lambda: target.copy_(source)


def read_of(read_bytes: int) -> Callable[[], object]:
    """A sum of as many bytes of float32."""
    source = torch.randn(read_bytes // 4)
    return lambda: source.sum()


def added_in_place(read_bytes: int, written_bytes: int) -> Callable[[], object]:
    """`target += source` over as many bytes: two thirds read, a third written where it was read, in float32."""
    count = (read_bytes + written_bytes) // 12
    source, target = torch.zeros(count), torch.zeros(count)
    return lambda: target.add_(source)


def summary(seconds: dict[str, list[float]], ours: str, floor: str, moved_bytes: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, GB/s of the operator's bytes, medians of same-round ratios to the floor and to ours."""
    rows = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        of_floor = statistics.median(t / f for t, f in zip(times, seconds[floor]))
        rows[name] = {
            "milliseconds": round(median * 1e3, 5),
            "gigabytes_per_second": round(moved_bytes / median / 1e9, 2),
            "times_floor": round(of_floor, 3),
            "percent_of_floor": round(100 / of_floor, 1),
            "times_ours": round(statistics.median(t / o for t, o in zip(times, seconds[ours])), 3),
        }
    return rows


def asked(results: dict[str, dict[str, float]], **least: float) -> list[dict]:
    """What a case must reach: a candidate's time over ours (the first result), at least. least: by the start of the
    candidate's name, with _ for a space."""
    found = []
    for start, factor in least.items():
        for name, row in [*results.items()][1:]:
            if name.startswith(start.replace("_", " ")):
                taken = row["times_ours"]
                entry = {"what": f"time of {name} over ours", "asked": f">= {factor:g}", "found": taken}
                found.append(entry | {"met": taken >= factor})
    return found


def working_set(case: dict) -> int:
    """Bytes of all tensors a case touches: what the script says, else what it moves, where nothing moves twice."""
    return case.get("working_set_bytes", case["moved_bytes"])


def described(case: dict) -> str:
    """What is moved, before the numbers."""
    mebibytes = [size / 2**20 for size in (case["moved_bytes"], working_set(case))]
    return (
        f"{case['case']}: {mebibytes[0]:.1f} MiB moved, read:write {case['read_to_write']}, "
        f"working set {mebibytes[1]:.1f} MiB"
    )


def publish(name: str, cases: list[dict], device: str = "cpu", folder: Path = RESULTS) -> None:
    """Print a table of the cases; write them to <folder>/<name>.json with machine and versions, and their plot.

    What is written to benchmarks/results/ also goes into the tables of docs/kernels.md.
    """
    for case in cases:
        print(f"\n{described(case)}")
        for row, values in case["results"].items():
            columns = "".join(f"{key.replace('_', ' ')} {value!s:<10}" for key, value in values.items())
            print(f"  {row:36}{columns}")
        for target in case.get("targets", ()) if device == "cpu" else ():
            print(
                f"  {target['what']}: asked {target['asked']}, {target['found']} {'met' if target['met'] else 'MISSED'}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": doctor.machine(),
        "versions": doctor.versions(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "cases": cases,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".svg").write_text(plot.draw(record), encoding="utf-8")
    if folder == RESULTS and device == "cpu":
        page.rewrite()
    print(f"\nwritten to {path} and {path.with_suffix('.svg').name}")
