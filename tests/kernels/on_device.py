"""Where the tests that want a GPU run: on it, or, to try the tests themselves, where FEWSTEP_TEST_DEVICE says (cpu)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fewstep_kernels import backends

DEVICE = os.environ.get("FEWSTEP_TEST_DEVICE", "cuda")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAST = ("triton", "cuda") if DEVICE == "cuda" else ("cpu", *(["triton"] if backends.interpreting() else []))


def every(*operators: str, reference: bool = True):
    """Parametrises a test over (operator, backend), the reference on the device among them unless it is left out."""
    ways = ("reference", *FAST) if reference else FAST
    pairs = [(name, way) for name in operators for way in ways if way in _ways(name)]
    return pytest.mark.parametrize(("operator", "way"), pairs, ids=[f"{name}-{way}" for name, way in pairs])


def _ways(operator: str) -> tuple[str, ...]:
    return ("reference", *backends.OPERATORS[operator])


def here(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the device, in the same memory layout."""
    return [x.to(DEVICE) for x in tensors]


def host(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.cpu() for x in tensors]
