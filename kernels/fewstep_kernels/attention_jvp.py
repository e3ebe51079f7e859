"""Attention that carries a tangent: with S = scale q k^T + mask and P = softmax(S),

    out = P v
    d_out = W v - rowsum(W) out + P dv,    W = P * dS,    dS = scale (dq k^T + q dk^T)

in one pass over the keys that never holds P. Bytes moved at best: q, k, v and their tangents read once, two outputs
written once. Products: six for d_out and out where attention alone has two, so three times its arithmetic. It does not
help where N x M scores fit in a cache anyway.

`attention` is the function for networks: its forward-mode rule is `attention_jvp`, its gradient torch's fused one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from . import attention_primal as primal
from . import backends, registration

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    tmask: Tensor | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The defining implementation in plain torch operations: (out, d_out [B, H, N, E], log-sum-exp [B, H, N]).

    A tangent that is None is zero; tmask is the tangent of an added mask. Works through tiles of at most some
    `attention_primal.SCORES` scores (whole: one tile, as a compiler with symbolic lengths needs it).
    """
    accumulate, heads = primal.wide(q.dtype), k.shape[1]
    if k.shape[2] == 0 or q.numel() == 0 or v.shape[3] == 0:
        out, lse = primal.formulas(q, k, v, mask, causal, scale, whole)
        return out, torch.zeros_like(out), lse
    repeats = q.shape[1] // heads
    queries, keys, values = primal.grouped(q, heads), k.to(accumulate), v.to(accumulate)
    moving_queries = None if tq is None else primal.grouped(tq, heads)
    moving_keys = None if tk is None else tk.to(accumulate)
    moving_values = None if tv is None else tv.to(accumulate)
    moving_mask = None if tmask is None else primal.grouped(tmask.expand(*q.shape[:3], k.shape[2]), heads)
    results: tuple[list[list[Tensor]], ...] = ([], [], [])
    for stripe in primal.tiles(q, k, whole):
        for parts in results:
            parts.append([])
        for tile in stripe:
            part = tile[:2]
            rows = primal.folded(queries, tile, accumulate) * scale
            e, total, highest = primal.exponentials(rows, keys[part], mask, causal, tile, repeats)
            out = (e @ values[part]) / total
            change = None
            if moving_queries is not None:
                moved = primal.folded(moving_queries, tile, accumulate) * scale
                change = moved @ keys[part].transpose(-1, -2)
            if moving_keys is not None:
                moved = rows @ moving_keys[part].transpose(-1, -2)
                change = moved if change is None else change + moved
            if moving_mask is not None:
                moved = primal.folded(moving_mask, tile, accumulate)
                change = moved if change is None else change + moved
            tangent = torch.zeros_like(out)
            if change is not None:
                weights = e * change
                tangent = (weights @ values[part] - weights.sum(-1, keepdim=True) * out) / total
            if moving_values is not None:
                tangent = tangent + (e @ moving_values[part]) / total
            lse = (highest + total.log()).detach().squeeze(-1)
            for parts, x in zip(results, (out.to(q.dtype), tangent.to(q.dtype), lse)):
                parts[-1].append(x.unflatten(2, (repeats, -1)))
    out, tangent, lse = (primal.assemble(parts, q, heads) for parts in results)
    return out, tangent, lse


def _attention_jvp(q, k, v, tq, tk, tv, mask, causal, scale):
    if backends.choose("attention_jvp", q.device.type)[0] == "triton":
        from . import attention_jvp_kernels as kernels

        if kernels.serves(q, k, v):
            return kernels.call(q, k, v, tq, tk, tv, mask, causal, scale)
    return reference(q, k, v, tq, tk, tv, mask, causal, scale)


def _empty(q, k, v, tq, tk, tv, mask, causal, scale):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, torch.empty_like(out), q.new_empty(q.shape[:3], dtype=primal.wide(q.dtype))


