"""What a sampler is given, checked in one place: an artefact's, an exported graph's and PyTorch's own say the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError


@dataclasses.dataclass(frozen=True)
class Takes:
    """The noise and the classes that a sampler takes.

    image_shape: (C, H, W). stochastic: how many stages draw noise. classes: how many there are; None where the network
    takes no class. none: whether the number of classes itself may stand for no class. seeded: whether noise may come
    without that of the stochastic stages. who: the sampler in a sentence.
    """

    image_shape: tuple[int, ...]
    stochastic: int
    classes: int | None
    none: bool = False
    seeded: bool = False
    who: str = "artefact"

    def noise(self, given: Any) -> Tensor:
        """`given`, if it is standard normal noise [B, 1 + S, C, H, W] (where `seeded`, or [B, C, H, W])."""
        single, every = self.image_shape, (1 + self.stochastic, *self.image_shape)
        shapes = [single, every] if self.seeded else [every]
        words = " or ".join(f"[B, {', '.join(map(str, shape))}]" for shape in shapes)
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise UserError(
                f"noise is {described(given)}; it must be a floating-point tensor {words} of standard normal numbers."
            )
        if tuple(given.shape[1:]) not in shapes or given.shape[0] < 1:
            raise UserError(f"noise has shape {list(given.shape)}, it must be {words} with B from 1.")
        return given

    def labels(self, given: Any, batch: int, name: str = "cond") -> Tensor:
        """`given` as int64 [batch] on the CPU: a class, or one for each image, as numbers or in a tensor."""
        if self.classes is None:
            raise UserError(f"{name} is {described(given)}, but this {self.who} knows no classes; leave {name} out.")
        if isinstance(given, Tensor):
            given = given.flatten().tolist()
        labels = list(given) if isinstance(given, Iterable) else [given] * batch
        most = self.classes - (0 if self.none else 1)
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= int(label) <= most:
                none = f", or {self.classes} for none" if self.none else ""
                raise UserError(
                    f"class {described(label)} is out of range; choose a whole number from 0 to "
                    f"{self.classes - 1}{none}."
                )
        if len(labels) != batch:
            raise UserError(f"there are {len(labels)} classes for {batch} images; give one class for each image.")
        return torch.tensor(labels, dtype=torch.int64)


def described(given: Any) -> str:
    """A value in a sentence: an array by its kind and shape, whatever else as Python writes it, cut short."""
    if isinstance(given, Tensor):
        return f"{given.dtype} {list(given.shape)}"
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        return f"{type(given).__name__} {list(given.shape)}"
    text = " ".join(repr(given).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
