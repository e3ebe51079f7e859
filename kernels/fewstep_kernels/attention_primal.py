"""Attention without a tangent, and its gradient: torch's own fused operators where they serve, formulas elsewhere.

`out = softmax(scale q k^T + mask) v`. Here a mask is [1 or B, 1 or H, 1 or N, 1 or M], boolean (True attends) or added;
causal means that query i attends keys 0..i, as in torch. A query that attends nothing gives zeros, and -inf as
log-sum-exp. Queries may have R times as many heads as keys; head h attends key head h // R.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

SCORES = 1 << 18  # entries of a score tile that the formulas hold at a time: 1 MiB in float32, what a core keeps near
ROWS = 64  # queries of a tile at least, for products worth their call


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiles(q: Tensor, k: Tensor, whole: bool = False) -> Iterator[Iterator[tuple[slice, slice, slice]]]:
    """(samples, key heads, queries) of tiles of at most some `SCORES` scores; one inner iterator for each sample range
    and head range, samples outermost. whole: a single tile."""
    batch, heads, count = q.shape[0], k.shape[1], q.shape[2]
    if whole:
        yield iter([(slice(None), slice(None), slice(None))])
        return
    repeats, keys = q.shape[1] // max(heads, 1), max(k.shape[2], 1)
    rows = min(count, max(ROWS, SCORES // (keys * repeats)))
    pairs = max(1, SCORES // max(repeats * rows * keys, 1))
    many = min(heads, pairs)
    samples = min(batch, max(1, pairs // max(many, 1)))
    for b in range(0, batch, max(samples, 1)):
        for h in range(0, heads, max(many, 1)):
            yield (
                (slice(b, b + samples), slice(h, h + many), slice(n, n + rows)) for n in range(0, count, max(rows, 1))
            )


def grouped(x: Tensor, heads: int) -> Tensor:
    """[B, H, N, D] -> [B, heads, R, N, D]: queries (or what is like them) by the key head that they attend."""
    return x.unflatten(1, (heads, x.shape[1] // heads))


def folded(x: Tensor, tile: tuple[slice, slice, slice], dtype: torch.dtype) -> Tensor:
    """A tile of a grouped tensor as rows of its key heads: [b, h, R n, D]."""
    return x[tile[0], tile[1], :, tile[2]].to(dtype).flatten(2, 3)


def exponentials(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, tile: tuple[slice, slice, slice], repeats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(e, l, m) of a tile: exp(S - m) [b, h, R n, M], its row sums and row maxima [b, h, R n, 1].

    q, scaled already: [b, h, R n, D]. A row that attends nothing has e = 0, l = 1 and m = -inf.
    """
    scores = q @ k.transpose(-1, -2)
    rows = scores.shape[2] // repeats
    if mask is not None:
        part = mask[tile[0] if mask.shape[0] > 1 else slice(None)]
        if mask.shape[1] == 1:
            part = part[:, :, None]  # [b, 1, 1, n, M]
        else:
            part = grouped(part, mask.shape[1] // repeats)[:, tile[1]]
        part = part[..., tile[2], :] if mask.shape[2] > 1 else part
        scores = scores.unflatten(2, (repeats, rows))
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~part, -torch.inf)
        else:
            scores = scores + part.to(scores.dtype)
        scores = scores.flatten(2, 3)
    if causal:
        first = tile[2].start or 0
        query = torch.arange(first, first + rows, device=q.device)
        later = torch.arange(k.shape[2], device=q.device) > query[:, None]
        scores = scores.unflatten(2, (repeats, rows)).masked_fill(later, -torch.inf).flatten(2, 3)
    highest = scores.detach().amax(-1, keepdim=True)
    if mask is None:
        terms = (scores - highest).exp_()
        return terms, terms.sum(-1, keepdim=True), highest
    dead = highest == -torch.inf
    terms = (scores - highest.masked_fill(dead, 0.0)).exp_()
    return terms, terms.sum(-1, keepdim=True) + dead.to(terms.dtype), highest


def assemble(parts: list[list[Tensor]], q: Tensor, heads: int) -> Tensor:
    """Tiles' results [b, h, R, n, ...] in the order of `tiles`, as one [B, H, N, ...]."""
    stripes = [row[0] if len(row) == 1 else torch.cat(row, 3) for row in parts]
    if len(stripes) > 1:
        across = heads // stripes[0].shape[1] + (heads % stripes[0].shape[1] > 0)
        stripes = [torch.cat(stripes[i : i + across], 1) for i in range(0, len(stripes), across)]
        stripes = [torch.cat(stripes, 0)]
    return stripes[0].flatten(1, 2)


