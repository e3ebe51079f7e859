"""A folder of images, one sub-folder a class, as every loader reads it.

    <folder>/<class>/<name>.png     8-bit grey or RGB, all of one size
    <folder>/manifest.json          optional: format, image_shape [C, H, W], classes in label order, `white` (the byte
                                    that means +1; 255 without a manifest), origin, files in order, label, SHA-256

Without a manifest the classes are the sub-folders in sorted order and the files are sorted within them. A byte b
becomes 2 b / white - 1. Images are used as they are: resize them beforehand.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.cache import written_beside
from fewstep.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "fewstep-image-folder-1"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageFolder:
    """An opened folder. `files` are relative to `path`; `hashes` is empty without a manifest."""

    path: Path
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    white: int
    files: tuple[str, ...]
    labels: Tensor  # int64 [N]
    hashes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Tensor:
        """Image `index` as uint8 [C, H, W]; its SHA-256 is checked where the manifest has one."""
        file = self.path / self.files[index]
        content = _bytes(file)
        if self.hashes and hashlib.sha256(content).hexdigest() != self.hashes[index]:
            raise UserError(f"{str(file)!r} is not the file its manifest describes (SHA-256 differs); restore it.")
        pixels = _decode(file, content, self.image_shape[0])
        if pixels.shape != self.image_shape:
            raise UserError(
                f"{str(file)!r} has shape {list(pixels.shape)}, the folder's images have {list(self.image_shape)}; "
                "resize it or take it out."
            )
        return torch.from_numpy(pixels)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 to float32 in [-1, 1]; the one rule of every loader."""
        return pixels.float().mul(2).div(self.white).sub(1)


def write(
    path: str | Path, images: np.ndarray, labels: np.ndarray, *, classes: Sequence[str], white: int, origin: str
) -> Path:
    """Write uint8 images [N, C, H, W] (C 1 or 3) as class-named folders of PNGs with a manifest; return the folder.

    The folder appears whole or not at all. Written twice it is left alone; anything else there raises UserError.
    """
    path = Path(path)
    encoded = [_png(image) for image in images]
    files = [f"{classes[label]}/{number:06d}.png" for number, label in enumerate(labels)]
    manifest = {
        "format": FORMAT,
        "origin": origin,
        "image_shape": list(images.shape[1:]),
        "classes": list(classes),
        "white": white,
        "files": [
            {"file": file, "label": int(label), "sha256": hashlib.sha256(content).hexdigest()}
            for file, label, content in zip(files, labels, encoded)
        ],
    }
    text = json.dumps(manifest, indent=1) + "\n"
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if (path / MANIFEST).is_file() and (path / MANIFEST).read_text(encoding="utf-8") == text:
            return path
        raise UserError(f"{str(path)!r} exists and holds something else; give a new folder.")
    with written_beside(path) as temporary:
        for name in classes:
            (temporary / name).mkdir()
        for file, content in zip(files, encoded):
            (temporary / file).write_bytes(content)
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
    return path


def open_folder(path: str | Path) -> ImageFolder:
    """Open a folder of images; raises UserError, naming the file, for what is missing or not as described."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"there is no image folder {str(path)!r}; give `digits` or a folder with a sub-folder for each class."
        )
    if (path / MANIFEST).is_file():
        return _from_manifest(path)
    classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(file.name for file in (path / name).iterdir() if file.suffix.lower() in SUFFIXES)
        files += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    if not files:
        raise UserError(
            f"the folder {str(path)!r} holds no image; give each class a sub-folder with {', '.join(SUFFIXES)} files."
        )
    first = path / files[0]
    shape = _decode(first, _bytes(first), None).shape
    print_of = hashlib.sha256(json.dumps([files, list(shape)]).encode()).hexdigest()
    return ImageFolder(path, shape, classes, 255, tuple(files), torch.tensor(labels), (), print_of)


def _from_manifest(path: Path) -> ImageFolder:
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise KeyError("format")
        entries = content["files"]
        shape = tuple(int(size) for size in content["image_shape"])
        classes = tuple(str(name) for name in content["classes"])
        files = tuple(str(entry["file"]) for entry in entries)
        labels = torch.tensor([int(entry["label"]) for entry in entries], dtype=torch.int64)
        hashes = tuple(str(entry["sha256"]) for entry in entries)
        white = int(content["white"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(path / MANIFEST)!r} is no manifest of this version ({type(error).__name__}: {error}); remake it."
        ) from error
    if len(shape) != 3 or shape[0] not in _MODES or not 1 <= white <= 255 or not files:
        raise UserError(f"{str(path / MANIFEST)!r} describes no 8-bit grey or RGB images; write it again.")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"{str(path / MANIFEST)!r} has a label outside its {len(classes)} classes; write it again.")
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{str(path / MANIFEST)!r} names {file!r}, outside its folder; write it again.")
        if not (path / file).is_file():
            raise UserError(f"{str(path / file)!r} is missing though its manifest names it; restore it.")
    return ImageFolder(path, shape, classes, white, files, labels, hashes, hashlib.sha256(text.encode()).hexdigest())


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))).save(stream, "PNG")
    return stream.getvalue()


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror}); restore it or take it out.") from error


def _decode(file: Path, content: bytes, channels: int | None) -> np.ndarray:
    """Pixels uint8 [C, H, W]; without `channels`, grey files have one and all others three."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            wanted = _MODES[channels] if channels else ("L" if image.mode == "L" else "RGB")
            if image.mode != wanted and {image.mode, wanted} != {"P", "RGB"}:
                raise UserError(
                    f"{str(file)!r} has mode {image.mode}, the folder's images are 8-bit {wanted}; convert it."
                )
            pixels = np.array(image.convert(wanted))
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{str(file)!r} is not a readable image ({error}); restore it or take it out.") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()
