"""What this machine has and which backend serves each operator: the first thing to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import textwrap
import time
from collections.abc import Sequence

import torch

import fewstep_kernels
from fewstep import columns
from fewstep_kernels.self_test import ALLOWED, Check

# distribution name -> (what it is for, how to install it)
OPTIONAL = {
    "onnx": ("ONNX export", "pip install 'fewstep[export]'"),
    "onnxscript": ("ONNX export", "pip install 'fewstep[export]'"),
    "onnxruntime": ("running exported students", "pip install 'fewstep[export]'"),
    "tensorrt": ("TensorRT engines", "see NVIDIA's TensorRT installation guide"),
    "tensorrt-rtx-cu13-bindings": ("TensorRT-RTX engines", "pip install 'fewstep[export]'"),
    "fastapi": ("the server", "pip install 'fewstep[serve]'"),
    "deepspeed": ("ZeRO sharding", "pip install 'fewstep[deepspeed]'"),
    "nvidia-dali-cuda130": ("DALI data pipelines", "pip install 'fewstep[dali]'"),
    "triton": ("GPU kernels", "pip install 'fewstep[triton]'"),
    "tensorboard": ("training logs", "pip install 'fewstep[log]'"),
    "diffusers": ("SDXL-class teachers", "pip install diffusers"),
    "xformers": ("attention", "pip install xformers"),
}


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    """Processor, cores, memory in GiB, accelerator: what a measurement must be published with."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "accelerator": accelerator,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python, of fewstep and of everything installed that shapes a result."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("fewstep", "numpy", *OPTIONAL):
        version = version_of(name)
        if version:
            found[name] = version
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or "unknown"


def self_test() -> tuple[str, list[str]]:
    """(what `fewstep doctor` prints of the operators' self-test, one sentence for each check that failed)."""
    start = time.perf_counter()
    checks = fewstep_kernels.self_test()
    seconds = time.perf_counter() - start
    rows: dict[str, list[Check]] = {}
    for check in checks:
        rows.setdefault(check.operator, []).append(check)
    several = len({check.device for check in checks}) > 1
    title = f"self-test in {seconds:.1f} s: largest error against float64, of the largest value ({ALLOWED:.0e} allowed)"
    lines = textwrap.wrap(title, columns.width())
    cells = {
        operator: ", ".join(
            f"{check.backend}{' on ' + check.device if several else ''} "
            + ("FAILED" if check.problem else f"{check.error:.1e}")
            for check in found
        )
        for operator, found in rows.items()
    }
    lines += columns.aligned(list(cells.items()))
    return "\n".join(lines), [check.problem for check in checks if check.problem]


def report() -> str:
    """The page `fewstep doctor` prints before the self-test, as wide as the terminal."""
    about = [(key, str(value)) for key, value in machine().items()]
    tools = [(tool, shutil.which(tool) or "not found") for tool in ("g++", "nvcc")]
    operators = [(row["operator"], row["backend"], row["why"]) for row in fewstep_kernels.report()]
    missing = [(name, "{}: {}".format(*OPTIONAL[name])) for name in OPTIONAL if version_of(name) is None]
    sections: list[tuple[str, Sequence[Sequence[str]]]] = [
        ("machine", [*about, ("threads", str(torch.get_num_threads()))]),
        ("versions", list(versions().items())),
        ("compilers", tools),
        ("operators (override with FEWSTEP_KERNELS=reference|cpu|triton|cuda)", operators),
        ("optional packages that are not installed", missing),
    ]
    return "\n".join("\n".join([title, *columns.aligned(rows)]) for title, rows in sections if rows)
