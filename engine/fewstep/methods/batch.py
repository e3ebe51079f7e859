"""What a method is given each iteration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Any, value: Any) -> Any:
    """`function` on every tensor of a condition, which may be a tensor, a tuple, a list, a mapping of them, or None."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, item) for item in value)
    return value


@dataclass
class Batch:
    """One micro-batch.

    index int64 [B]: global sample numbers; x0 [B, C, H, W]: clean data; cond: conditions (labels int64 [B], or a
    structure of tensors [B, ...]); null: the null condition like `cond`; pair: (z, x0_hat), a noise and the teacher's
    answer; path [B, F, C, H, W]: a teacher's recorded states; mask [B, ...]: which elements count.
    """

    index: Tensor
    x0: Tensor = None  # type: ignore[assignment]  # None only for methods that need no samples
    cond: Any = None
    null: Any = None
    pair: tuple[Tensor, Tensor] | None = None
    path: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """This batch on `device`, its floating-point tensors in `dtype`."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

        return Batch(**{field.name: map_tensors(move, getattr(self, field.name)) for field in fields(self)})

    def part(self, start: int, stop: int) -> Batch:
        """Samples start .. stop - 1."""

        def cut(value: Tensor) -> Tensor:
            return value[start:stop]

        return Batch(**{field.name: map_tensors(cut, getattr(self, field.name)) for field in fields(self)})
