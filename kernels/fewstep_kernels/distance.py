"""Distances between two tensors, one number a sample: `sum_i w_i phi(a_i - b_i)` with phi(d) = d^2, |d| or
sqrt(d^2 + c^2) - c, and what is made of it.

Bytes moved at best: forward reads a, b (and w) once and writes [B]; backward reads them once more and writes both
gradients in the same pass; the tangent reads a, b and their tangents once. Eager torch writes and reads a tensor of
the difference and one of its image on the way. It does not help under a compiler, which fuses the reference.

Two pseudo-Huber distances are in use: the norm's, sqrt(|a - b|^2 + c^2) - c over the whole sample (arXiv:2310.14189,
eq. 7), here `pseudo_huber`; and the elements', the mean of sqrt(d_i^2 + c^2) - c, here `pseudo_huber_elementwise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, distance_kernels, layout, native, reductions, registration

SQUARE, ABSOLUTE, PSEUDO_HUBER = range(3)


def value(kind: int, c: float, d: Tensor) -> Tensor:
    """phi(d). The pseudo-Huber form has no cancellation where d is small beside c."""
    if kind == SQUARE:
        return d * d
    return d.abs() if kind == ABSOLUTE else d * d / (torch.sqrt(d * d + c * c) + c)


def slope(kind: int, c: float, d: Tensor) -> Tensor:
    """phi'(d); 0 at 0 for |d|."""
    if kind == SQUARE:
        return d + d
    return d.sign() if kind == ABSOLUTE else d / torch.sqrt(d * d + c * c)


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return reductions.wide([x for x in tensors if x is not None])


