"""Which image serves which sample: every loader asks here, so all of them serve equal batches in equal order.

Samples are numbered without end. Sample n belongs to epoch n // N and is image permutation(seed, epoch)[n % N]; a batch
may straddle two epochs, and no image is ever dropped. Step k of global batch size B holds samples kB .. kB + B - 1, and
rank r of W takes the slots rB/W .. (r + 1)B/W - 1 of each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` images in one epoch, int64 [count]: ranks of Philox4x64 words under the key (seed, epoch).

    Raw Philox words are fixed by its definition, so the order changes with no version of NumPy.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Order:
    """The endless order of `count` images as one rank sees it. `batch_size` is the global one, over all ranks."""

    count: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError("the data set holds no image; give one with at least one image.")
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise UserError(f"rank {self.rank} of {self.world} does not exist; ranks are 0 to world - 1.")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise UserError(
                f"data.batch_size {self.batch_size} must be a positive multiple of the {self.world} processes."
            )

    @property
    def local_size(self) -> int:
        """Samples of each global batch that this rank serves."""
        return self.batch_size // self.world

    def samples(self, step: int) -> Tensor:
        """Running sample numbers of this rank at `step`, int64 [local_size]."""
        first = step * self.batch_size + self.rank * self.local_size
        return torch.arange(first, first + self.local_size)

    def images(self, step: int) -> Tensor:
        """The images that serve those samples, int64 [local_size]."""
        samples = self.samples(step).numpy()
        epochs, places = np.divmod(samples, self.count)
        chosen = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permutation(self.count, self.seed, int(epoch))[places[here]]
        return torch.from_numpy(chosen)
