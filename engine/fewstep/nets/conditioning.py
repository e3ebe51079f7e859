"""What a picture network is told beside the picture: noise level, label and, where a method asks, further scalars."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import choose
from fewstep.nets.embeddings import LabelEmbedding, TimeEmbedding

SCALARS = ("s", "w")


class Conditioning(nn.Module):
    """(t [B], label int64 [B] or None, s=[B], w=[B]) -> [B, width], the vector that modulates every block.

    t, and s the target of a jump, are network times; w is a guidance scale. `inputs` names which of s and w there are.
    The embedding of each ends in a layer that starts at zero: a network that gains an input answers as it did before.
    Without label: the null condition. `classes=0`: no label at all.
    """

    def __init__(self, classes: int, width: int, inputs: Sequence[str] = ()) -> None:
        super().__init__()
        for name in inputs:
            if name not in SCALARS:
                raise choose("further input of the network", name, SCALARS)
        self.time = TimeEmbedding(width)
        self.label = LabelEmbedding(classes, width) if classes else None
        self.scalars = nn.ModuleDict({name: TimeEmbedding(width) for name in inputs})
        for embedding in self.scalars.children():
            for parameter in list(embedding.parameters())[-2:]:
                nn.init.zeros_(parameter)

    def forward(self, t: Tensor, label: Tensor | None, scalars: Mapping[str, Tensor | None]) -> Tensor:
        embedding = self.time(t)
        if self.label is not None:
            if label is None:
                label = torch.full(t.shape, self.label.classes, dtype=torch.int64, device=t.device)
            embedding = embedding + self.label(label)
        for name, value in scalars.items():
            if value is not None:
                if name not in self.scalars:
                    raise choose("further input of the network", name, list(self.scalars))
                embedding = embedding + self.scalars[name](value)
        return functional.silu(embedding)

    def null(self, label: Tensor | None) -> Tensor | None:
        return None if self.label is None or label is None else self.label.null(label)


class Conditioned(nn.Module):
    """A network with a `conditioning`, a `config` that rebuilds it, and `taps` {submodule: width}, usual one last."""

    config: dict[str, Any]
    taps: dict[str, int]
    conditioning: Conditioning

    def null(self, cond: Tensor | None) -> Tensor | None:
        """The null condition like `cond`; None for a network without labels."""
        return self.conditioning.null(cond)

    def with_inputs(self, *inputs: str) -> nn.Module:
        """A copy that also takes the scalars `inputs` ("s", "w"), and answers as this one until it is trained."""
        config = {**self.config, "inputs": sorted({*self.config["inputs"], *inputs})}
        options = {key: value for key, value in config.items() if key != "name"}
        parameter = next(self.parameters())
        grown = type(self)(**options).to(parameter.device, parameter.dtype)
        grown.load_state_dict(copy.deepcopy(self.state_dict()), strict=False)
        return grown.train(self.training)
