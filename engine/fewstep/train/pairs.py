"""Pairs (z, x0_hat) that a stage asks for: what a network makes of fixed noises, generated once before the stage."""

from __future__ import annotations

import torch
from torch import Tensor

import fewstep_kernels as fk
from fewstep import solvers
from fewstep.methods import Batch, Pairs
from fewstep.methods.batch import map_tensors
from fewstep.nets.network import Network

STREAM = 0x70616972


class PairSet:
    """z, x0_hat [count, ...] and the conditions they were made with (labels [count], or None)."""

    def __init__(self, noise: Tensor, images: Tensor, cond: Tensor | None) -> None:
        self.noise, self.images, self.cond = noise, images, cond

    def batch(self, index: Tensor) -> Batch:
        """The pairs whose turn it is: sample number modulo count."""
        chosen = index % len(self.noise)
        cond = map_tensors(lambda value: value[chosen], self.cond)
        return Batch(index=index, cond=cond, pair=(self.noise[chosen], self.images[chosen]))

    def tensors(self) -> dict[str, Tensor]:
        held = {"noise": self.noise, "images": self.images}
        return held if self.cond is None else {**held, "cond": self.cond}


def make(
    request: Pairs,
    network: Network,
    shape: tuple[int, ...],
    classes: int | None,
    seed: int,
    batch: int,
    device: torch.device,
) -> PairSet:
    """Run the network along the plan from `count` noises, labels in turn. Every rank makes all, equal to the bit."""
    noises, images, labels = [], [], []
    for first in range(0, request.count, batch):
        numbers = torch.arange(first, min(first + batch, request.count), device=device)
        seeds = numbers + seed * 0x1000003
        noise = fk.normal(seeds, shape, stream=STREAM)
        cond = numbers % classes if classes else None
        with torch.no_grad():
            images.append(solvers.sample(network.module, request.plan, noise, cond=cond, seeds=seeds))
        noises.append(noise)
        labels.append(cond)
    cond = torch.cat([label for label in labels if label is not None]) if classes else None
    return PairSet(torch.cat(noises), torch.cat(images), cond)
