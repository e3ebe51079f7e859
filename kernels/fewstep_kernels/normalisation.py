"""The normalisation pairs under every mode of differentiation: which path takes a call; the two autograd functions."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import backends, registration
from .normalisation_formulas import (
    FLOATS,
    Form,
    Parameters,
    coefficient_tangents,
    gradients,
    parameter_gradients,
    plain_tangent,
    reference,
)
from .normalisation_raw import raw, run, run_backward, served


def worthwhile(form: Form, x: Tensor, given: Parameters) -> bool:
    """Whether the operator beats plain torch: always on a GPU; on a CPU above the sizes measured by the benchmarks."""
    if x.device.type != "cpu" or backends.override() is not None:
        return True
    derivatives = registration.differentiating(p for p in (x, *given) if p is not None)
    if not form.groups:
        return x.numel() >= (2**15 if derivatives else 2**12)
    if given.input_shift is not None:
        return x.numel() >= 2**17 and math.prod(x.shape[2:]) >= 64
    if given.scale is not None or given.shift is not None:
        return x.numel() >= (2**17 if derivatives else 2**15)
    return x.numel() >= (2**19 if derivatives else 2**16)


def _fold(folds: int, batch: int, p: Tensor | None, dim: int | None, shared: bool = False) -> Tensor | None:
    """A mapped dimension folded into the batch; what is `shared` by all samples stays."""
    if p is None or shared:
        return p
    p = p.expand(folds, *p.shape) if dim is None else p.movedim(dim, 0)
    return p.expand(folds, batch, *p.shape[2:]).flatten(0, 1)


def _mapped_weights(given, dims) -> bool:
    return any(p is not None and d is not None for p, d in zip(given[:2], dims[:2]))


def _mapped(function, folds: int, dims, *tensors):
    """torch.vmap of plain operations, for mapped weights: they are not per sample, so they cannot be folded."""
    live = [i for i, x in enumerate(tensors) if x is not None]

    def call(*moving):
        full = list(tensors)
        for i, x in zip(live, moving):
            full[i] = x
        return function(*full)

    return torch.func.vmap(call, tuple(dims[i] for i in live))(*(tensors[i] for i in live))


def _pulled(ctx, gradient) -> tuple[Tensor | None, ...]:
    """Gradients of what `_Normalise` and `_Quick` take."""
    x, *rest, mean, rstd = ctx.saved_tensors
    form, given = ctx.form, Parameters(*rest)
    live = [p for p in (gradient, x, *given) if p is not None]
    if registration.tracing() or registration.differentiating(live):
        dx, da, db = gradients(form, gradient, x, given)
    elif registration.quiet() and registration.plain(live):
        dx, da, db = run_backward(form.operator, gradient, x, mean, rstd, *given, *form[1:])
    else:
        dx, da, db = raw[form.operator + "_backward"](gradient, x, mean, rstd, *given, *form[1:])
    return (dx, *parameter_gradients(given, ctx.needs_input_grad[1:6], da, db, dx), None)


class _Quick(torch.autograd.Function):
    """`_Normalise` where no transform follows: in an older form and past the dispatcher, for half the host time."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, input_shift, form):
        y, mean, rstd = run(form.operator, x, weight, bias, scale, shift, input_shift, *form[1:])
        ctx.form = form
        ctx.save_for_backward(x, weight, bias, scale, shift, input_shift, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return _pulled(ctx, gradient)


class _Normalise(torch.autograd.Function):
    """Gradient and tangent by the raw operators; where they are differentiated again, by the formulas."""

    @staticmethod
    def forward(x, weight, bias, scale, shift, input_shift, form):
        return raw[form.operator](x, weight, bias, scale, shift, input_shift, *form[1:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.form = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, mean, rstd)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, gradient, _mean, _rstd):
        if gradient is None:
            return (None,) * 7
        return _pulled(ctx, gradient)

    @staticmethod
    def jvp(ctx, tx, tweight, tbias, tscale, tshift, tadded, _form):
        x, *rest = ctx.saved_tensors[:6]
        moved = Parameters(tweight, tbias, tscale, tshift, tadded)
        return _carry(ctx.form, x, tx, Parameters(*rest), moved), None, None

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, scale, shift, input_shift, form):
        folds, given = info.batch_size, Parameters(weight, bias, scale, shift, input_shift)
        batch = x.shape[0] if in_dims[0] is None else x.movedim(in_dims[0], 0).shape[1]
        if _mapped_weights(given, in_dims[1:]):
            y = _mapped(
                lambda *tensors: reference(form, tensors[0], Parameters(*tensors[1:])), folds, in_dims, x, *given
            )
            mean = x.new_zeros(1)
            return (y, mean, mean), (0, None, None)
        folded = [_fold(folds, batch, p, d, 0 < i < 3) for i, (p, d) in enumerate(zip((x, *given), in_dims))]
        y, mean, rstd = _apply(form, folded[0], Parameters(*folded[1:]))  # type: ignore[arg-type]
        return tuple(v.unflatten(0, (folds, batch)) for v in (y, mean, rstd)), (0, 0, 0)


