"""What the tests of the per-sample reductions share: shapes, dtypes, drawn tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COUNTS = (1, 17, 63, 500, 4097, 8191)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GENERATOR = torch.Generator().manual_seed(11)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


def error(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth.double()).abs().max().item()


def nan_filled(make: Callable) -> Callable:
    """The function, its new tensors filled with NaN: what an operator leaves unwritten shows."""

    def made(*arguments: Any, **options: Any) -> Any:
        found = make(*arguments, **options)
        for x in (found,) if isinstance(found, Tensor) else found:
            x.fill_(float("nan"))
        return found

    return made


def one_and_two_threads(compute: Callable[[], Any]) -> Iterable[Any]:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            yield compute()
    finally:
        torch.set_num_threads(threads)
