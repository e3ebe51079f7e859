"""A residual perceptron for data of few dimensions: what the analytic tests and small studies train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.nets.conditioning import Conditioned, Conditioning
from fewstep_kernels import layer_norm_modulate


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm by the fused operator: the gradient of torch's own tangent is wrong (torch 2.13)."""

    def forward(self, h: Tensor) -> Tensor:
        return layer_norm_modulate(h, None, None, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """h + W2 silu(W1 (norm(h) + e)), the second layer starting at zero so that a fresh block is the identity."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.second(self.dropout(torch.nn.functional.silu(self.first(self.norm(h) + embedding))))


class MLP(Conditioned):
    """`net(x, t, cond=None, s=None, w=None)` for x of `dim` elements a sample, in any shape.

    Shapes: x [B, ...] with prod(...) == dim; t [B] network times; cond int64 [B] in [0, classes], `classes` being null;
    s, w [B] where `inputs` names them. The last layer starts at zero.
    """

    def __init__(
        self,
        dim: int,
        width: int = 64,
        depth: int = 2,
        classes: int = 0,
        dropout: float = 0.0,
        inputs: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config = {
            "name": "mlp",
            "dim": dim,
            "width": width,
            "depth": depth,
            "classes": classes,
            "dropout": dropout,
            "inputs": list(inputs),
        }
        self.conditioning = Conditioning(classes, width, inputs)
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.taps = {f"blocks.{i}": width for i in range(depth)}

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        return self.answer(self.hidden(x, t, cond, s, w)).reshape(x.shape)

    def hidden(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        """[B, width]: what the last layer reads."""
        embedding = self.conditioning(t, cond, {"s": s, "w": w})
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return h

    def answer(self, h: Tensor) -> Tensor:
        """The last layer, [B, dim]."""
        return self.last(h)
