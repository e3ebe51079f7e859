"""Elementary functions of a real number that is a Python float (float64 arithmetic) or a tensor (its own dtype).

Schedules, prediction types and solver rows are written once with these, so a plan compiled on the host and a row
computed per sample on the device come from the same formula. Floats give limits (log 0 = -inf) instead of raising.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

Real: TypeAlias = "float | Tensor"
Number: TypeAlias = Any  # what comes out: a float for floats, a tensor for a tensor


def is_tensor(*values: object) -> bool:
    return any(isinstance(value, Tensor) for value in values)


def constant(like: Real, value: float) -> Number:
    """`value` in the form (float, or tensor of the same shape) of `like`."""
    return torch.full_like(like, value) if isinstance(like, Tensor) else float(value)


def exp(a: Real) -> Number:
    if isinstance(a, Tensor):
        return torch.exp(a)
    try:
        return math.exp(a)
    except OverflowError:
        return math.inf


def log(a: Real) -> Number:
    if isinstance(a, Tensor):
        return torch.log(a)
    return math.log(a) if a > 0 else (-math.inf if a == 0 else math.nan)


def expm1(a: Real) -> Number:
    return torch.expm1(a) if isinstance(a, Tensor) else math.expm1(a)


def sqrt(a: Real) -> Number:
    return torch.sqrt(a) if isinstance(a, Tensor) else math.sqrt(a)


def sqrt_or_zero(a: Real) -> Number:
    """sqrt(max(a, 0)): for differences of squares that rounding may leave a little below zero."""
    return torch.sqrt(torch.clamp(a, min=0.0)) if isinstance(a, Tensor) else math.sqrt(max(a, 0.0))


def sin(a: Real) -> Number:
    return torch.sin(a) if isinstance(a, Tensor) else math.sin(a)


def cos(a: Real) -> Number:
    return torch.cos(a) if isinstance(a, Tensor) else math.cos(a)


def atan(a: Real) -> Number:
    return torch.atan(a) if isinstance(a, Tensor) else math.atan(a)


def atan2(a: Real, b: Real) -> Number:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.atan2(a, b)
    return math.atan2(a, b)


def softplus(a: Real) -> Number:
    """log(1 + e^a), without overflow."""
    if isinstance(a, Tensor):
        return torch.logaddexp(a, torch.zeros_like(a))
    if math.isinf(a):
        return a if a > 0 else 0.0
    return max(a, 0.0) + math.log1p(math.exp(-abs(a)))


def divide(a: Real, b: Real) -> Number:
    """a / b, with the limits of IEEE arithmetic for floats too."""
    if is_tensor(a, b) or b != 0:
        return a / b
    return math.nan if a == 0 else math.copysign(math.inf, a)


def select(condition: bool | Tensor, a: Real, b: Real) -> Number:
    """`a` where the condition holds, else `b`."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def isinf(a: Real) -> bool:
    """Whether a float is infinite (a tensor is never asked: that would read the device)."""
    return not isinstance(a, Tensor) and math.isinf(a)
