"""What the normalisation pairs share: formulas in plain torch, raw operators and derivatives.

With xhat = (z - mean) rstd over a group of channels (or over a row), z = x + input_shift,

    u = a xhat + b,   a = weight (1 + scale),   b = bias (1 + scale) + shift,   y = silu(u) or u.

The projection J v = rstd (v - mean(v) - xhat mean(xhat v)) is symmetric and serves both derivatives: dz = J(a du) and
the tangent of xhat is J(tz). For RMS normalisation mean = 0 and the term mean(v) is absent.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, registration

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERATORS = ("group_norm_silu", "layer_norm_modulate", "rms_norm_modulate")


class Form(NamedTuple):
    """One normalisation: which operator of OPERATORS, its groups of channels (0 for rows), and what follows it."""

    operator: str
    groups: int
    eps: float
    silu: bool

    @property
    def centred(self) -> bool:
        return self.operator != "rms_norm_modulate"


class Parameters(NamedTuple):
    """weight, bias [C]; scale, shift, input_shift [B, C]. None: absent (1, 0, 0, 0, 0)."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    input_shift: Tensor | None = None


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_of(form: Form, x: Tensor) -> Tensor:
    """x as the formulas see it: [B, G, C / G, positions] for groups, [B, N, D] for rows."""
    if form.groups:
        return x.reshape(x.shape[0], form.groups, x.shape[1] // form.groups, -1 if x.numel() else 0)
    return x.reshape(x.shape[0], -1 if x.numel() else 0, x.shape[-1])


def _spread(form: Form, p: Tensor) -> Tensor:
    """Per-channel values [C] or [B, C] against rows_of."""
    p = p if p.ndim == 2 else p[None]
    return p.unflatten(1, (form.groups, -1))[..., None] if form.groups else p[:, None]


def _over(form: Form) -> tuple[int, ...]:
    return (2, 3) if form.groups else (2,)


def per_channel(form: Form, v: Tensor) -> Tensor:
    """Sums [B, C] of v, shaped like rows_of, over positions or rows."""
    return v.sum(3).flatten(1) if form.groups else v.sum(1)


def _statistics(form: Form, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """(xhat, rstd) of rows_of(x)."""
    z = rows_of(form, x).to(wide(x))
    if added is not None:
        z = z + _spread(form, added.to(z.dtype))
    if form.centred:
        z = z - z.mean(_over(form), keepdim=True)
    rstd = (z.square().mean(_over(form), keepdim=True) + form.eps).rsqrt()
    return z * rstd, rstd


def _coefficients(form: Form, given: Parameters, dtype: torch.dtype) -> tuple[Any, Any]:
    """a and b against rows_of; the numbers 1 and 0 where nothing makes them tensors."""
    weight, bias, scale, shift, _ = (None if p is None else _spread(form, p.to(dtype)) for p in given)
    a = 1.0 if weight is None else weight
    b = 0.0 if bias is None else bias
    if scale is not None:
        a, b = a * (1 + scale), b * (1 + scale)
    return a, b if shift is None else b + shift


def _slope(u: Tensor) -> Tensor:
    """Derivative of silu."""
    gate = u.sigmoid()
    return gate * (1 + u * (1 - gate))


def gradients(form: Form, gradient: Tensor, x: Tensor, given: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, da [B, C], db [B, C]) in plain torch operations: differentiable again."""
    xhat, rstd = _statistics(form, x, given.input_shift)
    a, b = _coefficients(form, given, xhat.dtype)
    du = rows_of(form, gradient).to(xhat.dtype)
    if form.silu:
        du = du * _slope(a * xhat + b)
    dz = _project(form, a * du, xhat, rstd)
    return dz.reshape(x.shape).to(x.dtype), per_channel(form, du * xhat), per_channel(form, du)


def tangent(
    form: Form,
    x: Tensor,
    tx: Tensor,
    given: Parameters,
    ta: Tensor | None,
    tb: Tensor | None,
    tadded: Tensor | None,
) -> Tensor:
    """The tangent of y in plain torch operations; ta, tb, tadded [B or 1, C]: of a, of b, of input_shift."""
    xhat, rstd = _statistics(form, x, given.input_shift)
    a, b = _coefficients(form, given, xhat.dtype)
    tz = rows_of(form, tx).to(xhat.dtype)
    if tadded is not None:
        tz = tz + _spread(form, tadded.to(xhat.dtype))
    ty = a * _project(form, tz, xhat, rstd)
    if ta is not None:
        ty = ty + _spread(form, ta.to(xhat.dtype)) * xhat
    if tb is not None:
        ty = ty + _spread(form, tb.to(xhat.dtype))
    if form.silu:
        ty = ty * _slope(a * xhat + b)
    return ty.reshape(x.shape).to(x.dtype)


def _project(form: Form, v: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    over = _over(form)
    kept = v - xhat * (v * xhat).mean(over, keepdim=True)
    return rstd * (kept - v.mean(over, keepdim=True) if form.centred else kept)


def parameter_gradients(
    given: Parameters, needs: tuple[bool, ...], da: Tensor, db: Tensor, dz: Tensor
) -> list[Tensor | None]:
    """Gradients of the parameters from those of a and b [B, C] and of z [B, C, ...]."""
    weight, bias, scale, _, added = given
    found: list[Tensor | None] = [None] * len(given)
    kept = 1.0 if scale is None else 1 + scale.to(da.dtype)
    if needs[0]:
        found[0] = (da * kept).sum(0)
    if needs[1]:
        found[1] = (db * kept).sum(0)
    if needs[2]:
        dscale = da if weight is None else da * weight.to(da.dtype)
        found[2] = dscale if bias is None else dscale + db * bias.to(db.dtype)
    if needs[3]:
        found[3] = db
    if needs[4] and added is not None:
        found[4] = dz.sum(tuple(range(2, dz.ndim)), dtype=da.dtype) if dz.ndim > 2 else dz
    return [None if g is None else g.to(p.dtype) for g, p in zip(found, given)]  # type: ignore[union-attr]


def _coefficient_tangents(given: Parameters, moved: Parameters, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Tangents of a and b [B or 1, C]; None where nothing moves them."""
    weight, bias, scale, _, _ = (None if p is None else p.to(dtype) for p in given)
    tweight, tbias, tscale, tshift, _ = (None if p is None else p.to(dtype) for p in moved)
    kept = 1.0 if scale is None else 1 + scale
    terms_a = [] if tweight is None else [tweight * kept]
    terms_b = [] if tbias is None else [tbias * kept]
    if tscale is not None:
        terms_a.append(tscale if weight is None else tscale * weight)
        if bias is not None:
            terms_b.append(tscale * bias)
    if tshift is not None:
        terms_b.append(tshift)
    totals = [sum(terms[1:], terms[0]) if terms else None for terms in (terms_a, terms_b)]
    return tuple(t if t is None or t.ndim == 2 else t[None] for t in totals)


LONGEST_ROW = 8192  # what one Triton program holds without spilling


def served(form: Form, x: Tensor) -> str:
    """The backend that serves this call; "reference" for float64, empty tensors and, on a GPU, very long rows."""
    backend, _ = backends.choose(form.operator, x.device.type)
    if x.dtype == torch.float64 or x.numel() == 0:
        return "reference"
    return "reference" if backend == "triton" and not form.groups and x.shape[-1] > LONGEST_ROW else backend


def worthwhile(form: Form, x: Tensor, given: Parameters) -> bool:
    """Whether the operator beats plain torch: always on a GPU; on a CPU above the sizes measured by the benchmarks."""
    if x.device.type != "cpu" or backends.override() is not None:
        return True
    derivatives = registration.differentiating(p for p in (x, *given) if p is not None)
    if not form.groups:
        return x.numel() >= (2**19 if derivatives else 2**18)
    if given.scale is None and given.shift is None and given.input_shift is None:
        return x.numel() >= 2**19 and math.prod(x.shape[2:]) >= 64 and (derivatives or x.is_contiguous())
    return x.numel() >= 2**18 and math.prod(x.shape[2:]) >= 64


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


def _statistics_shape(form: Form, x: Tensor) -> tuple[int, int]:
    return (x.shape[0], form.groups) if form.groups else (x.shape[0], x.numel() // max(1, x.shape[0] * x.shape[-1]))


def _run(operator, x, weight, bias, scale, shift, input_shift, groups, eps, silu):
    form, given = Form(operator, groups, eps, silu), Parameters(weight, bias, scale, shift, input_shift)
    x = _dense(form, x)
    mean = x.new_empty(_statistics_shape(form, x), dtype=torch.float32)
    y, rstd = _like(x), torch.empty_like(mean)
    _kernels(served(form, x)).forward(form, x, given, y, mean, rstd)
    return y, mean, rstd


def _run_fake(operator, x, weight, bias, scale, shift, input_shift, groups, eps, silu):
    x = _dense(Form(operator, groups, eps, silu), x)
    mean = x.new_empty(_statistics_shape(Form(operator, groups, eps, silu), x), dtype=torch.float32)
    return _like(x), mean, torch.empty_like(mean)


def _run_backward(operator, gradient, x, mean, rstd, weight, bias, scale, shift, input_shift, groups, eps, silu):
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
_raw: dict[str, Any] = {}
for _name in OPERATORS:
    _raw[_name] = registration.define(
        f"_{_name}(Tensor x, {_PARAMETERS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
        functools.partial(_run, _name),
        functools.partial(_run_fake, _name),
    )
    _raw[_name + "_backward"] = registration.define(
        f"_{_name}_backward(Tensor gradient, Tensor x, Tensor mean, Tensor rstd, {_PARAMETERS}, {_OPTIONS}) "
        "-> (Tensor, Tensor, Tensor)",
        functools.partial(_run_backward, _name),
        functools.partial(_run_backward_fake, _name),
    )
    _raw[_name + "_tangent"] = registration.define(
        f"_{_name}_tangent(Tensor x, Tensor tx, {_PARAMETERS}, Tensor? ta, Tensor? tb, Tensor? tadded, {_OPTIONS}) "
        "-> Tensor",
        functools.partial(_run_tangent, _name),
        functools.partial(_run_tangent_fake, _name),
    )


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


class _Normalise(torch.autograd.Function):
    """Gradient and tangent by the raw operators; where they are differentiated again, by the formulas."""

    @staticmethod
    def forward(x, weight, bias, scale, shift, input_shift, form):
        return _raw[form.operator](x, weight, bias, scale, shift, input_shift, *form[1:])

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
        x, *rest, mean, rstd = ctx.saved_tensors
        given = Parameters(*rest)
        live = [p for p in (gradient, x, *given) if p is not None]
        if registration.tracing() or registration.differentiating(live):
            dx, da, db = gradients(ctx.form, gradient, x, given)
        else:
            dx, da, db = _raw[ctx.form.operator + "_backward"](gradient, x, mean, rstd, *given, *ctx.form[1:])
        return (dx, *parameter_gradients(given, ctx.needs_input_grad[1:6], da, db, dx), None)

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
        ta, tb = _coefficient_tangents(given, moved, torch.float32)
        return _raw[form.operator + "_tangent"](x, tx, *given, ta, tb, moved.input_shift, *form[1:])

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
            return _plain_tangent(ctx.form, full[0], full[1], Parameters(*full[2:7]), Parameters(*full[7:]))

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
                return _plain_tangent(form, full[0], full[1], Parameters(*full[2:7]), Parameters(*full[7:]))

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


def _plain_tangent(form: Form, x: Tensor, tx: Tensor, given: Parameters, moved: Parameters) -> Tensor:
    ta, tb = _coefficient_tangents(given, moved, wide(x))
    return tangent(form, x, tx, given, ta, tb, moved.input_shift)


def _carry(form: Form, x: Tensor, tx: Tensor | None, given: Parameters, moved: Parameters) -> Tensor:
    tx = torch.zeros_like(x) if tx is None else tx
    if registration.tracing() or served(form, x) == "reference":
        return _plain_tangent(form, x, tx, given, moved)
    return _differentiable(_Tangent)(form, x, tx, *given, *moved)


def _apply(form: Form, x: Tensor, given: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    if registration.differentiating([p for p in (x, *given) if p is not None]):
        return _differentiable(_Normalise)(x, *given, form)
    return _raw[form.operator](x, *given, *form[1:])


def _transformed() -> bool:
    """Whether a functorch transform or a dual level is active."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def reference(form: Form, x: Tensor, given: Parameters) -> Tensor:
    """The defining implementation in plain torch operations: torch's own normalisation, or the formulas where tangents
    may pass (the gradient of torch.layer_norm's tangent is wrong, and torch.group_norm has none for channels-last)."""
    dtype = wide(x)
    if _transformed():
        xhat, _ = _statistics(form, x, given.input_shift)
        a, b = _coefficients(form, given, dtype)
        u = a * xhat + b
        y = (torch.nn.functional.silu(u) if form.silu else u).reshape(x.shape).to(x.dtype)
        return y if x.is_contiguous() or not form.groups else y.movedim(1, -1).contiguous().movedim(-1, 1)
    positions = (None,) * (x.ndim - 2)
    weight, bias, scale, shift, added = (None if p is None else p.to(dtype) for p in given)
    z = x.to(dtype)
    if form.groups:
        if added is not None:
            z = z + added[(..., *positions)]
        u = torch.group_norm(z, form.groups, weight, bias, form.eps)
        spread: Any = (..., *positions)
    else:
        if form.centred:
            u = torch.nn.functional.layer_norm(z, x.shape[-1:], weight, bias, form.eps)
        else:
            u = z * (z.square().mean(-1, keepdim=True) + form.eps).rsqrt()
            u = u if weight is None else u * weight
            u = u if bias is None else u + bias
        spread = (slice(None), *positions)
    if scale is not None:
        u = u * (1 + scale[spread])
    if shift is not None:
        u = u + shift[spread]
    return (torch.nn.functional.silu(u) if form.silu else u).to(x.dtype)


def normalise(form: Form, x: Tensor, given: Parameters) -> Tensor:
    """The choice between the three paths, for checked arguments."""
    if registration.tracing() or served(form, x) == "reference" or not worthwhile(form, x, given):
        return reference(form, x, given)
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