def _combined(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """Mask and causality as one added mask in q's dtype, expanded to [1 or B, 1 or H, N, M]."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    mask = mask.to(q.dtype).expand(*mask.shape[:2], q.shape[2], k.shape[2])
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu_(1)
        mask = mask.masked_fill(later, -torch.inf)
    return mask


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    """Which of torch's operators serves: "cpu", "flash", "efficient" or None."""
    if 0 in (*q.shape, *k.shape) or q.shape[-1] != v.shape[-1]:
        return None
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda" or q.dtype == torch.float64 or q.shape[-1] % 8 or q.shape[-1] > 256:
        return None
    half = q.dtype in (torch.bfloat16, torch.float16)
    square = not causal or q.shape[2] == k.shape[2]
    if half and mask is None and square and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return "flash"
    return "efficient" if square or mask is not None else None


def _repeated(k: Tensor, heads: int) -> Tensor:
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """An added mask as the efficient kernels read it: [B, H, N, M] with rows that start at multiples of 16."""
    if mask is None:
        return None
    keys = mask.shape[-1]
    return functional.pad(mask, (0, -keys % 16))[..., :keys].expand(*q.shape[:2], q.shape[2], keys)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, N, E], log-sum-exp [B, H, N] in float32 or float64)."""
    kind = fused(q, k, v, mask, causal)
    if kind is None:
        return formulas(q, k, v, mask, causal, scale)
    mask = _combined(mask, causal, q, k)
    causal = causal and mask is None
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    aten = torch.ops.aten
    if kind == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    elif kind == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    else:
        bias = _bias(mask, q)
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
        lse = lse[..., : q.shape[2]]
    return out, lse


def formulas(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, whole: bool = False):
    """`forward` in plain torch operations, a tile at a time."""
    accumulate, heads = wide(q.dtype), k.shape[1]
    if k.shape[2] == 0 or q.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf, dtype=accumulate)
    repeats = q.shape[1] // heads
    queries, keys, values = grouped(q, heads), k.to(accumulate), v.to(accumulate)
    outs: list[list[Tensor]] = []
    logs: list[list[Tensor]] = []
    for stripe in tiles(q, k, whole):
        outs.append([])
        logs.append([])
        for tile in stripe:
            e, total, highest = exponentials(
                folded(queries, tile, accumulate) * scale, keys[tile[:2]], mask, causal, tile, repeats
            )
            out = (e @ values[tile[:2]]) / total
            outs[-1].append(out.to(q.dtype).unflatten(2, (repeats, -1)))
            logs[-1].append((highest + total.log()).detach().squeeze(-1).unflatten(2, (repeats, -1)))
    return assemble(outs, q, heads), assemble(logs, q, heads)


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from forward's outputs; torch's fused backward, or the formulas."""
    kind = fused(q, k, v, mask, causal)
    if kind is None:
        return gradients(gradient, q, k, v, mask, causal, scale)[:3]
    mask = _combined(mask, causal, q, k)
    causal = causal and mask is None
    heads, repeats = k.shape[1], q.shape[1] // k.shape[1]
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    if mask is not None:  # a query that attends nothing: exp(S - inf) = 0
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    aten = torch.ops.aten
    if kind == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    else:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        if kind == "flash":
            found = aten._scaled_dot_product_flash_attention_backward(
                gradient, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed, scale=scale
            )
        else:
            padded = functional.pad(lse, (0, -q.shape[2] % 32), value=torch.inf)
            wanted = [True, True, True, False]
            found = aten._scaled_dot_product_efficient_attention_backward(
                gradient, q, k, v, _bias(mask, q), out, padded, seed, seed, 0.0, wanted, causal, scale=scale
            )[:3]
    dq, dk, dv = found
    if repeats > 1:
        dk, dv = (x.unflatten(1, (heads, repeats)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def gradients(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    with_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, if wanted, of an added mask, in plain torch operations: differentiable again."""
    accumulate, heads = wide(q.dtype), k.shape[1]
    if k.shape[2] == 0 or q.numel() == 0:
        empty = torch.zeros_like(mask) if with_mask and mask is not None else None
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), empty
    repeats = q.shape[1] // heads
    queries, keys, values = grouped(q, heads), k.to(accumulate), v.to(accumulate)
    pulled = grouped(gradient, heads)
    dqs: list[list[Tensor]] = []
    dms: list[list[Tensor]] = []
    dks, dvs = [], []
    for stripe in tiles(q, k):
        dqs.append([])
        dms.append([])
        dk = dv = None
        for tile in stripe:
            rows, g = folded(queries, tile, accumulate) * scale, folded(pulled, tile, accumulate)
            e, total, _ = exponentials(rows, keys[tile[:2]], mask, causal, tile, repeats)
            p = e / total
            dp = g @ values[tile[:2]].transpose(-1, -2)
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            dqs[-1].append((ds @ keys[tile[:2]] * scale).to(q.dtype).unflatten(2, (repeats, -1)))
            dk = (0 if dk is None else dk) + ds.transpose(-1, -2) @ rows
            dv = (0 if dv is None else dv) + p.transpose(-1, -2) @ g
            if with_mask:
                dms[-1].append(ds.unflatten(2, (repeats, -1)))
        dks.append([dk[:, :, None]])  # type: ignore[index]
        dvs.append([dv[:, :, None]])  # type: ignore[index]
    found = None
    if with_mask and mask is not None:
        found = assemble(dms, q, heads).sum_to_size(mask.shape).to(mask.dtype)
    return assemble(dqs, q, heads), assemble(dks, k, heads).to(k.dtype), assemble(dvs, k, heads).to(v.dtype), found