_raw = registration.define(
    "_attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? mask, bool causal, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _attention_jvp,
    _empty,
)


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
        return _carry(q, k, v, tq, tk, tv, mask, ctx.causal, ctx.scale, tmask)[1], None

    @staticmethod
    def vmap(info, in_dims, q, k, v, mask, causal, scale):
        folds, batch = info.batch_size, _mapped_batch((q, k, v), in_dims)
        q, k, v = (_fold(folds, batch, x, dim) for x, dim in zip((q, k, v), in_dims))
        out, lse = _attend(q, k, v, _fold(folds, batch, mask, in_dims[3], mask=True), causal, scale)
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
        return _raw(q, k, v, tq, tk, tv, mask, causal, scale)

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
        outputs = _carry(q, k, v, tq, tk, tv, _fold(folds, batch, mask, in_dims[6], mask=True), causal, scale)
        return tuple(x.unflatten(0, (folds, batch)) for x in outputs), (0, 0, 0)


@functools.cache
def _differentiable(function):
    """An autograd function, one node of a compiler's graph should one meet it. Imports torch._dynamo: on first use."""

    @torch.compiler.allow_in_graph
    def apply(*arguments):
        return function.apply(*arguments)

    return apply


def _carry(q, k, v, tq, tk, tv, mask, causal, scale, tmask=None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, d_out, log-sum-exp) of checked arguments."""
    if tmask is not None or registration.tracing():
        return reference(q, k, v, tq, tk, tv, mask, causal, scale, tmask, whole=registration.tracing())
    if registration.differentiating([x for x in (q, k, v, tq, tk, tv, mask) if x is not None]):
        return _differentiable(_Tangent)(q, k, v, tq, tk, tv, mask, causal, scale)
    return _raw(q, k, v, tq, tk, tv, mask, causal, scale)


def _attend(q, k, v, mask, causal, scale) -> tuple[Tensor, Tensor]:
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
    out, tangent, lse = _carry(q, k, v, tq, tk, tv, mask, causal, scale)
    return forward_ad.make_dual(out, tangent), lse


def _refuse_checkpoint() -> None:
    """Raise where torch.utils.checkpoint stands inside torch.func.jvp: its recomputation knows no tangents."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or "checkpoint" not in hooks[0].__qualname__ or not torch.is_grad_enabled():
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


