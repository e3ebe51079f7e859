"""The normalisation pairs in C++ (csrc/cpu/norm.cpp)."""

from __future__ import annotations

import math
import struct

from torch import Tensor

from . import native
from .normalisation_formulas import Form, Parameters

_JOB = struct.Struct(
    "7qd33q"
)  # fewstep_normalisation: sizes and options; eps; nine addresses and dtypes; eight tensors
_ABSENT = (0, 0, 0)


def _call(
    name: str,
    form: Form,
    x: Tensor,
    out: Tensor,
    parameters: tuple[Tensor | None, ...],
    moved: Tensor | None,
    results: tuple[Tensor | None, ...],
) -> None:
    """parameters: a Parameters and, where given, the tangents of a, b and input_shift; results: mean, rstd, da, db."""
    code = native.DTYPES[x.dtype]
    numbers = [x.data_ptr(), code, 0, 0, out.data_ptr()]
    if moved is not None:
        numbers[2:4] = moved.data_ptr(), native.DTYPES[moved.dtype]
    numbers += [0 if result is None else result.data_ptr() for result in results]
    kept = []  # copies must outlive the call
    for p in parameters:
        if p is None:
            numbers += _ABSENT
            continue
        if p.stride(-1) != 1:
            p = p.contiguous()
            kept.append(p)
        numbers += p.data_ptr(), p.stride(0) if p.ndim == 2 and p.shape[0] > 1 else 0, native.DTYPES[p.dtype]
    numbers += _ABSENT * (8 - len(parameters))
    shape, groups = x.shape, form.groups
    channels, places = (shape[1], shape[2:]) if groups else (shape[-1], shape[1:-1])
    last, centred = bool(groups) and not x.is_contiguous(), form.centred
    job = _JOB.pack(shape[0], channels, math.prod(places), groups, last, centred, form.silu, form.eps, *numbers)
    native.call(name, x, job)


def forward(form: Form, x: Tensor, given: Parameters, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    _call("normalise", form, x, y, given, None, (mean, rstd, None, None))


def backward(
    form: Form,
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    given: Parameters,
    dx: Tensor,
    da: Tensor,
    db: Tensor,
) -> None:
    _call("normalise_backward", form, x, dx, given, gradient, (mean, rstd, da, db))


def tangent(
    form: Form,
    x: Tensor,
    tx: Tensor,
    given: Parameters,
    ta: Tensor | None,
    tb: Tensor | None,
    tadded: Tensor | None,
    ty: Tensor,
) -> None:
    _call("normalise_tangent", form, x, ty, (*given, ta, tb, tadded), tx, (None,) * 4)
