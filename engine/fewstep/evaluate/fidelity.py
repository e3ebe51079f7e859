"""How close a student's image is to the one its teacher makes from the same noise and label."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from fewstep.errors import UserError


@dataclass(frozen=True)
class Fidelity:
    """Root mean square error of pixels in [-1, 1], its PSNR in dB (peak 2), and the share of images of one class."""

    rmse: float
    psnr: float | None
    class_agreement: float
    count: int

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def fidelity(images: Tensor, teacher: Tensor, classes: Tensor, teacher_classes: Tensor) -> Fidelity:
    """Compare images [N, C, H, W] with the teacher's, pair by pair; classes [N] are a classifier's answers for each.

    psnr is None for equal images. Raises UserError where the shapes differ.
    """
    if images.shape != teacher.shape:
        raise UserError(
            f"shapes {list(images.shape)} and the teacher's {list(teacher.shape)} are no pairs; draw them alike."
        )
    rmse = (images.double() - teacher.double()).square().mean().sqrt().item()
    psnr = 20 * math.log10(2 / rmse) if rmse > 0 else None
    agreement = (classes == teacher_classes).double().mean().item()
    return Fidelity(rmse, psnr, agreement, len(images))
