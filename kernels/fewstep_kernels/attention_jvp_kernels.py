# ruff: noqa: RUF005 - Triton adds tuples and knows no unpacking
# mypy: disable-error-code="assignment"
"""The Triton kernel of `attention_jvp`: one program per block of queries carries the running maximum m, the sums
l = sum p and r = sum p dS, and the products p v and (p dS) v + p dv over the keys.

A width is one power of two, or two of them (72 = 64 + 8 padded to 16) where that pads less. All lengths are run-time
values; addresses are 64-bit. Block sizes were chosen by what the compiler reports, not on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backends


@triton.jit
def load_rows(pointer, stride, rows, inside, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr):
    """[rows, WIDTH] as pieces [rows, A] and, if B, [rows, B], zero outside."""
    pointers = pointer + rows[:, None] * stride
    left = tl.arange(0, A)[None, :]
    x = tl.load(pointers + left, mask=inside[:, None] & (left < WIDTH), other=0.0)
    if B == 0:
        return (x.to(DOT),)
    else:
        right = A + tl.arange(0, B)[None, :]
        y = tl.load(pointers + right, mask=inside[:, None] & (right < WIDTH), other=0.0)
        return (x.to(DOT), y.to(DOT))


@triton.jit
def store_rows(pointer, stride, rows, inside, pieces, WIDTH: tl.constexpr, A: tl.constexpr):
    for i in tl.static_range(len(pieces)):
        columns = i * A + tl.arange(0, pieces[i].shape[1])
        within = inside[:, None] & (columns[None, :] < WIDTH)
        tl.store(pointer + rows[:, None] * stride + columns[None, :], pieces[i].to(pointer.dtype.element_ty), within)


@triton.jit
def scores_of(total, rows, columns, PRECISION: tl.constexpr):
    """total + rows columns^T over all pieces: [BLOCK_N, BLOCK_M]; total may be None."""
    if total is None:
        total = tl.dot(rows[0], tl.trans(columns[0]), input_precision=PRECISION)
    else:
        total = tl.dot(rows[0], tl.trans(columns[0]), total, input_precision=PRECISION)
    for i in tl.static_range(1, len(rows)):
        total = tl.dot(rows[i], tl.trans(columns[i]), total, input_precision=PRECISION)
    return total


@triton.jit
def step(
    state,
    queries,
    moving_queries,
    k,
    tk,
    v,
    tv,
    strides,  # of k, tk, v and tv, the mask's rows and columns; then how many queries are left
    mask,
    start,
    keys,
    first,  # query of this block
    scale,
    WIDTHS: tl.constexpr,  # of keys and values, each with its two pieces
    FLAGS: tl.constexpr,  # tangents of q, k and v; mask none, boolean or added; causal
    EDGE: tl.constexpr,  # whether some scores of this block lie outside
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    highest, total, shift, out, tangent = state
    WIDTH: tl.constexpr = WIDTHS[0]
    A: tl.constexpr = WIDTHS[1]
    B: tl.constexpr = WIDTHS[2]
    VALUE_WIDTH: tl.constexpr = WIDTHS[3]
    VALUE_A: tl.constexpr = WIDTHS[4]
    VALUE_B: tl.constexpr = WIDTHS[5]
    LOG2_E: tl.constexpr = 1.4426950408889634
    local = tl.arange(0, BLOCK_M)
    query, key = first + tl.arange(0, BLOCK_N), start + local
    wide = tl.cast(start, tl.int64)
    inside = key < keys if EDGE else local < BLOCK_M
    columns = load_rows(k + wide * strides[0], strides[0], local, inside, WIDTH, A, B, DOT)
    scores = scores_of(None, queries, columns, PRECISION)
    unit = scale * LOG2_E  # of the scores; positive
    change = None
    if FLAGS[0]:
        change = scores_of(None, moving_queries, columns, PRECISION)
    if FLAGS[1]:
        moving = load_rows(tk + wide * strides[1], strides[1], local, inside, WIDTH, A, B, DOT)
        change = scores_of(change, queries, moving, PRECISION)
    if FLAGS[3] != 0:
        place = mask + wide * strides[5] + tl.arange(0, BLOCK_N)[:, None] * strides[4] + local[None, :] * strides[5]
        # rows beyond the last query read the mask nowhere
        given = tl.load(place, mask=(tl.arange(0, BLOCK_N) < strides[6])[:, None] & inside[None, :], other=0)
        if FLAGS[3] == 1:
            scores = tl.where(given != 0, scores, float("-inf"))
        else:
            scores = scores * unit + given.to(tl.float32) * LOG2_E
            unit = 1.0
    if EDGE:
        seen = inside[None, :]
        if FLAGS[4]:
            seen = seen & (key[None, :] <= query[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    raised = tl.maximum(highest, tl.max(scores, 1) * unit)
    level = tl.where(raised == float("-inf"), 0.0, raised) if FLAGS[3] != 0 else raised
    p = tl.exp2(scores * unit - level[:, None])
    decay = tl.exp2(highest - level)
    total = total * decay + tl.sum(p, 1)
    values = load_rows(v + wide * strides[2], strides[2], local, inside, VALUE_WIDTH, VALUE_A, VALUE_B, DOT)
    rounded = p.to(DOT)
    new_out, new_tangent = (), ()
    for i in tl.static_range(len(values)):
        new_out = new_out + (tl.dot(rounded, values[i], out[i] * decay[:, None], input_precision=PRECISION),)
        new_tangent = new_tangent + (tangent[i] * decay[:, None],)
    if FLAGS[0] or FLAGS[1]:
        weights = p * (change * scale)
        shift = shift * decay + tl.sum(weights, 1)
        small = weights.to(DOT)
        sums = ()
        for i in tl.static_range(len(values)):
            sums = sums + (tl.dot(small, values[i], new_tangent[i], input_precision=PRECISION),)
        new_tangent = sums
    if FLAGS[2]:
        moving = load_rows(tv + wide * strides[3], strides[3], local, inside, VALUE_WIDTH, VALUE_A, VALUE_B, DOT)
        sums = ()
        for i in tl.static_range(len(values)):
            sums = sums + (tl.dot(rounded, moving[i], new_tangent[i], input_precision=PRECISION),)
        new_tangent = sums
    return raised, total, shift, new_out, new_tangent


@triton.jit
def attention_jvp_kernel(
    q,
    k,
    v,
    tq,
    tk,
    tv,
    mask,
    out,
    tangent,
    lse,
    batch_strides,  # of q, k, v, tq, tk, tv, in UNITs
    head_strides,
    row_strides,
    mask_strides,  # batch, head, row, column, in elements
    out_strides,  # batch, head, row, in UNITs; the tangent's too
    rows,
    keys,
    heads,
    repeats,
    blocks,  # cdiv(rows, BLOCK_N)
    scale,
    WIDTHS: tl.constexpr,
    FLAGS: tl.constexpr,
    UNIT: tl.constexpr,  # what divides all strides: rows that start at multiples of 16 bytes are read in such pieces
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest first where causal
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    g = h // repeats
    first = block * BLOCK_N
    local = tl.arange(0, BLOCK_N)
    inside = first + local < rows
    far = first.to(tl.int64)
    WIDTH: tl.constexpr = WIDTHS[0]
    A: tl.constexpr = WIDTHS[1]
    B: tl.constexpr = WIDTHS[2]
    VALUE_WIDTH: tl.constexpr = WIDTHS[3]
    VALUE_A: tl.constexpr = WIDTHS[4]
    VALUE_B: tl.constexpr = WIDTHS[5]
    q += (b * batch_strides[0] + h * head_strides[0] + far * row_strides[0]) * UNIT
    k += (b * batch_strides[1] + g * head_strides[1]) * UNIT
    v += (b * batch_strides[2] + g * head_strides[2]) * UNIT
    queries = load_rows(q, row_strides[0] * UNIT, local, inside, WIDTH, A, B, DOT)
    moving_queries = queries
    if FLAGS[0]:
        tq += (b * batch_strides[3] + h * head_strides[3] + far * row_strides[3]) * UNIT
        moving_queries = load_rows(tq, row_strides[3] * UNIT, local, inside, WIDTH, A, B, DOT)
    if FLAGS[1]:
        tk += (b * batch_strides[4] + g * head_strides[4]) * UNIT
    if FLAGS[2]:
        tv += (b * batch_strides[5] + g * head_strides[5]) * UNIT
    if FLAGS[3] != 0:
        mask += b * mask_strides[0] + h * mask_strides[1] + far * mask_strides[2]
    strides = (
        row_strides[1] * UNIT,
        row_strides[4] * UNIT,
        row_strides[2] * UNIT,
        row_strides[5] * UNIT,
        mask_strides[2],
        mask_strides[3],
        rows - first,
    )
    zero = tl.zeros([BLOCK_N], tl.float32)
    if VALUE_B == 0:
        nothing = (tl.zeros([BLOCK_N, VALUE_A], tl.float32),)
    else:
        nothing = (tl.zeros([BLOCK_N, VALUE_A], tl.float32), tl.zeros([BLOCK_N, VALUE_B], tl.float32))
    state = (zero - float("inf"), zero, zero, nothing, nothing)
    end = keys
    whole = keys // BLOCK_M * BLOCK_M
    if FLAGS[4]:
        end = tl.minimum(keys, first + BLOCK_N)
        whole = tl.minimum(keys, first + 1) // BLOCK_M * BLOCK_M
    for start in tl.range(0, whole, BLOCK_M):
        state = step(
            state, queries, moving_queries, k, tk, v, tv, strides, mask, start, keys, first, scale,
            WIDTHS, FLAGS, False, BLOCK_N, BLOCK_M, DOT, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, end, BLOCK_M):
        state = step(
            state, queries, moving_queries, k, tk, v, tv, strides, mask, start, keys, first, scale,
            WIDTHS, FLAGS, True, BLOCK_N, BLOCK_M, DOT, PRECISION,
        )  # fmt: skip
    highest, total, shift, sums, moving_sums = state
    total = tl.where(total == 0.0, 1.0, total)
    values, tangents = (), ()
    for i in tl.static_range(len(sums)):
        value = sums[i] / total[:, None]
        values = values + (value,)
        tangents = tangents + ((moving_sums[i] - shift[:, None] * value) / total[:, None],)
    place = (b * out_strides[0] + h * out_strides[1] + far * out_strides[2]) * UNIT
    store_rows(out + place, out_strides[2] * UNIT, local, inside, values, VALUE_WIDTH, VALUE_A)
    store_rows(tangent + place, out_strides[2] * UNIT, local, inside, tangents, VALUE_WIDTH, VALUE_A)
    LN_2: tl.constexpr = 0.6931471805599453
    tl.store(lse + pair.to(tl.int64) * rows + first + local, (highest + tl.log2(total)) * LN_2, inside)


def pieces(width: int) -> tuple[int, int]:
    """A width as one power of two (and 0) or two: 40 -> (32, 16), 64 -> (64, 0), 96 -> (64, 32), 112 -> (128, 0)."""
    whole = max(16, triton.next_power_of_2(width))
    left = whole // 2
    right = max(16, triton.next_power_of_2(width - left)) if width > left else 0
    return (left, right) if left >= 16 and 0 < right < left else (whole, 0)


def tile(width: int, value_width: int, element_size: int, capability: int, masked: bool) -> dict[str, int]:
    """Block sizes and launch options, by the wider padded width: those with the fewest instructions a score that spill
    little and, on sm_100, ask for no more tensor memory than there is (Triton then compiles a trap). Untimed."""
    widest = max(sum(pieces(width)), sum(pieces(value_width)))
    if element_size == 4:
        rows, keys = 64, 16
    elif capability == 90 and widest <= 192:
        rows, keys = 128, 64 if widest <= 96 else 32 if widest <= 160 else 16
    elif widest > 160:
        rows, keys = 32, 16
    elif widest > 128:
        rows, keys = 64, 32 if capability in (100, 103) else 16
    elif capability in (100, 103):
        rows, keys = 128, 32
    else:
        rows, keys = 128, 64 if widest <= 48 else 32 if widest <= 80 else 16
    stages = 3 if capability == 90 and element_size == 2 and widest <= 160 and not masked else 2
    if masked:  # its addresses take as many registers as two score tiles
        keys = 16
    return {"BLOCK_N": rows, "BLOCK_M": keys, "num_warps": 8, "num_stages": stages}


def serves(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether the kernel takes these tensors. The reference takes the rest: float32 wider than 64, which has no matrix
    instructions of its accuracy and would spill, goes through its tiles to the BLAS."""
    widest = max(q.shape[3], v.shape[3])
    if widest > 256 or scale == 0 or 0 in (*q.shape, *k.shape, v.shape[3]):
        return False
    return q.dtype in (torch.bfloat16, torch.float16) or (q.dtype == torch.float32 and widest <= 64)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    outputs: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, d_out, log-sum-exp), written to contiguous `outputs` where given."""
    batch, heads, rows, width = q.shape
    keys, value_width = k.shape[2], v.shape[3]
    if scale < 0:  # the kernel takes the maximum of the products themselves
        q, tq, scale = -q, None if tq is None else -tq, -scale
    if outputs is None:
        out = q.new_empty(batch, heads, rows, value_width)
        outputs = out, torch.empty_like(out), q.new_empty(batch, heads, rows, dtype=torch.float32)
    out, tangent, lse = outputs
    flags = (
        tq is not None,
        tk is not None,
        tv is not None,
        0 if mask is None else 1 + mask.is_floating_point(),
        causal,
    )
    given = [
        x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, *(q if x is None else x for x in (tq, tk, tv)))
    ]
    if mask is None:
        mask, mask_strides = q, (0, 0, 0, 0)
    else:
        mask_strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    strides = [x.stride()[:3] for x in (*given, out)]
    unit = 16 // q.element_size()
    if any(stride % unit for s in strides for stride in s):
        unit = 1
    batch_strides, head_strides, row_strides = zip(*([stride // unit for stride in s] for s in strides[:6]))
    major, minor = (9, 0) if q.device.type == "cpu" else torch.cuda.get_device_capability(q.device)
    options = tile(width, value_width, q.element_size(), 10 * major + minor, flags[3] != 0)
    blocks = triton.cdiv(rows, options["BLOCK_N"])
    kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    with torch.cuda.device_of(q):
        attention_jvp_kernel[(batch * heads * blocks,)](
            *given,
            mask,
            out,
            tangent,
            lse,
            batch_strides,
            head_strides,
            row_strides,
            mask_strides,
            tuple(stride // unit for stride in strides[6]),
            rows,
            keys,
            heads,
            heads // k.shape[1],
            blocks,
            scale,
            WIDTHS=(width, *pieces(width), value_width, *pieces(value_width)),
            FLAGS=flags,
            UNIT=unit,
            # the interpreter multiplies no bfloat16
            DOT=tl.float32 if backends.interpreting() else kinds[q.dtype],
            PRECISION="ieee",
            **options,
        )
    return outputs
