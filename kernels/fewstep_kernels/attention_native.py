"""`attention_jvp` in C++ (csrc/cpu/attention.cpp)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native
from .attention_primal import wide

_int, _pointer = ctypes.c_int64, ctypes.c_void_p
_SIZES = ("batch", "heads", "key_heads", "rows", "keys", "width", "value_width", "dtype", "causal")
_TENSORS = ("q", "k", "v", "tq", "tk", "tv")


FEW = 64  # queries: what the kernel takes at a time


class _Rows(ctypes.Structure):
    _fields_ = tuple((name, _int) for name in ("data", "batch_stride", "head_stride", "row_stride"))


class _Mask(ctypes.Structure):
    _fields_ = (*_Rows._fields_, ("column_stride", _int), ("dtype", _int))


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in _SIZES),
        ("scale", ctypes.c_double),
        *((name, _Rows) for name in _TENSORS),
        ("mask", _Mask),
        *((name, _pointer) for name in ("out", "tangent", "lse")),
    )


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is something to compute, and torch's products of single rows are not faster.

    The kernel takes 16 queries at a time, however many there are. With one or two for each key head, plain torch takes
    0.4 to 0.9 of its time once keys hold some 10^5 numbers; below that its twenty calls cost more, and from three
    queries on it takes longer (measured with AVX-512, float32 and bfloat16, widths 40 to 128).
    """
    if 0 in (*q.shape, *v.shape):
        return False
    batch, heads, keys, width = k.shape
    return q.shape[1] * q.shape[2] > 2 * heads or batch * heads * keys * width < 1 << 17


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
    if outputs is None:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        outputs = out, torch.empty_like(out), q.new_empty(q.shape[:3], dtype=wide(q.dtype))
    if q.shape[1] > k.shape[1] and q.shape[2] < FEW and mask is None and not causal:
        # all queries of a key head side by side
        together = q.shape[0], k.shape[1], -1, q.shape[3]
        q, tq = q.reshape(together), None if tq is None else tq.reshape(together)
    batch, heads, rows, width = q.shape
    job = _Job(batch, heads, k.shape[1], rows, k.shape[2], width, v.shape[3], native.DTYPES[q.dtype], causal, scale)
    kept = []  # copies must outlive the call
    for name, x in zip(_TENSORS, (q, k, v, tq, tk, tv)):
        if x is not None:
            if x.stride(3) != 1 and x.shape[3] > 1:
                x = x.contiguous()
                kept.append(x)
            setattr(job, name, _Rows(x.data_ptr(), *x.stride()[:3]))
    if mask is not None:
        strides = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
        job.mask = _Mask(
            mask.data_ptr(), *strides, native.BOOL if mask.dtype == torch.bool else native.DTYPES[mask.dtype]
        )
    job.out, job.tangent, job.lse = (x.data_ptr() for x in outputs)
    native.call("attention_jvp", q, ctypes.byref(job))
    return outputs
