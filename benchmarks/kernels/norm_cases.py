"""What the two benchmarks of normalisation share: one case, checked against float64 before anything is timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import copy_of, interleaved, summary
from torch import Tensor

from fewstep_kernels import backend
from fewstep_kernels.normalisation import Form, Parameters, worthwhile


def named(operator: str, groups: int, x: Tensor, given: Parameters, backward: bool) -> str:
    """The operator and what serves it here: what plain torch does faster goes to plain torch."""
    x = x.detach().requires_grad_(backward)
    form = Form(operator, groups, 1e-5, bool(groups))
    return f"{operator} ({backend(operator, 'cpu') if worthwhile(form, x, given) else 'plain torch'})"


def _pass(function: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor | None) -> list[Tensor]:
    if gradient is None:
        with torch.inference_mode():
            return [function(*tensors)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def case(
    title: str,
    ours: str,
    candidates: dict[str, Callable[..., Tensor]],
    tensors: list[Tensor],
    backward: bool,
    rounds: int,
) -> dict:
    """Times of every candidate on (x, parameters...); the candidate called `ours` comes first.

    Bytes: x read, y written; backward also x and the gradient read, the gradient of x written. The truth is torch's own
    operations in float64 (`eager torch`).
    """
    x = tensors[0]
    gradient = torch.randn_like(x) if backward else None
    wide = [t.double().contiguous() for t in tensors]
    truth = _pass(candidates["eager torch"], wide, None if gradient is None else gradient.double().contiguous())
    bound = 4e-6 if x.dtype == torch.float32 else 2e-2  # of the largest value: some float32 roundings, or bfloat16's
    for name, function in candidates.items():
        for found, expected in zip(_pass(function, tensors, gradient), truth):
            error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
            if not error < bound * (10 if backward else 1):
                raise SystemExit(f"{name} is wrong by {error} of the largest value: no times are printed.")
    size = x.numel() * x.element_size()
    read, written = (3 * size, 2 * size) if backward else (size, size)
    floor = "copy of the same bytes"
    timed: dict[str, Callable[[], object]] = {
        name: (lambda function=function: _pass(function, tensors, gradient)) for name, function in candidates.items()
    }
    timed[floor] = copy_of(read, written)
    seconds = interleaved(timed, rounds)
    return {
        "case": title,
        "shape": tuple(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "moved_bytes": read + written,
        "read_to_write": "3:2" if backward else "1:1",
        "results": summary(seconds, ours, floor, read + written),
    }