def _difference(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    wide = _wide(a, b, weight)
    return a.to(wide) - b.to(wide)


def reference(kind: int, c: float, a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """The defining implementation, in plain torch operations: sums [B]."""
    terms = value(kind, c, _difference(a, b, weight))
    return reductions.samples(terms if weight is None else weight * terms).sum(1)


def gradient_reference(
    kind: int, c: float, scale: Tensor, a: Tensor, b: Tensor, weight: Tensor | None, of_a: bool, of_b: bool
) -> list[Tensor]:
    """scale[b] w phi'(a - b) in a's dtype and its negative in b's, as asked."""
    found = slope(kind, c, _difference(a, b, weight))
    found = found if weight is None else weight * found
    found = scale.to(found.dtype).view(-1, *[1] * (a.ndim - 1)) * found
    return [*([found.to(a.dtype)] if of_a else []), *([-found.to(b.dtype)] if of_b else [])]


def tangent_reference(
    kind: int, c: float, a: Tensor, b: Tensor, weight: Tensor | None, along_a: Tensor | None, along_b: Tensor | None
) -> Tensor:
    """sum_i w_i phi'(a_i - b_i) (along_a_i - along_b_i), [B]; None is zero."""
    terms = slope(kind, c, _difference(a, b, weight))
    terms = terms if weight is None else weight * terms
    if along_a is not None:
        along = along_a.to(terms.dtype)
        return reductions.samples(terms * (along if along_b is None else along - along_b.to(terms.dtype))).sum(1)
    assert along_b is not None
    return -reductions.samples(terms * along_b.to(terms.dtype)).sum(1)


def _backend(tensors: Sequence[Tensor | None]) -> str:
    """What serves these tensors: "reference" where they are empty or of another dtype."""
    present = [x for x in tensors if x is not None]
    if present[0].numel() == 0 or any(x.dtype not in native.DTYPES for x in present):
        return "reference"
    return backends.choose("distance", present[0].device.type)[0]


def _aligned(tensors: Sequence[Tensor | None]) -> list[Any]:
    same = iter(reductions.one_layout([x for x in tensors if x is not None]))
    return [None if x is None else next(same) for x in tensors]


class _Result(NamedTuple):
    """What is made of a sample's sum: sum / size, or with c the norm sqrt(sum + c^2) - c."""

    size: int = 1
    c: float = 0.0

    def of(self, total: Tensor) -> Tensor:
        if self.c:
            return total / (torch.sqrt(total + self.c * self.c) + self.c)
        return total if self.size == 1 else total / self.size

    def pulled(self, scale: Tensor, result: Tensor | None) -> Tensor:
        """The gradient of the sum, from the result (with c) and its gradient."""
        if result is not None:
            return scale / (2 * (result + self.c))
        return scale if self.size == 1 else scale / self.size


_SUM = _Result()


def _sum(kind, c, a, b, weight, along_a, along_b, made=_SUM):
    tensors = (a, b, weight, along_a, along_b)
    backend = _backend(tensors)
    if backend == "reference":
        if along_a is None and along_b is None:
            return made.of(reference(kind, c, a, b, weight))
        return tangent_reference(kind, c, a, b, weight, along_a, along_b)
    out = a.new_empty(a.shape[0], dtype=_wide(a, b, weight))
    read = _aligned(tensors)
    if backend == "triton":
        distance_kernels.add_up(kind, c, read[:3], read[3:], out)
        return made.of(out)
    count, table, code = math.prod(a.shape[1:]), reductions.rows(read), native.DTYPES[out.dtype]
    native.call("distance", a, kind, c, a.shape[0], count, table, made.size, made.c, out.data_ptr(), code)
    return out


def _gradient(kind, c, scale, a, b, weight, of_a, of_b):
    backend = _backend((a, b, weight))
    if backend == "reference":
        return gradient_reference(kind, c, scale, a, b, weight, of_a, of_b)
    read = _aligned((a, b, weight))
    made = [layout.like_sample(read[0], None, x.dtype) if wanted else None for x, wanted in ((a, of_a), (b, of_b))]
    scale = scale.to(_wide(a, b, weight)).contiguous()
    if backend == "triton":
        distance_kernels.write_gradients(kind, c, scale, read, made, scale.dtype)
    else:
        count, table = math.prod(a.shape[1:]), reductions.rows([*read, *made])
        native.call(
            "distance_gradient", a, kind, c, a.shape[0], count, table, scale.data_ptr(), native.DTYPES[scale.dtype]
        )
    return [x for x in made if x is not None]


_raw = registration.define(
    "_distance(int kind, float c, Tensor a, Tensor b, Tensor? weight, Tensor? along_a, Tensor? along_b) -> Tensor",
    _sum,
    lambda kind, c, a, b, weight, along_a, along_b: a.new_empty(a.shape[0], dtype=_wide(a, b, weight)),
)
_raw_gradient = registration.define(
    "_distance_gradient(int kind, float c, Tensor scale, Tensor a, Tensor b, Tensor? weight, bool of_a, bool of_b)"
    " -> Tensor[]",
    _gradient,
    lambda kind, c, scale, a, b, weight, of_a, of_b: [
        torch.empty_like(a, dtype=x.dtype) for x, wanted in ((a, of_a), (b, of_b)) if wanted
    ],
)


def _gradients(kind, c, scale, a, b, weight, of_a, of_b) -> list[Tensor]:
    """The gradients asked for, in one pass; they have derivatives themselves."""
    given = [x for x in (scale, a, b, weight) if x is not None]
    if not registration.differentiating(given):
        direct = registration.quiet() and registration.plain(given)
        return (_gradient if direct else _raw_gradient)(kind, c, scale, a, b, weight, of_a, of_b)

    def fast(scale, a, b, weight=None):
        return tuple(_raw_gradient(kind, c, scale, a, b, weight, of_a, of_b))

    def plain(scale, a, b, weight=None):
        return tuple(gradient_reference(kind, c, scale, a, b, weight, of_a, of_b))

    return list(reductions.by_reference(fast, plain, scale, a, b, *(() if weight is None else (weight,))))


def _along(kind, c, a, b, weight, along_a, along_b) -> Tensor:
    """The derivative along tangents of a and b, in one pass; it has derivatives itself."""
    optional = [x for x in (weight, along_a, along_b) if x is not None]
    present = [x is not None for x in (weight, along_a, along_b)]

    def placed(rest):
        rest = iter(rest)
        return [next(rest) if there else None for there in present]

    def fast(a, b, *rest):
        return _raw(kind, c, a, b, *placed(rest))

    def plain(a, b, *rest):
        return tangent_reference(kind, c, a, b, *placed(rest))

    return reductions.by_reference(fast, plain, a, b, *optional)


def _pulled(ctx, scale, a, b, weight=None) -> tuple[Tensor | None, ...]:
    """Gradients of what `_Distance` takes."""
    result: list[Any] = [None] * 5
    of_a, of_b, of_weight = ctx.needs_input_grad[2:5]
    if of_a or of_b:
        found = iter(_gradients(ctx.kind, ctx.c, scale, a, b, weight, of_a, of_b))
        result[2:4] = (next(found) if wanted else None for wanted in (of_a, of_b))
    if of_weight:
        terms = value(ctx.kind, ctx.c, _difference(a, b, weight))
        result[4] = (scale.view(-1, *[1] * (a.ndim - 1)) * terms).to(weight.dtype)
    return tuple(result)


class _Quick(torch.autograd.Function):
    """`_Distance` and what is made of it where no transform follows: one node in an older form, past the dispatcher."""

    @staticmethod
    def forward(ctx, kind, c, a, b, weight, made):
        result = _sum(kind, c, a, b, weight, None, None, made)
        ctx.kind, ctx.c, ctx.made = kind, c, made
        ctx.save_for_backward(result if made.c else None, a, b, weight)
        return result

    @staticmethod
    def backward(ctx, scale):
        result, *tensors = ctx.saved_tensors
        return *_pulled(ctx, ctx.made.pulled(scale, result), *tensors), None


class _Distance(torch.autograd.Function):
    """sum w phi(a - b): gradient and tangent are one pass each."""

    @staticmethod
    def forward(kind, c, a, b, weight):
        return _raw(kind, c, a, b, weight, None, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kind, ctx.c, *tensors = inputs
        ctx.weighted = tensors[2] is not None
        ctx.save_for_backward(*tensors[: 2 + ctx.weighted])
        ctx.save_for_forward(*tensors[: 2 + ctx.weighted])

    @staticmethod
    def backward(ctx, scale):
        return _pulled(ctx, scale, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, _kind, _c, along_a, along_b, along_weight):
        a, b, weight = (*ctx.saved_tensors, None)[:3]
        parts = []
        if along_a is not None or along_b is not None:
            parts.append(_along(ctx.kind, ctx.c, a, b, weight, along_a, along_b))
        if along_weight is not None:
            parts.append(_total(ctx.kind, ctx.c, a, b, along_weight))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info, in_dims, kind, c, a, b, weight):
        a, b = (reductions.fold(x, dim, info.batch_size) for x, dim in ((a, in_dims[2]), (b, in_dims[3])))
        weight = None if weight is None else reductions.fold(weight, in_dims[4], info.batch_size)
        return _total(kind, c, a, b, weight).unflatten(0, (info.batch_size, -1)), 0


def _total(kind: int, c: float, a: Tensor, b: Tensor, weight: Tensor | None, made: _Result = _SUM) -> Tensor:
    """sum_i w_i phi(a_i - b_i), [B], and what is made of it; weight None or of the tensors' shape."""
    if registration.tracing() or backends.choose("distance", a.device.type)[0] == "reference":
        return made.of(reference(kind, c, a, b, weight))
    given = (a, b) if weight is None else (a, b, weight)
    differentiating = registration.differentiating(given)
    if registration.quiet() and registration.plain(given):
        if differentiating:
            return _Quick.apply(kind, c, a, b, weight, made)
        return _sum(kind, c, a, b, weight, None, None, made)
    if differentiating:
        return made.of(reductions.compiled_node(_Distance)(kind, c, a, b, weight))
    return made.of(_raw(kind, c, a, b, weight, None, None))


def _weights(name: str, a: Tensor, b: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(of elements, of samples) after checking what was given."""
    for x in (a, b, *([] if weight is None else [weight])):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} takes floating-point tensors; got {given}.")
        if x.device != a.device:
            raise ValueError(f"{name} takes tensors of one device; got {a.device} and {x.device}.")
    if a.shape != b.shape or a.ndim == 0:
        raise ValueError(f"{name} takes two tensors of one shape [B, ...]; got {list(a.shape)} and {list(b.shape)}.")
    if weight is None:
        return None, None
    shape = list(weight.shape)
    if shape == [a.shape[0], *[1] * (len(shape) - 1)] and len(shape) in (1, a.ndim):
        return None, weight.reshape(-1)
    if len(shape) != a.ndim or any(given not in (1, size) for given, size in zip(shape, a.shape)):
        raise ValueError(
            f"{name}'s weight must be [{a.shape[0]}], a number a sample, or broadcast to {list(a.shape)}; got {shape}."
        )
    return weight.expand(a.shape), None


def _elements(name: str, kind: int, c: float, a: Tensor, b: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    of_elements, of_samples = _weights(name, a, b, weight)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'.")
    made = _Result(size=math.prod(a.shape[1:]) if reduction == "mean" else 1)
    total = _total(kind, c, a, b, of_elements, made)
    return total if of_samples is None else of_samples * total


def _check_c(name: str, c: float) -> float:
    if not (isinstance(c, (int, float)) and 0 < c < math.inf):
        raise ValueError(f"{name}'s c must be a positive number; got {c!r}.")
    return float(c)


def l2(a: Tensor, b: Tensor, weight: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
    """mean_i w_i (a_i - b_i)^2 over each sample, [B] (reduction="sum": their sum).

    a, b: [B, ...], floating dtypes and layouts as they come. weight: one number a sample [B], or a tensor that
    broadcasts to the sample. Returns float32 (float64 if any is). Differentiable in all three, forward and reverse.
    Raises TypeError/ValueError naming what does not fit.
    """
    return _elements("l2", SQUARE, 0.0, a, b, weight, reduction)


def l1(a: Tensor, b: Tensor, weight: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
    """mean_i w_i |a_i - b_i| over each sample, [B]; arguments as in `l2`. Its slope is 0 where a_i = b_i."""
    return _elements("l1", ABSOLUTE, 0.0, a, b, weight, reduction)


def pseudo_huber_elementwise(
    a: Tensor, b: Tensor, weight: Tensor | None = None, *, c: float, reduction: str = "mean"
) -> Tensor:
    """mean_i w_i (sqrt((a_i - b_i)^2 + c^2) - c) over each sample, [B]; c > 0, other arguments as in `l2`."""
    c = _check_c("pseudo_huber_elementwise", c)
    return _elements("pseudo_huber_elementwise", PSEUDO_HUBER, c, a, b, weight, reduction)


def pseudo_huber(a: Tensor, b: Tensor, weight: Tensor | None = None, *, c: float) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c, |.| the Euclidean norm of the whole sample, [B] (arXiv:2310.14189, eq. 7).

    weight: one number a sample multiplies its distance; one that broadcasts to the sample weights the squares inside
    the norm. c > 0, in units of that norm (0.00054 sqrt(elements) in the paper).
    """
    c = _check_c("pseudo_huber", c)
    of_elements, of_samples = _weights("pseudo_huber", a, b, weight)
    distance = _total(SQUARE, 0.0, a, b, of_elements, _Result(c=c))
    return distance if of_samples is None else of_samples * distance
