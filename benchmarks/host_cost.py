"""What one lincomb call and one stage of a sampler cost the host, beside the network and the arithmetic.

    OMP_NUM_THREADS=1 python benchmarks/host_cost.py

Writes benchmarks/results/host_cost.json and its table in docs/kernels.md: microseconds, median and first percentile,
candidates in turns. Tensors are so small that the arithmetic is a fraction of a microsecond. Calls: K = 5 inputs, M = 3
outputs, inference mode, out= given. The Triton figure is the host's part alone: everything in Python and in Triton's
launcher, over a driver library that does nothing (this needs no GPU, and says nothing about one). Stages:
`fewstep.sample` of linear plans at batch 1 with a network that answers from memory; the cost of a stage is the slope
between 4 and 20 steps less the network's own call, that of a run is what remains. Results are checked before they are
timed.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "host_cost.json"
ROUNDS, BLOCK = 40, 50  # every candidate in turn, this many calls at a time


def microseconds(candidates: dict[str, Callable[[], object]], block: int = BLOCK) -> dict[str, dict[str, float]]:
    """Median and first percentile of single calls."""
    times: dict[str, list[int]] = {name: [] for name in candidates}
    clock = time.perf_counter_ns
    for turn in range(ROUNDS):
        for name, call in candidates.items():
            for _ in range(block):
                start = clock()
                call()
                elapsed = clock() - start
                if turn:
                    times[name].append(elapsed)
    rows = {}
    for name, found in times.items():
        found.sort()
        least = found[len(found) // 100]
        rows[name] = {"median": round(statistics.median(found) / 1e3, 2), "first_percentile": round(least / 1e3, 2)}
    return rows


def calls() -> dict[str, dict[str, float]]:
    """One call of lincomb, of the same prepared, and of the field's ways to the same numbers; a model's average."""
    import torch

    from fewstep_kernels import ema_update, lincomb
    from fewstep_kernels.lincomb_prepared import PreparedLincomb, Share

    inputs = [torch.randn(2, 4, 8, 8) for _ in range(5)]
    out = [torch.empty(2, 4, 8, 8) for _ in range(3)]
    table = torch.randn(3, 5)
    numbers = table.tolist()
    prepared = PreparedLincomb([*inputs[:4], Share(0)], table, out, out[0])

    def eager() -> list[torch.Tensor]:
        return [sum(c * x for c, x in zip(row, inputs)) for row in numbers]

    @torch.compile(fullgraph=True)
    def compiled(inputs: list[torch.Tensor], out: list[torch.Tensor]) -> None:
        for target, row in zip(out, numbers):
            target.copy_(sum(c * x for c, x in zip(row, inputs)))

    parameters, averages = ([torch.randn(16, 16) for _ in range(60)] for _ in range(2))
    candidates = {
        "lincomb, out=, through ctypes": lambda: lincomb(inputs, table, out=out),
        "the same, prepared": lambda: prepared(inputs[4:]),
        "eager torch": eager,
        "torch.compile into the same buffers": lambda: compiled(inputs, out),
        "one torch.add, out=": lambda: torch.add(inputs[0], inputs[1], out=out[0]),
        "ema_update of 60 parameters [16, 16]": lambda: ema_update(averages, parameters, 0.99),
        "torch._foreach_lerp_ of the same": lambda: torch._foreach_lerp_(averages, parameters, 0.01),
    }
    with torch.inference_mode():
        truth = eager()
        for name in list(candidates)[:4]:
            for y in out:
                y.fill_(float("nan"))
            made = candidates[name]()
            for y, expected in zip(made if name == "eager torch" else out, truth):
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # five float32 products and their sum
        lerped = [average.lerp(parameter, 0.01) for average, parameter in zip(averages, parameters)]
        ema_update(averages, parameters, 0.99)
        torch.testing.assert_close(averages, lerped, rtol=1e-6, atol=1e-6)  # two float32 roundings
        return microseconds(candidates)


# What Triton calls of libcuda.so.1, doing nothing: launches are counted.
DRIVER = """
int launches;
int cuLaunchKernelEx(void) { return ++launches, 0; }
"""
DRIVER += "\n".join(
    f"int {name}(void) {{ return 0; }}"
    for name in (
        *(
            "cuCtxGetCurrent",
            "cuCtxSetCurrent",
            "cuCtxGetLimit",
            "cuCtxSetLimit",
            "cuDeviceGet",
            "cuDeviceGetAttribute",
        ),
        *("cuDevicePrimaryCtxRetain", "cuDriverGetVersion", "cuFuncGetAttribute", "cuFuncSetAttribute"),
        *("cuFuncSetCacheConfig", "cuGetErrorString", "cuModuleGetFunction", "cuModuleLoadData"),
        *("cuOccupancyMaxActiveClusters", "cuPointerGetAttribute", "cuTensorMapEncodeTiled"),
    )
)


def triton_call() -> dict[str, float]:
    """One call of lincomb through Triton and its own launcher, over a driver library that does nothing."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime import driver

    real = CudaUtils()

    class Utils:
        launch = staticmethod(getattr(real, "launch", len))  # before Triton 3.7 the launcher brings its own

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

        def load_binary(self, name: str, kernel: object, shared: int, device: int) -> tuple[int, ...]:
            return (0, 1, 64, 0, 1024)

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    class Driver:
        utils, launcher_cls = Utils(), CudaLauncher

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

    driver.set_active(Driver())
    from fewstep_kernels import backends, lincomb

    backends.choose = lambda operator, device: ("triton", "its driver does nothing")  # type: ignore[assignment]
    inputs = [torch.randn(2, 4, 8, 8) for _ in range(5)]
    out, table = [torch.empty(2, 4, 8, 8) for _ in range(3)], torch.randn(3, 5)
    launches = ctypes.c_int.in_dll(ctypes.CDLL("libcuda.so.1"), "launches")
    with torch.inference_mode():
        for made in (1, 2):
            lincomb(inputs, table, out=out)
            if launches.value != made:
                raise SystemExit("the call did not go through Triton: no times are printed.")
        return microseconds({"triton": lambda: lincomb(inputs, table, out=out)})["triton"]


