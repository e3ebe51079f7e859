"""How the GPU benchmarks measure: CUDA events around replays of a captured graph, candidates in turn, kernels counted
by the profiler. On "cpu", where the suite is only tried, the clock stands in for the events and nothing is captured.

A graph takes the host's part out of the time, so what is compared is the device's. Working sets near the L2 cache stay
in it, as they do in a sampler; the large cases are many times its size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

Call = Callable[[], object]
WATCHED = "watched"
# torch's operators that read a number on the host, or bring one from it (torch.tensor): on a GPU these wait
WAITING = ("aten::item", "aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::is_nonzero")


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def captured(call: Call, repeats: int) -> Call | None:
    """A replay of `repeats` calls in one CUDA graph; None where the call cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
    except RuntimeError as problem:
        print(f"not captured, timed with its launches: {str(problem).splitlines()[0][:120]}")
        torch.cuda.synchronize()
        return None
    return graph.replay


def seconds_of(replay: Call, device: str) -> float:
    """How long the device takes for one call of replay."""
    if device != "cuda":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def timed(
    candidates: dict[str, Call], device: str, rounds: int, target_seconds: float = 2e-3, capture: bool = True
) -> dict[str, list[float]]:
    """Seconds a call of every candidate in every round; candidates take turns within a round.

    Each measurement holds as many calls as take about target_seconds. capture: in one CUDA graph where that works.
    """
    runs: dict[str, tuple[Call, int]] = {}
    for name, call in candidates.items():
        for _ in range(2):
            call()
        synchronise(device)
        once = max(seconds_of(call, device), 1e-6)
        repeats = max(1, min(200, round(target_seconds / once)))
        graph = captured(call, repeats) if device == "cuda" and capture else None
        runs[name] = (graph if graph is not None else repeated(call, repeats), repeats)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, (run, repeats) in runs.items():
            found = seconds_of(run, device) / repeats
            if turn:  # the first round warms up
                seconds[name].append(found)
    return seconds


def repeated(call: Call, repeats: int) -> Call:
    def run() -> None:
        for _ in range(repeats):
            call()

    return run


class Trace:
    """What the profiler saw between the two ends of `watched`."""

    def __init__(self) -> None:
        self.device: list[str] = []  # kernels and copies on the device
        self.runtime: list[str] = []  # calls of the CUDA runtime and driver
        self.operators: list[str] = []  # torch's operators on the host

    @property
    def kernels(self) -> list[str]:
        return [name for name in self.device if not name.startswith(("Memcpy", "Memset"))]

    def waits(self) -> list[str]:
        """Whatever makes the host wait for the device: a synchronise, a copy that blocks, a number read by the host."""
        found = [name for name in self.runtime if "Synchronize" in name or name in ("cudaMemcpy", "cuMemcpy")]
        found += [
            name for name in self.runtime if name.startswith(("cuMemcpyDtoH", "cuMemcpyHtoD")) and "Async" not in name
        ]
        found += [name for name in self.device if name.startswith("Memcpy") and ("Pageable" in name or "DtoH" in name)]
        return found + [name for name in self.operators if name in WAITING]


@contextmanager
def watched(device: str) -> Iterator[Trace]:
    """Profiles its body; the trace is filled when it ends. The profiler's own synchronising lies outside."""
    trace = Trace()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    synchronise(device)
    with profile(activities=activities) as seen:
        with record_function(WATCHED):
            yield trace
        synchronise(device)
    events = list(seen.events() or [])
    marks = [event.time_range for event in events if event.name == WATCHED and event.device_type == DeviceType.CPU]
    begin, end = marks[0].start, marks[0].end
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if event.name != WATCHED:  # all device work was launched within: nothing else runs
                trace.device.append(event.name)
        elif begin <= event.time_range.start <= end and event.name != WATCHED:
            (trace.runtime if event.name.startswith(("cuda", "cu")) else trace.operators).append(event.name)


def launches(call: Call, device: str) -> int | None:
    """Kernels that one call launches; None on a CPU."""
    call()
    with watched(device) as trace:
        call()
    return len(trace.kernels) if device == "cuda" else None
