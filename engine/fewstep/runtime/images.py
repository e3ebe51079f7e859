"""Images in [-1, 1] as PNG pictures."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError

LARGEST_SHEET = 89_478_485  # pixels; Pillow takes larger pictures for an attack when it opens them
BLOCK = 4096  # bytes of the disk that a file takes at a time


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


class Sheet:
    """One picture of `count` images [C, H, W], row by row, as square as can be, filled a batch at a time.

    Small images are enlarged to about 64 pixels each, less where there are many. Raises `UserError` where even without
    that the picture has more than `LARGEST_SHEET` pixels.
    """

    def __init__(
        self, count: int, shape: Sequence[int], *, columns: int | None = None, scale: int | None = None, gap: int = 1
    ) -> None:
        if len(shape) != 3 or shape[0] not in {1, 3}:
            raise UserError(f"images of shape {list(shape)} cannot be drawn; they must have 1 or 3 channels.")
        self.columns = columns or math.ceil(math.sqrt(count))
        rows = math.ceil(count / self.columns)
        height, width = shape[-2:]
        bare = (self.columns * (width + gap) - gap) * (rows * (height + gap) - gap)
        if bare > LARGEST_SHEET:
            raise UserError(
                f"{count} images of {width} x {height} make one picture of {bare / 1e6:,.0f} million pixels, and "
                f"{LARGEST_SHEET / 1e6:.0f} are the most that viewers open; draw fewer, or give a "
                "folder for one picture each."
            )
        usual = max(1, 64 // max(height, width))
        self.scale = scale or max(1, min(usual, math.isqrt(LARGEST_SHEET // bare)))
        self.gap, self.filled = gap * self.scale, 0
        self.tile = (width * self.scale, height * self.scale)
        mode, white = ("L", 255) if shape[0] == 1 else ("RGB", (255, 255, 255))
        size = (self.columns * (self.tile[0] + self.gap) - self.gap, rows * (self.tile[1] + self.gap) - self.gap)
        self.picture = Image.new(mode, size, white)

    def add(self, images: Tensor) -> None:
        """The next images [B, C, H, W], in [-1, 1]."""
        for image in images:
            row, column = divmod(self.filled, self.columns)
            place = (column * (self.tile[0] + self.gap), row * (self.tile[1] + self.gap))
            self.picture.paste(picture(image, self.tile), place)
            self.filled += 1


class Folder:
    """A folder of one PNG an image, `<number>.png`. Raises `UserError` where they would not fit on the disk."""

    def __init__(self, path: str | os.PathLike[str], count: int) -> None:
        self.path, self.count, self.filled = Path(path), count, 0
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def add(self, images: Tensor, numbers: Sequence[int]) -> None:
        """The next images [B, C, H, W], in [-1, 1], under these numbers."""
        content = [png(picture(image)) for image in images]
        if not self.filled:
            needed = sum(BLOCK * math.ceil(len(one) / BLOCK) for one in content) / len(content) * self.count
            free = shutil.disk_usage(self.path).free
            if needed > free:
                raise UserError(
                    f"{self.count} pictures take about {needed / 2**30:,.1f} GiB and the disk of {str(self.path)!r} "
                    f"has {free / 2**30:,.1f} GiB free; draw fewer."
                )
        for number, one in zip(numbers, content):
            with _writing(self.path):
                (self.path / f"{number}.png").write_bytes(one)
        self.filled += len(content)


def save_grid(
    images: Tensor, path: str | os.PathLike[str], *, columns: int | None = None, scale: int | None = None
) -> Path:
    """Write images [B, C, H, W] in [-1, 1] as one PNG; small images are enlarged to about 64 pixels each."""
    sheet = Sheet(len(images), images.shape[1:], columns=columns, scale=scale)
    sheet.add(images)
    return save(sheet.picture, path)


def save(drawn: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture as PNG, making the folders above it."""
    target = Path(path)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(png(drawn))
    return target


def check_place(path: str | os.PathLike[str]) -> None:
    """Raises `UserError` where `save` could not write, so that nothing is drawn in vain; makes the folders above it."""
    target = Path(path)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}); give a writable path.") from error
