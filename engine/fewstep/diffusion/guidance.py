"""Classifier-free guidance, linear form: F = w cond + (1 - w) uncond (2207.12598, eq. 6, with w = 1 + its w).

Conversions between prediction types are affine with the same coefficient on x for both outputs, so guiding F, x0 or eps
is the same thing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.real import Number, Real
from fewstep.errors import UserError


def is_guided(guidance: Real | None) -> bool:
    """Whether a scale needs the unconditional output at all (None and 1.0 do not)."""
    return guidance is not None and (isinstance(guidance, Tensor) or float(guidance) != 1.0)


def coefficients(guidance: Real) -> tuple[Number, Number]:
    """(of cond, of uncond)."""
    return guidance, 1.0 - guidance


def joined(first: Any, second: Any, out: Any = None) -> Any:
    """Two conditions as one of doubled batch: tensors are concatenated, tuples, lists and dicts item by item."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second], out=out) if out is not None else torch.cat([first, second])
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: joined(first[key], second[key], out[key] if out else None) for key in first}
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)) and len(first) == len(second):
        return type(first)(joined(a, b, out[i] if out else None) for i, (a, b) in enumerate(zip(first, second)))
    if first is None and second is None:
        return None
    raise UserError(
        f"guidance joins the condition ({type(first).__name__}) and the unconditional one ({type(second).__name__}) in "
        "one call; give both as tensors, or as tuples or dicts of tensors of one structure."
    )
