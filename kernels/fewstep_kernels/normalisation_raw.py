"""The raw operators of the normalisation pairs: value, gradient and tangent of each, and which kernels serve them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import backends, registration
from .normalisation_formulas import LONGEST_ROW, OPERATORS, Form, Parameters


def served(form: Form, x: Tensor) -> str:
    """The backend that serves this call; "reference" for float64, empty tensors and, on a GPU, very long rows."""
    backend, _ = backends.choose(form.operator, x.device.type)
    if x.dtype == torch.float64 or x.numel() == 0:
        return "reference"
    return "reference" if backend == "triton" and not form.groups and x.shape[-1] > LONGEST_ROW else backend


def _kernels(backend: str):
    if backend == "cpu":
        from . import normalisation_native as kernels
    else:
        from . import normalisation_kernels as kernels  # type: ignore[no-redef]
    return kernels


def _dense(form: Form, x: Tensor) -> Tensor:
    """x in a layout the kernels read: row-major, or channels-last for groups."""
    if x.is_contiguous() or (form.groups and x.ndim > 2 and x.movedim(1, -1).is_contiguous()):
        return x
    return x.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.preserve_format)


def _as(x: Tensor, model: Tensor) -> Tensor:
    """x in the memory order of model, which is dense."""
    return x if x.stride() == model.stride() else _like(model).to(x.dtype).copy_(x)


def statistics_shape(form: Form, x: Tensor) -> tuple[int, int]:
    return (x.shape[0], form.groups) if form.groups else (x.shape[0], x.numel() // max(1, x.shape[0] * x.shape[-1]))


def run(operator, x, weight, bias, scale, shift, input_shift, groups, eps, silu):
    form, given = Form(operator, groups, eps, silu), Parameters(weight, bias, scale, shift, input_shift)
    x = _dense(form, x)
    mean = x.new_empty(statistics_shape(form, x), dtype=torch.float32)
    y, rstd = _like(x), torch.empty_like(mean)
    _kernels(served(form, x)).forward(form, x, given, y, mean, rstd)
    return y, mean, rstd


def _run_fake(operator, x, weight, bias, scale, shift, input_shift, groups, eps, silu):
    x = _dense(Form(operator, groups, eps, silu), x)
    mean = x.new_empty(statistics_shape(Form(operator, groups, eps, silu), x), dtype=torch.float32)
    return _like(x), mean, torch.empty_like(mean)


def run_backward(operator, gradient, x, mean, rstd, weight, bias, scale, shift, input_shift, groups, eps, silu):
    form, given = Form(operator, groups, eps, silu), Parameters(weight, bias, scale, shift, input_shift)
    x = _dense(form, x)
    dx, da, db = _run_backward_fake(
        operator, gradient, x, mean, rstd, weight, bias, scale, shift, input_shift, groups, eps, silu
    )
    _kernels(served(form, x)).backward(form, _as(gradient, x), x, mean, rstd, given, dx, da, db)
    return dx, da, db


def _run_backward_fake(operator, gradient, x, mean, rstd, weight, bias, scale, shift, input_shift, groups, eps, silu):
    x = _dense(Form(operator, groups, eps, silu), x)
    da = x.new_empty((x.shape[0], x.shape[1] if groups else x.shape[-1]), dtype=torch.float32)
    return _like(x), da, torch.empty_like(da)


def _run_tangent(operator, x, tx, weight, bias, scale, shift, input_shift, ta, tb, tadded, groups, eps, silu):
    form, given = Form(operator, groups, eps, silu), Parameters(weight, bias, scale, shift, input_shift)
    x = _dense(form, x)
    ty = _like(x)
    _kernels(served(form, x)).tangent(form, x, _as(tx, x), given, ta, tb, tadded, ty)
    return ty


def _run_tangent_fake(operator, x, tx, *rest):
    return _like(_dense(Form(operator, *rest[-3:]), x))


_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? input_shift"
_OPTIONS = "int groups, float eps, bool silu"
raw: dict[str, Any] = {}
for _name in OPERATORS:
    raw[_name] = registration.define(
        f"_{_name}(Tensor x, {_PARAMETERS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
        functools.partial(run, _name),
        functools.partial(_run_fake, _name),
    )
    raw[_name + "_backward"] = registration.define(
        f"_{_name}_backward(Tensor gradient, Tensor x, Tensor mean, Tensor rstd, {_PARAMETERS}, {_OPTIONS}) "
        "-> (Tensor, Tensor, Tensor)",
        functools.partial(run_backward, _name),
        functools.partial(_run_backward_fake, _name),
    )
    raw[_name + "_tangent"] = registration.define(
        f"_{_name}_tangent(Tensor x, Tensor tx, {_PARAMETERS}, Tensor? ta, Tensor? tb, Tensor? tadded, {_OPTIONS}) "
        "-> Tensor",
        functools.partial(_run_tangent, _name),
        functools.partial(_run_tangent_fake, _name),
    )
