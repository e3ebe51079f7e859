"""A residual perceptron for data of few dimensions: what the analytic tests and small studies train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.nets.embeddings import LabelEmbedding, TimeEmbedding


class Block(nn.Module):
    """h + W2 silu(W1 (norm(h) + e)), the second layer starting at zero so that a fresh block is the identity."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.second(self.dropout(torch.nn.functional.silu(self.first(self.norm(h) + embedding))))


class MLP(nn.Module):
    """`net(x, t, cond=None, s=None)` for x of `dim` elements a sample, in any shape.

    Shapes: x [B, ...] with prod(...) == dim; t, s [B] network times; cond int64 [B], `classes` being null.
    `times=2` makes a two-time network that must be given s. The last layer starts at zero.
    """

    def __init__(
        self, dim: int, width: int = 64, depth: int = 2, classes: int = 0, times: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "name": "mlp",
            "dim": dim,
            "width": width,
            "depth": depth,
            "classes": classes,
            "times": times,
            "dropout": dropout,
        }
        self.first = nn.Linear(dim, width)
        self.time = TimeEmbedding(width)
        self.target_time = TimeEmbedding(width) if times == 2 else None
        self.label = LabelEmbedding(classes, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.taps = {f"blocks.{i}": width for i in range(depth)}

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        embedding = self.time(t)
        if self.target_time is not None:
            if s is None:
                raise ValueError("a two-time network needs the target time s; call it with s=...")
            embedding = embedding + self.target_time(s)
        if self.label is not None:
            if cond is None:
                cond = torch.full(t.shape, self.label.classes, dtype=torch.int64, device=t.device)
            embedding = embedding + self.label(cond)
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(h).reshape(x.shape)

    def null(self, cond: Tensor | None) -> Tensor | None:
        """The null condition like `cond`; None for a network without labels."""
        return None if self.label is None or cond is None else self.label.null(cond)
