"""Which TensorRT is here: NVIDIA TensorRT (`tensorrt`) or TensorRT-RTX (`tensorrt_rtx_bindings`), same Python API."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

from fewstep.errors import UserError

NAMES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_bindings"}


@functools.cache
def load() -> tuple[str, Any]:
    """(name, module). With a GPU TensorRT comes first; without one TensorRT-RTX, which builds ahead of time.

    Raises UserError where neither is installed or works.
    """
    order = ["tensorrt", "tensorrt_rtx"] if torch.cuda.is_available() else ["tensorrt_rtx", "tensorrt"]
    for name in order:
        module = _try_import(NAMES[name])
        if module is not None:
            return name, module
    raise UserError(
        "TensorRT is not installed: pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings, "
        "or install NVIDIA TensorRT's tensorrt package."
    )


def _try_import(name: str) -> ModuleType | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def builds_ahead_of_time(module: Any) -> bool:
    """Whether engines for named GPU architectures can be built on a machine that has none of them."""
    return hasattr(module, "ComputeCapability") and hasattr(module.IBuilderConfig, "set_compute_capability")
