"""What keeping freed memory brings on a CPU: the digits U-Net with and without `fewstep.host.prepare`, in turns.

    python benchmarks/host.py

Writes benchmarks/results/host.json. Each run is a fresh process with one thread; figures are CPU milliseconds of one
call (user and system time), which a busy neighbour disturbs least.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "host.json"
CALLS, ROUNDS, BATCHES = 10, 5, (250, 1000)


def measure(batch: int, prepared: bool) -> float:
    """CPU milliseconds of one call, in this process."""
    if prepared:
        from fewstep import host

        host.prepare()
    import resource

    import torch

    from fewstep import config, nets
    from fewstep.demo import recipe_path

    torch.set_num_threads(1)
    net = nets.build(config.load(recipe_path("digits_teacher.yaml"), []).network)
    x, t, label = torch.randn(batch, 1, 8, 8), torch.zeros(batch), torch.arange(batch) % 10

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    with torch.inference_mode():
        for _ in range(3):
            net(x, t, label)
        begun = spent()
        for _ in range(CALLS):
            net(x, t, label)
    return (spent() - begun) / CALLS * 1e3


def main() -> None:
    from fewstep.doctor import machine, versions

    rows = []
    for batch in BATCHES:
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for prepared in (False, True):
                command = [sys.executable, __file__, str(batch), str(int(prepared))]
                times[prepared].append(
                    float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                )
        plain, kept = statistics.median(times[False]), statistics.median(times[True])
        rows.append({"batch": batch, "plain_cpu_ms": plain, "prepared_cpu_ms": kept, "times_faster": plain / kept})
        print(rows[-1])
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"benchmark": "host", "date": date, "machine": machine(), "versions": versions(), "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(int(sys.argv[1]), sys.argv[2] == "1"))
    else:
        main()
