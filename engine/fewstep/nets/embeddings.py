"""How a network is told the time and the label."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def positional_features(t: Tensor, width: int, max_frequency: float = 32.0) -> Tensor:
    """Cosines and sines of `t` at frequencies spaced geometrically from 1/2 to `max_frequency`.

    The highest frequency stays low because d(network)/dt grows with it, which continuous-time consistency cannot bear
    (Lu and Song 2024, arXiv:2410.11081, section 4.1).

    Shapes: t [B] -> [B, width] with `width` even.
    """
    half = width // 2
    exponents = torch.arange(half, device=t.device, dtype=t.dtype) / max(half - 1, 1)
    frequencies = 0.5 * torch.exp(exponents * math.log(2.0 * max_frequency))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """A scalar network time [B] -> [B, width], through positional features and a two-layer perceptron."""

    def __init__(self, width: int, features: int = 64, max_frequency: float = 32.0) -> None:
        super().__init__()
        self.features = features
        self.max_frequency = max_frequency
        self.perceptron = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.perceptron(positional_features(t, self.features, self.max_frequency))


class LabelEmbedding(nn.Module):
    """A class label int64 [B] in [0, classes] -> [B, width]; the label `classes` is the null condition."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, label: Tensor) -> Tensor:
        return self.table(label)

    def null(self, label: Tensor) -> Tensor:
        return torch.full_like(label, self.classes)
