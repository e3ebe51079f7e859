"""The normalisation pairs in C++ (csrc/cpu/norm.cpp)."""

from __future__ import annotations

import ctypes
import math

from torch import Tensor

from . import native
from .normalisation_formulas import Form, Parameters

_int, _pointer = ctypes.c_int64, ctypes.c_void_p
_PARAMETERS = (*Parameters._fields, "ta", "tb", "tadded")


class _Tensor(ctypes.Structure):
    _fields_ = (("data", _int), ("batch_stride", _int), ("dtype", _int))


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("batch", "channels", "positions", "groups", "channels_last", "centred", "silu")),
        ("eps", ctypes.c_double),
        ("x", _pointer),
        ("dtype", _int),
        ("moved", _pointer),
        ("moved_dtype", _int),
        *((name, _pointer) for name in ("out", "mean", "rstd", "da", "db")),
        *((name, _Tensor) for name in _PARAMETERS),
    )


def _call(
    name: str,
    form: Form,
    x: Tensor,
    out: Tensor,
    parameters: tuple[Tensor | None, ...],
    moved: Tensor | None,
    **results,
) -> None:
    job = _Job(groups=form.groups, centred=form.centred, silu=form.silu, eps=form.eps)
    job.batch, job.channels = x.shape[0], x.shape[1] if form.groups else x.shape[-1]
    job.positions = math.prod(x.shape[2:] if form.groups else x.shape[1:-1])
    job.channels_last = bool(form.groups) and not x.is_contiguous()
    job.x, job.dtype, job.out = x.data_ptr(), native.DTYPES[x.dtype], out.data_ptr()
    if moved is not None:
        job.moved, job.moved_dtype = moved.data_ptr(), native.DTYPES[moved.dtype]
    for word, result in results.items():
        setattr(job, word, result.data_ptr())
    kept = []  # copies must outlive the call
    for word, p in zip(_PARAMETERS, parameters):
        if p is not None:
            if p.stride(-1) != 1:
                p = p.contiguous()
                kept.append(p)
            stride = p.stride(0) if p.ndim == 2 and p.shape[0] > 1 else 0
            setattr(job, word, _Tensor(p.data_ptr(), stride, native.DTYPES[p.dtype]))
    native.call(name, x, ctypes.byref(job))


def forward(form: Form, x: Tensor, given: Parameters, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    _call("normalise", form, x, y, given, None, mean=mean, rstd=rstd)


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
    _call("normalise_backward", form, x, dx, given, gradient, mean=mean, rstd=rstd, da=da, db=db)


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
    _call("normalise_tangent", form, x, ty, (*given, ta, tb, tadded), tx)
