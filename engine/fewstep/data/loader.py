"""Endless batches of images for the trainer: the same whichever loader makes them, resumable in mid-epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data import cache
from fewstep.data.digits import CLASSES, SPLIT_SEED, digits, write_image_folder
from fewstep.data.folder import ImageFolder, open_folder
from fewstep.data.order import Order
from fewstep.errors import UserError, choose
from fewstep.methods.batch import Batch

LOADERS = ("torch", "dali")


class Loader:
    """An endless iterator over `Batch`es: index int64 [B], x0 float32 [B, C, H, W] in [-1, 1], cond and null int64 [B].

    B is this rank's share of the global batch; `index` is step * global batch + slot: a sample's name for ever.
    """

    kind = ""

    def __init__(
        self, order: Order, labels: Tensor, *, image_shape: tuple[int, ...], classes: int, fingerprint: str, device: str
    ) -> None:
        self.order = order
        self.labels = labels
        self.image_shape = tuple(image_shape)
        self.classes = classes
        self.fingerprint = fingerprint
        self.device = torch.device(device)
        self.step = 0  # batches handed out so far

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        images, x0 = self._next()
        cond = self.labels[images].to(self.device)
        batch = Batch(
            index=self.order.samples(self.step).to(self.device),
            x0=x0.to(self.device, non_blocking=True),
            cond=cond,
            null=torch.full_like(cond, self.classes),
        )
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The position, as plain JSON values; the same on every rank."""
        return {
            "step": self.step,
            "seed": self.order.seed,
            "batch_size": self.order.batch_size,
            "images": self.order.count,
            "fingerprint": self.fingerprint,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state()` was taken, on any loader and any number of ranks of the same data, seed and batch size.

        Raises UserError, naming the field, where the state belongs to other data.
        """
        for key, mine in self.state().items():
            if key in ("step", "dali"):
                continue
            if state.get(key) != mine:
                raise UserError(
                    f"the checkpoint's data position has {key} {state.get(key)!r}, this recipe has {mine!r}; "
                    "resume with the data, seed and batch size it was written with."
                )
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise UserError(f"the checkpoint's data position has step {step!r}; it must be a whole number from 0.")
        self.step = step
        self._seek(state)

    def close(self) -> None:
        """Stop workers; the loader can still be resumed."""

    def _next(self) -> tuple[Tensor, Tensor]:
        """The images of the present step, int64 [B], and their pixels."""
        raise NotImplementedError

    def _seek(self, state: Mapping[str, Any]) -> None:
        """Make the next batch that of `self.step`."""


class MemoryLoader(Loader):
    """Images held in memory: a batch is one gather."""

    kind = "memory"

    def __init__(self, images: Tensor, order: Order, labels: Tensor, **about: Any) -> None:
        super().__init__(order, labels, image_shape=tuple(images.shape[1:]), **about)
        self.images = images.to(self.device)

    def _next(self) -> tuple[Tensor, Tensor]:
        images = self.order.images(self.step)
        return images, self.images[images.to(self.device)]


class TorchLoader(Loader):
    """Images read from a folder by PyTorch's DataLoader, in `workers` processes (0: in this one)."""

    kind = "torch"

    def __init__(self, folder: ImageFolder, order: Order, *, workers: int = 0, fingerprint: str, device: str) -> None:
        super().__init__(
            order,
            folder.labels,
            image_shape=folder.image_shape,
            classes=len(folder.classes),
            fingerprint=fingerprint,
            device=device,
        )
        self.folder = folder
        self.workers = workers
        self._batches: Iterator[Tensor | UserError] | None = None

    def _next(self) -> tuple[Tensor, Tensor]:
        if self._batches is None:
            self._batches = iter(
                torch.utils.data.DataLoader(
                    _Images(self.folder),
                    batch_sampler=_Steps(self.order, self.step),
                    num_workers=self.workers,
                    multiprocessing_context="forkserver"
                    if self.workers
                    else None,  # a fork hung beside live DALI threads
                    collate_fn=_stack,
                    pin_memory=self.device.type == "cuda",
                    generator=torch.Generator(),  # torch's own is for dropout: a resumed run draws the same masks
                )
            )
        pixels = next(self._batches)
        if isinstance(pixels, UserError):
            self.close()
            raise pixels
        return self.order.images(self.step), self.folder.normalised(pixels)

    def _seek(self, state: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        self._batches = None


class _Steps:
    """A batch sampler without end: this rank's images of each step from `first` on."""

    def __init__(self, order: Order, first: int) -> None:
        self.order, self.first = order, first

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first
        while True:
            yield self.order.images(step).tolist()
            step += 1


class _Images(torch.utils.data.Dataset[Any]):
    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            return self.folder.read(index)
        except UserError as error:  # handed on as a value: raised in a worker it would arrive wrapped in a traceback
            return error


def _stack(items: list[Tensor | UserError]) -> Tensor | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    return torch.stack(items)  # type: ignore[arg-type]


def loader(
    config: Any,
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    device: str = "cpu",
    split: str = "train",
) -> Loader:
    """The loader a recipe's `data:` section asks for.

    config: a source (`"digits"` or a folder's path), or a mapping or object with `source` and, as wanted, `loader`
    ("torch" or "dali"), `batch_size` (global, over all ranks) and `workers`. The digits are served from memory, or by
    DALI, when asked for, from a folder written once into the cache.
    Raises UserError for an unknown loader, a missing or damaged folder, or a batch that the ranks cannot share evenly.
    """
    given = _reader(config)
    source = str(given("source", "digits"))
    kind = given("loader", "torch")
    if kind not in LOADERS:
        raise choose("data.loader", kind, LOADERS)
    size = batch_size if batch_size is not None else given("batch_size", 256)

    def order(count: int) -> Order:
        return Order(count, size, seed=seed, rank=rank, world=world)

    if source == "digits":
        fingerprint = f"digits {split} {SPLIT_SEED}"
        if kind == "torch":
            images, labels = digits(split)
            return MemoryLoader(
                images, order(len(labels)), labels, classes=CLASSES, fingerprint=fingerprint, device=device
            )
        folder = open_folder(write_image_folder(cache.folder("digits") / f"{split}-{SPLIT_SEED}", split))
    else:
        folder = open_folder(Path(source))
        fingerprint = folder.fingerprint
    if kind == "torch":
        workers = int(given("workers", 0))
        return TorchLoader(folder, order(len(folder)), workers=workers, fingerprint=fingerprint, device=device)
    from fewstep.data.dali import DaliLoader

    return DaliLoader(folder, order(len(folder)), fingerprint=fingerprint, device=device)


def _reader(config: Any) -> Callable[[str, Any], Any]:
    if isinstance(config, str | Path):
        config = {"source": config}
    if isinstance(config, Mapping):
        return config.get
    return lambda name, default: getattr(config, name, default)
