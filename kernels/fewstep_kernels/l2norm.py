"""The length of many tensors taken as one vector, and the factor that clips it, both left on the device.

    norm = sqrt(sum of x^2 over all tensors),    clip = min(1, max_norm / (norm + 1e-6))

Deterministic: stretches of 8192 elements are summed in float64, each by itself, then the partial sums in order. A
non-finite gradient makes the norm non-finite, which is what `adamw_ema_step` takes as its guard. Bytes moved at best:
every element read once. It does not help where the norm is read on the host anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, native, registration
from .layout import is_dense

_SHARE = 8192  # FEWSTEP_L2NORM_SHARE


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32


def reference(tensors: Sequence[Tensor]) -> Tensor:
    """The defining implementation, in plain torch operations."""
    return torch.stack([x.double().square().sum() for x in tensors]).sum().sqrt().to(_wide(tensors))


def _norm(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    ready = all(x.dtype in native.DTYPES and (x.is_contiguous() or is_dense(x.shape, x.stride())) for x in tensors)
    if backends.choose("multi_tensor_l2norm", first.device.type)[0] == "reference" or not ready:
        return reference(tensors)
    values: list[int] = []
    stretches = 0
    for x in tensors:
        values += (x.data_ptr(), native.DTYPES[x.dtype], x.numel())
        stretches += -(-x.numel() // _SHARE)
    partials = torch.empty(max(stretches, 1), dtype=torch.float64, device=first.device)
    out = _empty(tensors)
    native.call(
        "multi_tensor_l2norm",
        first,
        len(tensors),
        native.table(values),
        partials.data_ptr(),
        out.data_ptr(),
        native.DTYPES[out.dtype],
    )
    return out


def _empty(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=_wide(tensors))


_raw = registration.define("_multi_tensor_l2norm(Tensor[] tensors) -> Tensor", _norm, _empty)


def multi_tensor_l2norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all elements of all tensors: 0-d, float32 (float64 if any tensor is), on their device.

    Any shapes, strides and float dtypes; differentiable. Raises ValueError on an empty list or several devices.
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("multi_tensor_l2norm takes at least one tensor; got none.")
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"multi_tensor_l2norm takes tensors on one device; got {', '.join(sorted(map(str, devices)))}."
        )
    if registration.tracing() or registration.differentiating(tensors):
        return reference(tensors)
    return _norm(tensors) if registration.quiet() else _raw(tensors)


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)) as torch.nn.utils.clip_grad_norm_ has it: 0-d, on norm's device."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
