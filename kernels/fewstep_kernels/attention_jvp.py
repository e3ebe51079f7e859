"""Attention that carries a tangent: with S = scale q k^T + mask and P = softmax(S),

    out = P v
    d_out = W v - rowsum(W) out + P dv,    W = P * dS,    dS = scale (dq k^T + q dk^T)

in one pass over the keys that never holds P. Bytes moved at best: q, k, v and their tangents read once, two outputs
written once. Products: six for d_out and out where attention alone has two, so three times its arithmetic. C++ on a
CPU, Triton on a GPU. It does not help one or two queries against many keys: there plain torch serves.

`attention` is the function for networks: its forward-mode rule is `attention_jvp`, its gradient torch's fused one.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from . import attention_primal as primal
from . import registration
from .attention_derivatives import attend, carry

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    for x in (*tensors, mask):
        if isinstance(x, Tensor) and x.device != q.device:
            raise ValueError(f"{name} takes tensors of one device; got {q.device} and {x.device}.")
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
        return carry(q, k, v, tq, tk, tv, mask, causal, scale)[:2]


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
        return attend(q, k, v, mask, causal, scale)[0]


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


_TORCHS = functional.scaled_dot_product_attention


def _in_its_place(*arguments, **named) -> Tensor:
    """`scaled_dot_product_attention`, or torch's where there is dropout."""
    return (_TORCHS if _dropout(*arguments, **named) else scaled_dot_product_attention)(*arguments, **named)


class carrying_tangents(TorchFunctionMode):
    """Within this context every torch.nn.functional.scaled_dot_product_attention without dropout is `attention`, so a
    network written with torch's function, or with torch.nn.MultiheadAttention, has tangents through this kernel."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is _TORCHS:
            return _in_its_place(*arguments, **named)
        if function is not functional.multi_head_attention_forward:
            return function(*arguments, **named)
        # a function of Python's that calls the other where no mode sees it
        before = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = _in_its_place
        try:
            return function(*arguments, **named)
        finally:
            functional.scaled_dot_product_attention = before


def _dropout(_query, _key, _value, attn_mask=None, dropout_p=0.0, *_rest, **_named) -> float:
    return dropout_p