def _checked(name: str, q, k, v, tangents, mask, scale) -> tuple[list[Any], Tensor | None, float]:
    """q, k, v and tangents in one dtype, the mask with four dimensions, and the scale."""
    for x in (q, k, v):
        if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.ndim != 4:
            given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} takes floating-point q [B, H, N, D], k and v [B, H', M, D]; got {given}.")
    tensors = [q, k, v, *tangents]
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        tensors = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]
        q, k, v = tensors[:3]
    kinds = {x.dtype for x in tensors if x is not None}
    if len(kinds) > 1:
        raise TypeError(f"{name} takes tensors of one dtype; got {', '.join(sorted(str(kind) for kind in kinds))}.")
    (batch, heads, rows, width), (key_heads, keys) = q.shape, k.shape[1:3]
    if k.shape != (batch, key_heads, keys, width) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{name} takes q [B, H, N, D], k [B, H', M, D] and v [B, H', M, E]; "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if (key_heads == 0) != (heads == 0) or (key_heads and heads % key_heads):
        raise ValueError(f"{name} takes a multiple of the keys' {key_heads} heads as query heads; got {heads}.")
    for tensor, tangent in zip(tensors, tangents):
        if tangent is not None and tangent.shape != tensor.shape:
            raise ValueError(
                f"{name} takes tangents like q, k and v; got {list(tangent.shape)} for {list(tensor.shape)}."
            )
    if mask is not None:
        whole = (batch, heads, rows, keys)
        fits = isinstance(mask, Tensor) and mask.ndim <= 4 and (mask.dtype == torch.bool or mask.dtype in FLOATS)
        if not fits or any(size not in (1, full) for size, full in zip(mask.shape[::-1], whole[::-1])):
            given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{name} takes a boolean or floating-point mask that broadcasts to {list(whole)}; got {given}."
            )
        mask = mask[(None,) * (4 - mask.ndim)]
    return tensors, mask, float(scale) if scale is not None else 1.0 / math.sqrt(max(width, 1))


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, sums keep their float32; entering torch's own context costs microseconds, so only where it is needed."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its tangent along (tq, tk, tv): two tensors [B, H, N, E].

    q [B, H, N, D], k [B, H', M, D], v [B, H', M, E] in one of float32, bfloat16, float16, float64; H' divides H and
    query head h attends key head h // (H / H'). A tangent that is None is zero. mask: broadcasts to [B, H, N, M],
    boolean (True attends) or added to the scores, and constant; causal: query i attends keys 0..i; both may be given.
    scale: 1 / sqrt(D) when None. A query that attends nothing gives zero and a zero tangent. Accumulates in float32
    (float64 for float64); memory O(N + M). Differentiable: gradients through the first output alone are torch's fused
    ones, through the tangent they are recomputed by the reference, with O(N M) memory. Raises TypeError/ValueError
    naming what does not fit.
    """
    (q, k, v, tq, tk, tv), mask, scale = _checked("attention_jvp", q, k, v, (tq, tk, tv), mask, scale)
    with _no_autocast(q.device.type):
        return _carry(q, k, v, tq, tk, tv, mask, causal, scale)[:2]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention [B, H, N, E] for networks that are differentiated in any mode; arguments as in `attention_jvp`.

    Under torch.func.jvp and dual numbers it runs `attention_jvp`; its gradient is torch's fused backward, or plain
    operations where that is itself differentiated (torch.func.grad, create_graph), with O(N M) memory. A compiler or
    exporter sees plain aten operations. Raises RuntimeError under torch.utils.checkpoint inside torch.func.jvp.
    """
    (q, k, v), mask, scale = _checked("attention", q, k, v, (), mask, scale)
    with _no_autocast(q.device.type):
        if registration.tracing():
            return _traced(q, k, v, mask, causal, scale)
        return _attend(q, k, v, mask, causal, scale)[0]


def _traced(q, k, v, mask, causal, scale) -> Tensor:
    """What a compiler sees: torch's own attention, or formulas under a functorch transform, where that would raise."""
    plain = torch._C._functorch.peek_interpreter_stack() is None and mask is None and not torch.jit.is_tracing()
    if plain:
        grouped = q.shape[1] != k.shape[1]
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return primal.formulas(q, k, v, mask, causal, scale, whole=True)[0]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`attention` with the signature of torch.nn.functional's: [..., H, N, D] with any leading dimensions, or [N, D].

    Raises ValueError when dropout is asked for: the kernel has none.
    """
    if dropout_p:
        raise ValueError(f"this attention has no dropout; got dropout_p={dropout_p}, pass 0.")
    if not enable_gqa and query.ndim > 2 and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"query has {query.shape[-3]} heads and key {key.shape[-3]}; pass enable_gqa=True if that is meant."
        )
    if query.ndim == 4:
        return attention(query, key, value, mask=attn_mask, causal=is_causal, scale=scale)
    lead = query.shape[:-3]

    def four(x: Tensor) -> Tensor:
        return x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x.flatten(0, -4)

    if attn_mask is not None and attn_mask.ndim > 4:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    out = attention(four(query), four(key), four(value), mask=attn_mask, causal=is_causal, scale=scale)
    return out.reshape(*query.shape[:-1], value.shape[-1])


class carrying_tangents(TorchFunctionMode):
    """Within this context every torch.nn.functional.scaled_dot_product_attention without dropout is `attention`, so a
    network written with torch's function has tangents through this kernel."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is functional.scaled_dot_product_attention and not _dropout(*arguments, **named):
            return scaled_dot_product_attention(*arguments, **named)
        return function(*arguments, **named)


def _dropout(_query, _key, _value, attn_mask=None, dropout_p=0.0, **_) -> float:
    return dropout_p
