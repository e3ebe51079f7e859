"""The embedded data set: scikit-learn's handwritten digits, 1,797 real 8x8 scans in ten classes; nothing is downloaded.

Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), as `sklearn.datasets.load_digits`.
Grey levels 0..16 become level / 8 - 1, exact in float32. The split is fixed for ever: 1,437 images to train on and 360
held out, each class in proportion, chosen by Philox words under SPLIT_SEED, independent of any library's shuffling.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.data import folder as image_folder
from fewstep.data.order import permutation
from fewstep.errors import choose

CLASSES = 10
HELD_OUT = 360
SPLIT_SEED = 2303
LEVELS = 16
_SCALE = 15  # a PNG stores level * 15, so byte 240 is white and the round trip is exact


@functools.cache
def _levels() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.int64)


@functools.cache
def _split(split: str) -> np.ndarray:
    """Rows of the data set that belong to a split, ascending."""
    if split not in ("train", "held_out"):
        raise choose("the split", split, ("train", "held_out"))
    labels = _levels()[1]
    quota = np.bincount(labels, minlength=CLASSES) * HELD_OUT / len(labels)
    take = np.floor(quota).astype(int)
    for late in np.argsort(take - quota, kind="stable")[: HELD_OUT - take.sum()]:  # largest remainders make up the rest
        take[late] += 1
    held_out = []
    for label in range(CLASSES):
        rows = np.flatnonzero(labels == label)
        held_out.append(rows[permutation(len(rows), SPLIT_SEED, label)[: take[label]]])
    chosen = np.sort(np.concatenate(held_out))
    return chosen if split == "held_out" else np.setdiff1d(np.arange(len(labels)), chosen)


def digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """One split: images float32 [N, 1, 8, 8] in [-1, 1], labels int64 [N]; N is 1437 ("train") or 360 ("held_out")."""
    rows = _split(split)
    levels, labels = _levels()
    images = torch.from_numpy(levels[rows]).float().div(LEVELS / 2).sub(1)[:, None]
    return images, torch.from_numpy(labels[rows])


def write_image_folder(path: str | Path, split: str = "train") -> Path:
    """Write a split as a folder of PNGs, one sub-folder a class, with a manifest; see `fewstep.data.folder`.

    Raises UserError where `path` exists and holds something else, or cannot be written.
    """
    rows = _split(split)
    levels, labels = _levels()
    return image_folder.write(
        path,
        (levels[rows] * _SCALE)[:, None],
        labels[rows],
        classes=[str(label) for label in range(CLASSES)],
        white=LEVELS * _SCALE,
        origin=f"scikit-learn digits, {split} split {SPLIT_SEED}",
    )
