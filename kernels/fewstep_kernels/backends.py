"""Which backend serves an operator on a device, and why.

The device decides: C++ on the CPU; Triton on a GPU, CUDA C++ for many tensors at once; plain torch where those are
missing. `FEWSTEP_KERNELS=reference|cpu|triton|cuda`, read once, asks for one backend wherever it has the operator and
the device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch

from . import native

CHOICES = ("reference", "cpu", "triton", "cuda")
OPERATORS: dict[str, tuple[str, ...]] = {
    "lincomb": ("cpu", "triton", "cuda"),
    "normal": ("cpu", "triton", "cuda"),
    "uniform": ("cpu", "triton", "cuda"),
    "gram": ("cpu", "triton"),
    "inner_products": ("cpu", "triton"),
    "distance": ("cpu", "triton"),
    "threshold": ("cpu", "triton"),
    "ema_update": ("cpu", "cuda"),
    "multi_tensor_l2norm": ("cpu", "cuda"),
    "adamw_ema_step": ("cpu", "cuda"),
    "attention_jvp": ("cpu", "triton"),
    "group_norm_silu": ("cpu", "triton"),
    "layer_norm_modulate": ("cpu", "triton"),
    "rms_norm_modulate": ("cpu", "triton"),
}
_asked: list[str] = []  # by `asking`, the innermost last
_ON_GPU = dict.fromkeys(("ema_update", "multi_tensor_l2norm", "adamw_ema_step"), ("cuda",))


@functools.cache
def override() -> str | None:
    """The backend FEWSTEP_KERNELS asks for. Raises ValueError on another word."""
    if _asked:
        return _asked[-1]
    given = os.environ.get("FEWSTEP_KERNELS") or None
    if given is not None and given not in CHOICES:
        raise ValueError(f"FEWSTEP_KERNELS is {given!r}; it must be one of {', '.join(CHOICES)}, or unset.")
    return given


@contextlib.contextmanager
def asking(name: str) -> Iterator[None]:
    """Inside, as if FEWSTEP_KERNELS were `name`, in every thread: for tests and measurements, not for use."""
    _asked.append(name)
    _forget()
    try:
        yield
    finally:
        _asked.pop()
        _forget()


def _forget() -> None:
    override.cache_clear()
    choose.cache_clear()


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing(name: str) -> str:
    """Why a backend cannot run here at all; empty when it can."""
    if name == "triton":
        return "" if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"
    return native.cpu().missing if name == "cpu" else native.cuda().missing


def _devices(name: str) -> tuple[str, ...]:
    if name == "triton":
        return ("cuda", "cpu") if interpreting() else ("cuda",)
    return (name,)


@functools.cache
def choose(operator: str, device: str) -> tuple[str, str]:
    """(backend, why) for an operator of OPERATORS on a device type.

    Raises RuntimeError when FEWSTEP_KERNELS asks for a backend that cannot run here.
    """
    asked = override()
    if asked == "reference":
        return asked, f"FEWSTEP_KERNELS={asked}"
    note = ""
    if asked is not None:
        if _missing(asked):
            raise RuntimeError(f"FEWSTEP_KERNELS={asked} cannot be met: {_missing(asked)}.")
        if asked in OPERATORS[operator] and device in _devices(asked):
            return asked, f"FEWSTEP_KERNELS={asked}"
        note = f" (FEWSTEP_KERNELS={asked} does not serve it)"
    candidates = {"cpu": ("cpu",), "cuda": _ON_GPU.get(operator, ("triton", "cuda"))}.get(device, ())
    reasons = [] if candidates else [f"no fast backend for {device}"]
    for name in candidates:
        missing = _missing(name) if name in OPERATORS[operator] else f"{operator} has no {name} backend"
        if not missing:
            what = {"cpu": f"C++, {native.cpu().instructions}", "triton": "Triton", "cuda": "CUDA C++"}[name]
            return name, what + note
        reasons.append(missing)
    return "reference", "; ".join(reasons) + note


def runs_on(name: str, device: str) -> bool:
    """Whether a backend other than the reference can run on a device type here."""
    return device in _devices(name) and not _missing(name)


def backend(operator: str, device: torch.device | str) -> str:
    """The backend that serves an operator on a device: "reference", "cpu", "triton" or "cuda".

    Raises ValueError for an unknown operator.
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; choose one of {', '.join(OPERATORS)}.")
    return choose(operator, torch.device(device).type)[0]


def report() -> list[dict[str, str]]:
    """One line per operator and device here: operator, device, backend, why."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines = []
    for operator in OPERATORS:
        for device in devices:
            try:
                name, why = choose(operator, device)
            except RuntimeError as error:
                name, why = "none", str(error)
            lines.append({"operator": operator, "device": device, "backend": name, "why": why})
    return lines
