"""A network that also tells how its noise estimate changes along the path.  GENIE: Dockhorn et al. 2022, 2210.05475.

One call gives both: the head reads what the network's last layer reads, and costs little beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import UserError
from fewstep.nets import mlp, registry, unet
from fewstep.nets.conditioning import Conditioning


class Genie(nn.Module):
    """`net(x, t, cond=None)` -> [B, 4 C, ...]: the base's answer, then k1, k2, k3 (section 3).

    d eps/d gamma = -k1/gamma + k2 gamma/(1 + gamma^2) + k3/(gamma (1 + gamma^2)), with gamma = sigma/alpha. A fresh
    head says zero. base: a UNet or an MLP, or the config of one. The head is a layer to `width` channels from x, the
    base's answer and what its last layer reads, `blocks` residual blocks told the time, and a layer to 3 C.
    """

    def __init__(self, base: Mapping[str, Any] | nn.Module, width: int = 64, blocks: int = 1) -> None:
        super().__init__()
        net: Any = base if isinstance(base, nn.Module) else registry.build(base)
        if not hasattr(net, "hidden") or not hasattr(net, "answer"):
            raise UserError(
                f"a GENIE head reads what a network's last layer reads, and {type(net).__name__} does not give it "
                "(no hidden and answer); take a unet or an mlp."
            )
        self.config = {"name": "genie", "base": registry.described(net), "width": width, "blocks": blocks}
        self.base = net
        self.maps = "channels" in net.config
        groups = max(1, width // 16)
        if width < 1 or blocks < 0 or (self.maps and width % groups):
            raise UserError(
                f"a GENIE head got width={width!r} and blocks={blocks!r}; give a multiple of 16 channels and 0 or more "
                "blocks."
            )
        size = net.config["channels"] if self.maps else net.config["dim"]
        features = net.config["widths"][0] if self.maps else net.config["width"]
        self.conditioning = Conditioning(0, width)
        self.first: nn.Module
        self.last: nn.Module
        if self.maps:
            self.first = nn.Conv2d(2 * size + features, width, 3, padding=1)
            self.blocks = nn.ModuleList(unet.Block(width, width) for _ in range(blocks))
            self.norm: nn.Module = nn.GroupNorm(groups, width)
            self.last = nn.Conv2d(width, 3 * size, 3, padding=1)
        else:
            self.first = nn.Linear(2 * size + features, width)
            self.blocks = nn.ModuleList(mlp.Block(width, 0.0) for _ in range(blocks))
            self.norm = mlp.LayerNorm(width)
            self.last = nn.Linear(width, 3 * size)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        hidden = self.base.hidden(x, t, cond)
        answer = self.base.answer(hidden).reshape(x.shape)
        read = [x, answer, hidden] if self.maps else [x.flatten(1), answer.flatten(1), hidden]
        h, embedding = self.first(torch.cat(read, 1)), self.conditioning(t, None, {})
        for block in self.blocks:
            h = block(h, embedding)
        parts = self.last(functional.silu(self.norm(h)))
        return torch.cat([answer, parts.reshape(-1, 3 * x.shape[1], *x.shape[2:])], 1)

    def null(self, cond: Any) -> Any:
        """The base's."""
        return self.base.null(cond)