def through_triton() -> dict[str, float] | None:
    """`triton_call` in a process whose libcuda.so.1 is DRIVER; None, and a line that says why, where it cannot run."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "driver.c").write_text(DRIVER)
        command = ["cc", "-shared", "-fPIC", "-o", f"{folder}/libcuda.so.1", f"{folder}/driver.c"]
        given = os.environ | {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder, "TRITON_CACHE_DIR": folder}
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            asked = [sys.executable, __file__, "triton"]
            done = subprocess.run(asked, env=given, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            print(f"no Triton figure: {(said or ['no message'])[-1]}", file=sys.stderr)
            return None
    return json.loads(done.stdout)


def stages() -> list[dict]:
    """Plans of 4 and 20 steps at batch 1, by `sample`, and by `execute`, which follows every register."""
    import torch

    from fewstep import solvers
    from fewstep.diffusion import Denoiser, schedules

    class FromMemory(torch.nn.Module):
        def __init__(self, batch: int) -> None:
            super().__init__()
            self.answer = torch.full((batch, 4, 8, 8), 0.1)

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object = None) -> torch.Tensor:
            return self.answer

        def null(self, cond: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(cond)

    schedule, start, seeds, cond = schedules.get("edm"), torch.randn(1, 4, 8, 8), torch.arange(1), torch.ones(1)
    cases: tuple[tuple[str, float | None], ...] = (
        ("ddim", None),
        ("dpmpp_2m", None),
        ("dpmpp_2m", 2.0),
        ("unipc", None),
        ("consistency", None),
    )

    def ways(name: str, scale: float | None) -> dict[str, Callable[[], object]]:
        batch = 1 if scale is None else 2
        denoiser, told = Denoiser(FromMemory(batch), schedule, "edm"), torch.ones(batch)
        found: dict[str, Callable[[], object]] = {"network": lambda: denoiser(start, told, as_network=True)}
        for steps in (4, 20):
            plan = solvers.plan(name, schedule, steps, prediction="edm", guidance=scale)
            given = {"cond": None if scale is None else cond, "seeds": seeds}
            found[f"sample {steps}"] = lambda p=plan, g=given: solvers.sample(denoiser, p, start, **g)
            found[f"execute {steps}"] = lambda p=plan, g=given: solvers.execute(p, denoiser, start, **g).x
        return found

    rows = []
    for name, scale in cases:
        candidates = ways(name, scale)
        with torch.inference_mode():
            for steps in (4, 20):
                if not torch.equal(candidates[f"sample {steps}"](), candidates[f"execute {steps}"]()):
                    raise SystemExit(f"{name}: sample and execute differ: no times are printed.")
            found = microseconds(candidates, 10)
        row: dict = {"solver": name, "guidance": scale, "network_call": found["network"]["median"]}
        for way in ("sample", "execute"):
            short, long = (found[f"{way} {steps}"]["median"] for steps in (4, 20))
            stage = (long - short) / 16
            row[way] = {
                "stage_beyond_network": round(stage - row["network_call"], 2),
                "run_beyond_stages": round(short - 4 * stage, 2),
                "run_of_4_steps": short,
            }
        rows.append(row)
    return rows


def main() -> None:
    import torch

    from fewstep.doctor import machine, versions

    torch.set_num_threads(1)
    triton = through_triton()
    found = calls()
    if triton is not None:
        found["lincomb, out=, through Triton, whose driver does nothing"] = triton
    rows = stages()
    for name, row in found.items():
        print(f"{name:60} median {row['median']:8.2f} us, first percentile {row['first_percentile']:8.2f} us")
    for row in rows:
        print(row)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"benchmark": "host_cost", "date": date, "machine": machine(), "versions": versions()}
    report |= {"unit": "microseconds", "targets": {"ctypes": 10, "Triton": 25, "stage_beyond_network": 30}}
    RESULTS.write_text(json.dumps(report | {"calls": found, "stages": rows}, indent=1) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, str(Path(__file__).parent / "kernels" / "page.py")], check=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["triton"]:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(triton_call()))
    else:
        main()
