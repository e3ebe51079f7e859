"""The fixed small digit classifier in whose 64 features the digits are judged.

Trained once on the training split from one seed in one thread, so one machine and one torch always give the same
bits; kept in the cache as safetensors under the hash of everything that shaped it. Distances in these features
compare samples of this data set with each other; they are not comparable with distances in another network's
features.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.data import cache
from fewstep.data.digits import CLASSES, SPLIT_SEED, digits
from fewstep.errors import UserError

DIMENSIONS = 64
RECIPE: dict[str, Any] = {
    "architecture": "conv16 conv32/2 linear64 linear10, SiLU",
    "split_seed": SPLIT_SEED,
    "seed": 0,
    "updates": 500,
    "batch": 128,
    "peak_lr": 4e-3,
    "weight_decay": 1e-2,
    "shift": 1,
    "noise": 0.1,
    "label_smoothing": 0.05,
}


class DigitClassifier(nn.Module):
    """Images [B, 1, 8, 8] in [-1, 1] to features [B, 64] and, by `head`, class scores [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, DIMENSIONS),
            nn.SiLU(),
        )
        self.head = nn.Linear(DIMENSIONS, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 2000) -> Tensor:
        """Features float32 [N, 64] of images [N, 1, 8, 8], in chunks."""
        return torch.cat([self.body(chunk) for chunk in images.float().split(batch)])

    @torch.no_grad()
    def classes(self, features: Tensor) -> Tensor:
        """The most likely class of each feature row, int64 [N]."""
        return self.head(features).argmax(1)


def recipe_hash() -> str:
    """Names the classifier: its recipe and the torch that trained it."""
    content = json.dumps({**RECIPE, "torch": torch.__version__}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@functools.cache
def digit_classifier() -> DigitClassifier:
    """The classifier, from the cache or trained now (a few seconds); frozen, in eval mode."""
    file = cache.folder("features") / f"digits-{recipe_hash()}.safetensors"
    network = DigitClassifier()
    try:
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError):  # not made yet, or damaged: making it anew costs seconds
        network = train()
        _save(network, file)
    return network.eval().requires_grad_(False)


def train() -> DigitClassifier:
    """Train the classifier; the same bits every time on one machine, whatever the caller's seeds and threads."""
    images, labels = digits("train")
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(RECIPE["seed"])
        network = DigitClassifier()
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=RECIPE["weight_decay"])
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["peak_lr"], RECIPE["updates"])
        padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
        for _ in range(RECIPE["updates"]):
            rows = torch.randint(len(images), (RECIPE["batch"],))
            down, right = torch.randint(0, 2 * RECIPE["shift"] + 1, (2,)).tolist()
            seen = padded[rows, :, down : down + 8, right : right + 8]
            seen = seen + RECIPE["noise"] * torch.randn(seen.shape)
            scores = network.head(network(seen))
            loss = nn.functional.cross_entropy(scores, labels[rows], label_smoothing=RECIPE["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return network


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(network: DigitClassifier, file: Path) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(network.state_dict(), partial)
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot keep the classifier in {file.parent}: {reason}; set FEWSTEP_CACHE.") from None
