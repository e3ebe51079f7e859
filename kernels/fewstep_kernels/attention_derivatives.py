"""Attention and `attention_jvp` under every mode of differentiation: which path takes a call, and the two autograd
functions. Arguments are checked already: q, k, v, tangents of one dtype, a mask of four dimensions, a number as scale.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import attention_primal as primal
from . import registration
from .attention_reference import compute, raw, reference


def _gradients(gradient, q, k, v, out, lse, mask, causal, scale, with_mask) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the mask: fused where nothing differentiates them again, else plain operations."""
    given = [x for x in (gradient, q, k, v, mask) if x is not None]
    if with_mask or registration.tracing() or registration.differentiating(given):
        return primal.gradients(gradient, q, k, v, mask, causal, scale, with_mask)
    return (*primal.backward(gradient, q, k, v, out, lse, mask, causal, scale), None)


def _fold(folds: int, batch: int, x: Tensor | None, dim: int | None, mask: bool = False) -> Tensor | None:
    """A mapped dimension folded into the batch: [V * B, ...]; a mask that is the same for all stays."""
    if x is None or (mask and dim is None and x.shape[0] == 1):
        return x
    x = x.expand(folds, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(folds, batch, *x.shape[2:]).flatten(0, 1)


def _mapped_batch(tensors, dims) -> int:
    x, dim = next((x, dim) for x, dim in zip(tensors, dims) if x is not None)
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


class _Attention(torch.autograd.Function):
    """Gradient: torch's fused backward from the log-sum-exp. Tangent: `attention_jvp`."""

    @staticmethod
    def forward(q, k, v, mask, causal, scale):
        return primal.forward(q, k, v, mask, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.causal, ctx.scale = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.save_for_forward(q, k, v, mask)

    @staticmethod
    def backward(ctx, gradient, _lse):
        if gradient is None:
            return (None,) * 6
        q, k, v, mask, out, lse = ctx.saved_tensors
        found = _gradients(gradient, q, k, v, out, lse, mask, ctx.causal, ctx.scale, ctx.needs_input_grad[3])
        return (*found, None, None)

    @staticmethod
    def jvp(ctx, tq, tk, tv, tmask, _causal, _scale):
        q, k, v, mask = ctx.saved_tensors[:4]
        return carry(q, k, v, tq, tk, tv, mask, ctx.causal, ctx.scale, tmask)[1], None

    @staticmethod
    def vmap(info, in_dims, q, k, v, mask, causal, scale):
        folds, batch = info.batch_size, _mapped_batch((q, k, v), in_dims)
        q, k, v = (_fold(folds, batch, x, dim) for x, dim in zip((q, k, v), in_dims))
        out, lse = attend(q, k, v, _fold(folds, batch, mask, in_dims[3], mask=True), causal, scale)
        return (out.unflatten(0, (folds, batch)), lse.unflatten(0, (folds, batch))), (0, 0)


def _again(given: Sequence[Any], places: Sequence[int], causal: bool, scale: float) -> Callable[..., Any]:
    """(out, d_out) by the reference as a function of the arguments at `places`, for second derivatives."""

    def again(*moving: Tensor) -> tuple[Tensor, Tensor]:
        full = list(given)
        for i, x in zip(places, moving):
            full[i] = x
        q, k, v, tq, tk, tv, mask = full
        return reference(q, k, v, tq, tk, tv, mask, causal, scale)[:2]

    return again


class _Tangent(torch.autograd.Function):
    """`attention_jvp`, differentiable once more. The gradient that comes through `out` alone is torch's fused one; what
    comes through the tangent is recomputed by the reference."""

    @staticmethod
    def forward(q, k, v, tq, tk, tv, mask, causal, scale):
        return raw(q, k, v, tq, tk, tv, mask, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.causal, ctx.scale = inputs
        out, _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, gradient, tangent_gradient, _lse):
        *tensors, mask, out, lse = ctx.saved_tensors
        result: list[Any] = [None] * 9
        if tangent_gradient is None:
            if gradient is not None:
                masked = ctx.needs_input_grad[6]
                q, k, v = tensors[:3]
                found = _gradients(gradient, q, k, v, out, lse, mask, ctx.causal, ctx.scale, masked)
                result[0], result[1], result[2], result[6] = found
            return tuple(result)
        given = [*tensors, mask]
        places = [i for i in range(7) if ctx.needs_input_grad[i]]
        again = _again(given, places, ctx.causal, ctx.scale)
        if gradient is None:
            gradient = torch.zeros_like(out)
        found = torch.func.vjp(again, *(given[i] for i in places))[1]((gradient, tangent_gradient))  # type: ignore[misc]
        for i, x in zip(places, found):
            result[i] = x
        return tuple(result)

    @staticmethod
    def jvp(ctx, *tangents):
        given = list(ctx.saved_tensors[:7])
        places = [i for i in range(7) if tangents[i] is not None]
        again = _again(given, places, ctx.causal, ctx.scale)
        primals = tuple(given[i] for i in places)
        changes = torch.func.jvp(again, primals, tuple(tangents[i] for i in places))[1]  # type: ignore[misc]
        return (*changes, None)

    @staticmethod
    def vmap(info, in_dims, q, k, v, tq, tk, tv, mask, causal, scale):
        tensors = (q, k, v, tq, tk, tv)
        folds, batch = info.batch_size, _mapped_batch(tensors, in_dims)
        q, k, v, tq, tk, tv = (_fold(folds, batch, x, dim) for x, dim in zip(tensors, in_dims))
        outputs = carry(q, k, v, tq, tk, tv, _fold(folds, batch, mask, in_dims[6], mask=True), causal, scale)
        return tuple(x.unflatten(0, (folds, batch)) for x in outputs), (0, 0, 0)


@functools.cache
def _differentiable(function):
    """An autograd function, one node of a compiler's graph should one meet it. Imports torch._dynamo: on first use."""

    @torch.compiler.allow_in_graph
    def apply(*arguments):
        return function.apply(*arguments)

    return apply


def carry(q, k, v, tq, tk, tv, mask, causal, scale, tmask=None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, d_out, log-sum-exp) of checked arguments."""
    if tmask is not None or registration.tracing():
        return reference(q, k, v, tq, tk, tv, mask, causal, scale, tmask, whole=registration.tracing())
    given = [x for x in (q, k, v, tq, tk, tv, mask) if x is not None]
    if registration.differentiating(given):
        return _differentiable(_Tangent)(q, k, v, tq, tk, tv, mask, causal, scale)
    direct = registration.quiet() and registration.plain(given)
    return (compute if direct else raw)(q, k, v, tq, tk, tv, mask, causal, scale)


def attend(q, k, v, mask, causal, scale) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) of checked arguments."""
    if registration.differentiating([x for x in (q, k, v, mask) if x is not None]):
        _refuse_checkpoint()
        carried = _duals(q, k, v, mask, causal, scale)
        return carried or _differentiable(_Attention)(q, k, v, mask, causal, scale)
    return primal.forward(q, k, v, mask, causal, scale)


def _duals(q, k, v, mask, causal, scale) -> tuple[Tensor, Tensor] | None:
    """(out, log-sum-exp) where q, k or v are dual numbers on this very level: value and tangent in one pass, where the
    function's own rule would find the value first and again beside the tangent."""
    if forward_ad._current_level < 0 or (mask is not None and forward_ad.unpack_dual(mask).tangent is not None):
        return None
    parts = [forward_ad.unpack_dual(x) for x in (q, k, v)]
    tangents = [part.tangent for part in parts]
    if all(tangent is None for tangent in tangents):
        return None
    q, k, v = (part.primal for part in parts)
    tq, tk, tv = tangents
    out, tangent, lse = carry(q, k, v, tq, tk, tv, mask, causal, scale)
    return forward_ad.make_dual(out, tangent), lse


def _refuse_checkpoint() -> None:
    """Raise where torch.utils.checkpoint stands inside torch.func.jvp: its recomputation knows no tangents."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or "checkpoint" not in getattr(hooks[0], "__qualname__", "") or not torch.is_grad_enabled():
        return
    frame = inspect.currentframe()
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.endswith("eager_transforms.py") and "jvp" in name:
            return
        if path.endswith("checkpoint.py") and name == "checkpoint":
            break
        frame = frame.f_back
    if frame is not None and forward_ad._current_level >= 0:
        raise RuntimeError(
            "torch.utils.checkpoint inside torch.func.jvp cannot recompute tangents; checkpoint the block's jvp: "
            "checkpoint(lambda x, tx: torch.func.jvp(block, (x,), (tx,)), x, tx, use_reentrant=False)."
        )
