"""The normalisation pairs in plain torch operations: values, gradients and tangents.

With xhat = (z - mean) rstd over a group of channels (or over a row), z = x + input_shift,

    u = a xhat + b,   a = weight (1 + scale),   b = bias (1 + scale) + shift,   y = silu(u) or u.

The projection J v = rstd (v - mean(v) - xhat mean(xhat v)) is symmetric and serves both derivatives: dz = J(a du) and
the tangent of xhat is J(tz). For RMS normalisation mean = 0 and the term mean(v) is absent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERATORS = ("group_norm_silu", "layer_norm_modulate", "rms_norm_modulate")
LONGEST_ROW = 8192  # what one Triton program holds without spilling


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
    if needs[0] or needs[1]:
        kept = 1.0 if scale is None else 1 + scale.to(da.dtype)
        found[0] = (da * kept).sum(0) if needs[0] else None
        found[1] = (db * kept).sum(0) if needs[1] else None
    if needs[2]:
        dscale = da if weight is None else da * weight.to(da.dtype)
        found[2] = dscale if bias is None else dscale + db * bias.to(db.dtype)
    if needs[3]:
        found[3] = db
    if needs[4] and added is not None:
        found[4] = dz.sum(tuple(range(2, dz.ndim)), dtype=da.dtype) if dz.ndim > 2 else dz
    return [None if g is None else g.to(p.dtype) for g, p in zip(found, given)]  # type: ignore[union-attr]


def coefficient_tangents(given: Parameters, moved: Parameters, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
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


def plain_tangent(form: Form, x: Tensor, tx: Tensor, given: Parameters, moved: Parameters) -> Tensor:
    ta, tb = coefficient_tangents(given, moved, wide(x))
    return tangent(form, x, tx, given, ta, tb, moved.input_shift)


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
