"""A diffusion transformer.  Peebles and Xie 2022, arXiv:2212.09748, with adaLN-Zero blocks (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.nets.conditioning import Conditioned, Conditioning
from fewstep_kernels import attention, layer_norm_modulate

FUSED_FROM = 128  # tokens; on two CPU cores the ways cost the same at 64, the written one twice as much at 256


class Block(nn.Module):
    """Attention, then a perceptron, each modulated before and gated after by the embedding; the gates start at zero.

    Shapes: h [B, N, width], embedding [B, width] -> [B, N, width].
    """

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width)
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift, gate, scale2, shift2, gate2 = self.modulation(embedding).chunk(6, dim=-1)
        h = h + gate[:, None] * self.mix(self._attention(layer_norm_modulate(h, scale, shift)))
        return h + gate2[:, None] * self.perceptron(layer_norm_modulate(h, scale2, shift2))

    def _attention(self, h: Tensor) -> Tensor:
        """Written out for few tokens, where that is as fast; both ways have all derivatives, which torch's function has
        not."""
        size, tokens, width = h.shape
        separated = self.query_key_value(h).reshape(size, tokens, 3, self.heads, width // self.heads)
        query, key, value = separated.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, width / heads]
        if tokens >= FUSED_FROM:
            mixed = attention(query, key, value)
        else:
            mixed = (query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1) @ value
        return mixed.transpose(1, 2).reshape(size, tokens, width)


class DiT(Conditioned):
    """`net(x, t, cond=None, s=None, w=None)` -> [B, C, H, W], like x.

    Shapes: x [B, channels, image_size, image_size]; t [B] network times; cond int64 [B] in [0, classes], `classes`
    being null; s, w [B] where `inputs` names them. The picture becomes (image_size / patch)^2 tokens; ratio: hidden
    width of a block's perceptron by its width. The last layer starts at zero.
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int = 8,
        patch: int = 2,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        classes: int = 0,
        ratio: int = 4,
        inputs: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise UserError(f"patch {patch} does not divide image_size {image_size}; choose a divisor.")
        if width % heads:
            raise UserError(f"heads {heads} does not divide width {width}; choose a divisor.")
        self.config = {
            "name": "dit",
            "channels": channels,
            "image_size": image_size,
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
            "classes": classes,
            "ratio": ratio,
            "inputs": list(inputs),
        }
        self.patch = patch
        self.conditioning = Conditioning(classes, width, inputs)
        self.first = nn.Linear(channels * patch**2, width)
        self.position = nn.Parameter(0.1 * torch.randn((image_size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, channels * patch**2)
        for layer in (self.modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.taps = {f"blocks.{i}": width for i in range(depth)}

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        embedding = self.conditioning(t, cond, {"s": s, "w": w})
        size, channels, height, width = x.shape
        p = self.patch
        cut = x.reshape(size, channels, height // p, p, width // p, p)
        h = self.first(cut.permute(0, 2, 4, 1, 3, 5).reshape(size, -1, channels * p * p)) + self.position
        for block in self.blocks:
            h = block(h, embedding)
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        tokens = self.last(layer_norm_modulate(h, scale, shift))
        pasted = tokens.reshape(size, height // p, width // p, channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return pasted.reshape(size, channels, height, width)