class _Tangent(torch.autograd.Function):
    """The tangent, differentiable once more by the formulas."""

    @staticmethod
    def forward(form, x, tx, *parameters):
        given, moved = Parameters(*parameters[:5]), Parameters(*parameters[5:])
        ta, tb = coefficient_tangents(given, moved, torch.float32)
        return raw[form.operator + "_tangent"](x, tx, *given, ta, tb, moved.input_shift, *form[1:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _again(ctx, places):
        """The formulas as a function of the tensors at places, and those tensors."""
        given = list(ctx.saved_tensors)

        def function(*moving: Tensor) -> Tensor:
            full = list(given)
            for i, p in zip(places, moving):
                full[i] = p
            return plain_tangent(ctx.form, full[0], full[1], Parameters(*full[2:7]), Parameters(*full[7:]))

        return function, tuple(given[i] for i in places)

    @staticmethod
    def backward(ctx, gradient):
        places = [i for i in range(12) if ctx.needs_input_grad[1 + i]]
        function, primals = _Tangent._again(ctx, places)
        result: list[Tensor | None] = [None] * 13
        for i, found in zip(places, torch.func.vjp(function, *primals)[1](gradient)):  # type: ignore[misc]
            result[1 + i] = found
        return tuple(result)

    @staticmethod
    def jvp(ctx, _form, *tangents):
        places = [i for i in range(12) if tangents[i] is not None]
        function, primals = _Tangent._again(ctx, places)
        return torch.func.jvp(function, primals, tuple(tangents[i] for i in places))[1]

    @staticmethod
    def vmap(info, in_dims, form, *tensors):
        folds, x, dims = info.batch_size, tensors[0], in_dims[1:]
        batch = x.shape[0] if dims[0] is None else x.movedim(dims[0], 0).shape[1]
        if _mapped_weights(tensors[2:], dims[2:]) or _mapped_weights(tensors[7:], dims[7:]):

            def plain(*full):
                return plain_tangent(form, full[0], full[1], Parameters(*full[2:7]), Parameters(*full[7:]))

            return _mapped(plain, folds, dims, *tensors), 0
        shared = (2, 3, 7, 8)
        folded = [_fold(folds, batch, p, d, i in shared) for i, (p, d) in enumerate(zip(tensors, dims))]
        given, moved = Parameters(*folded[2:7]), Parameters(*folded[7:])
        ty = _carry(form, folded[0], folded[1], given, moved)  # type: ignore[arg-type]
        return ty.unflatten(0, (folds, batch)), 0


@functools.cache
def _differentiable(function):
    """An autograd function, one node of a compiler's graph should one meet it. Imports torch._dynamo: on first use."""

    @torch.compiler.allow_in_graph
    def apply(*arguments):
        return function.apply(*arguments)

    return apply


def _carry(form: Form, x: Tensor, tx: Tensor | None, given: Parameters, moved: Parameters) -> Tensor:
    tx = torch.zeros_like(x) if tx is None else tx
    if registration.tracing() or served(form, x) == "reference":
        return plain_tangent(form, x, tx, given, moved)
    return _differentiable(_Tangent)(form, x, tx, *given, *moved)


def _apply(form: Form, x: Tensor, given: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    if registration.differentiating([p for p in (x, *given) if p is not None]):
        return _differentiable(_Normalise)(x, *given, form)
    return raw[form.operator](x, *given, *form[1:])


def normalise(form: Form, x: Tensor, given: Parameters) -> Tensor:
    """The choice between the three paths, for checked arguments."""
    if registration.tracing() or served(form, x) == "reference" or not worthwhile(form, x, given):
        return reference(form, x, given)
    if registration.quiet():
        live = [p for p in (x, *given) if p is not None]
        if registration.plain(live):
            if registration.differentiating(live):
                return _Quick.apply(x, *given, form)
            return run(form.operator, x, *given, *form[1:])[0]
    return _apply(form, x, given)[0]


def check(form: Form, x: Tensor, given: Parameters) -> None:
    """Raise TypeError/ValueError in one sentence for what does not fit."""
    name = form.operator
    shape = "[B, C, ...]" if form.groups else "[B, ..., D]"
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.ndim < 2:
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} takes a floating-point tensor {shape}; got {what}.")
    channels = x.shape[1] if form.groups else x.shape[-1]
    if form.groups and (form.groups < 1 or channels % form.groups):
        raise ValueError(f"{name} takes a number of groups that divides {channels} channels; got {form.groups}.")
    for word, p in zip(Parameters._fields, given):
        wanted = (channels,) if word in ("weight", "bias") else (x.shape[0], channels)
        if p is None:
            continue
        if not isinstance(p, Tensor) or p.dtype not in FLOATS or p.shape != wanted:
            what = f"{p.dtype} {list(p.shape)}" if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(f"{name} takes {word} as a floating-point tensor {list(wanted)}; got {what}.")
