"""A small convolutional U-Net.  Ho et al. 2020, arXiv:2006.11239.

The embedding scales and shifts each block as in Dhariwal and Nichol 2021, arXiv:2105.05233.

Its encoder is light: a convolution a level, blocks where they are asked for. On 8x8 digits, at equal training time on a
CPU, it came nearer to held-out data than a DiT (patches of 4) and repeated its training set less than a residual MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import UserError
from fewstep.nets.conditioning import Conditioned, Conditioning


def _norm(width: int, affine: bool = True) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, width // 16), width, affine=affine)


def _zero(layer: nn.Conv2d) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Block(nn.Module):
    """h + conv2(silu(norm(conv1(silu(norm(h)))) * (1 + scale) + shift)); the second convolution starts at zero.

    Shapes: h [B, width, H, W], embedding [B, embedding_width] -> [B, width, H, W].
    """

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.first_norm = _norm(width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(embedding_width, 2 * width)
        self.second_norm = _norm(width, affine=False)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        _zero(self.second)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        inner = self.first(functional.silu(self.first_norm(h)))
        return h + self.second(functional.silu(self.second_norm(inner) * (1 + scale) + shift))


class Blocks(nn.ModuleList):
    """Blocks of one level, in turn."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for block in self:
            h = block(h, embedding)
        return h


class UNet(Conditioned):
    """`net(x, t, cond=None, s=None, w=None)` -> [B, C, H, W], like x.

    Shapes: x [B, channels, image_size, image_size]; t [B] network times; cond int64 [B] in [0, classes], `classes`
    being null; s, w [B] where `inputs` names them.
    widths: channels at each level, full size first, each level half the size of the one before; encoder_blocks and
    decoder_blocks: blocks at each level but the lowest; middle_blocks: blocks at the lowest; embedding: width of the
    conditioning. The last layer starts at zero.
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int = 8,
        widths: Sequence[int] = (16, 48),
        encoder_blocks: Sequence[int] = (0,),
        middle_blocks: int = 2,
        decoder_blocks: Sequence[int] = (1,),
        embedding: int = 64,
        classes: int = 0,
        inputs: Sequence[str] = (),
    ) -> None:
        super().__init__()
        lower = len(widths) - 1
        if len(encoder_blocks) != lower or len(decoder_blocks) != lower:
            raise UserError(
                f"a UNet of {len(widths)} widths has encoder_blocks {list(encoder_blocks)} and decoder_blocks "
                f"{list(decoder_blocks)}; give {lower} of each, one for every level but the lowest."
            )
        if image_size % 2**lower:
            raise UserError(f"image_size {image_size} cannot be halved {lower} times; choose a multiple of {2**lower}.")
        self.config = {
            "name": "unet",
            "channels": channels,
            "image_size": image_size,
            "widths": list(widths),
            "encoder_blocks": list(encoder_blocks),
            "middle_blocks": middle_blocks,
            "decoder_blocks": list(decoder_blocks),
            "embedding": embedding,
            "classes": classes,
            "inputs": list(inputs),
        }

        def blocks(width: int, count: int) -> Blocks:
            return Blocks(Block(width, embedding) for _ in range(count))

        self.conditioning = Conditioning(classes, embedding, inputs)
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        levels = range(lower)
        self.encoder = nn.ModuleList(blocks(widths[i], encoder_blocks[i]) for i in levels)
        self.down = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 2, stride=2) for i in levels)
        self.middle = blocks(widths[-1], middle_blocks)
        self.up = nn.ModuleList(nn.ConvTranspose2d(widths[i + 1], widths[i], 2, stride=2) for i in levels)
        self.decoder = nn.ModuleList(blocks(widths[i], decoder_blocks[i]) for i in levels)
        self.norm = _norm(widths[0])
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)
        _zero(self.last)
        self.taps = {f"decoder.{i}.{j}": widths[i] for i in levels for j in range(decoder_blocks[i])}
        self.taps |= {f"middle.{j}": widths[-1] for j in range(middle_blocks)}  # last: what a discriminator looks at

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        return self.answer(self.hidden(x, t, cond, s, w))

    def hidden(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        """[B, widths[0], H, W]: what the last layer reads."""
        embedding = self.conditioning(t, cond, {"s": s, "w": w})
        h = self.first(x)
        passed: list[Tensor] = []
        for blocks, down in zip(self.encoder, self.down):
            h = blocks(h, embedding)
            passed.append(h)
            h = down(h)
        h = self.middle(h, embedding)
        for blocks, up, level in zip(list(self.decoder)[::-1], list(self.up)[::-1], passed[::-1]):
            h = blocks(level + up(h), embedding)
        return h

    def answer(self, h: Tensor) -> Tensor:
        """The last layer."""
        return self.last(functional.silu(self.norm(h)))
