"""What a grid is searched on: samples by number, in chunks, with the progress of the network calls they cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

import fewstep_kernels as fk
from fewstep.artefact import Artefact


def noise(model: Artefact, seed: int, index: Sequence[int]) -> Tensor:
    """Standard normal noise of these samples, the same in whatever chunk."""
    seeds = torch.tensor([seed * 2**32 + i for i in index], dtype=torch.int64, device=device_of(model))
    return fk.normal(seeds, model.image_shape)


def labels(model: Artefact, index: Sequence[int]) -> Tensor | None:
    if model.classes is None:
        return None
    return torch.tensor([i % model.classes for i in index], dtype=torch.int64, device=device_of(model))


def device_of(model: Artefact) -> torch.device:
    return next(model.denoiser.parameters()).device


@contextmanager
def counted(
    model: Artefact, samples: int, batch: int, evaluations: int, progress: Callable[[str], None]
) -> Iterator[Iterator[list[int]]]:
    """Sample numbers in chunks, shown as network calls done of all: a bar on a terminal, else a line a chunk."""
    chunks = [list(range(i, min(i + batch, samples))) for i in range(0, samples, batch)]
    total = len(chunks) * evaluations
    shown = sys.stderr.isatty()
    bar = tqdm(total=total, desc="search-grid", unit="call", dynamic_ncols=True, disable=not shown)
    hook = model.denoiser.net.register_forward_hook(lambda *_: bar.update() and None)

    def each() -> Iterator[list[int]]:
        for number, chunk in enumerate(chunks, 1):
            yield chunk
            if not shown:
                progress(f"search-grid: {number * evaluations} of {total} network calls")

    try:
        yield each()
    finally:
        hook.remove()
        bar.close()
