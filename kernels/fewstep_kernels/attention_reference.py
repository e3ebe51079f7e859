"""What `attention_jvp` computes, in plain torch operations, and the raw operator that a kernel serves where it can."""

from __future__ import annotations

import torch
from torch import Tensor

from . import attention_native, backends, registration
from . import attention_primal as primal


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
                # dS less its mean first: what moves all scores alike costs no digits
                weights = e * (change - (e * change).sum(-1, keepdim=True) / total)
                tangent = (weights @ values[part]) / total
            if moving_values is not None:
                tangent = tangent + (e @ moving_values[part]) / total
            lse = (highest + total.log()).detach().squeeze(-1)
            for parts, x in zip(results, (out.to(q.dtype), tangent.to(q.dtype), lse)):
                parts[-1].append(x.unflatten(2, (repeats, -1)))
    out, tangent, lse = (primal.assemble(parts, q, heads) for parts in results)
    return out, tangent, lse


def compute(q, k, v, tq, tk, tv, mask, causal, scale) -> tuple[Tensor, Tensor, Tensor]:
    """(out, d_out, log-sum-exp) by the backend of the tensors' device; knows no derivatives, as `raw` does not."""
    served = backends.choose("attention_jvp", q.device.type)[0]
    if served == "cpu" and attention_native.serves(q, k, v):
        return attention_native.call(q, k, v, tq, tk, tv, mask, causal, scale)
    if served == "triton":
        from . import attention_jvp_kernels as kernels

        if kernels.serves(q, k, v, scale):
            return kernels.call(q, k, v, tq, tk, tv, mask, causal, scale)
    return reference(q, k, v, tq, tk, tv, mask, causal, scale)


def _empty(q, k, v, tq, tk, tv, mask, causal, scale):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, torch.empty_like(out), q.new_empty(q.shape[:3], dtype=primal.wide(q.dtype))


raw = registration.define(
    "_attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? mask, bool causal, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    compute,
    _empty,
)
