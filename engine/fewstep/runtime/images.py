"""Images in [-1, 1] as PNG pictures."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError


def picture(image: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """One image [1 or 3, H, W] in [-1, 1], clipped, as an 8-bit picture, enlarged to (width, height) if given."""
    if image.ndim != 3 or image.shape[0] not in {1, 3}:
        raise UserError(f"an image of shape {list(image.shape)} cannot be drawn; it must have 1 or 3 channels.")
    levels = (image.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy()
    drawn = Image.fromarray(np.ascontiguousarray(levels[:, :, 0] if image.shape[0] == 1 else levels))
    return drawn if size is None else drawn.resize(size, Image.Resampling.NEAREST)


def png(drawn: Image.Image) -> bytes:
    """The picture as PNG bytes; the same picture gives the same bytes."""
    stream = io.BytesIO()
    drawn.save(stream, format="PNG")
    return stream.getvalue()


def grid(images: Tensor, *, columns: int | None = None, scale: int = 1, gap: int = 1) -> Image.Image:
    """Images [B, C, H, W] row by row, each pixel drawn `scale` times, `gap` scaled pixels between."""
    height, width = images.shape[-2:]
    tiles = [picture(image, (width * scale, height * scale)) for image in images]
    return side_by_side(tiles, columns=columns, gap=gap * scale)


def side_by_side(tiles: Sequence[Image.Image], *, columns: int | None = None, gap: int | None = None) -> Image.Image:
    """Pictures of one size as one, row by row (as square as can be), with white gaps (an eighth of a picture)."""
    width, height = tiles[0].size
    gap = max(1, width // 8) if gap is None else gap
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    white = 255 if tiles[0].mode == "L" else (255, 255, 255)
    sheet = Image.new(tiles[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), white)
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def save_grid(
    images: Tensor, path: str | os.PathLike[str], *, columns: int | None = None, scale: int | None = None
) -> Path:
    """Write images [B, C, H, W] in [-1, 1] as one PNG; small images are enlarged to about 64 pixels each."""
    target = Path(path)
    scale = scale or max(1, 64 // max(images.shape[-2:]))
    content = png(grid(images, columns=columns, scale=scale))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r} ({error.strerror}); give a writable path.") from error
    return target
