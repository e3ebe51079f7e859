"""Images already drawn, on disk: the teacher's are the same for every student that is compared with it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import UserError

if TYPE_CHECKING:
    from fewstep.runtime.student import Student


@dataclass(frozen=True)
class Drawing:
    """An artefact as a sampler: (noise [B, C, H, W], labels [B], seeds [B]) -> images [B, C, H, W]."""

    artefact: Student
    steps: int
    guidance: float | None = None

    def __call__(self, noise: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        return self.artefact.sample(noise, labels, steps=self.steps, seeds=seeds, guidance=self.guidance)

    @property
    def identity(self) -> str:
        """Names the weights and the plan that draw."""
        plan = self.artefact.plan(self.steps, self.guidance).to_json()
        return f"{self.artefact.artefact.digest} {hashlib.sha256(plan.encode()).hexdigest()}"


class KeptImages:
    """A folder of images, one file for each sampler.

    A file is used again only where weights, plan and `settings` (number of images, seed, batch) are those it was drawn
    with; any other file, a damaged one too, is drawn anew and replaced.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot keep images in {self.folder}: {error.strerror or error}; choose another."
            ) from None

    def find(self, name: str, drawing: Drawing, settings: dict[str, int]) -> tuple[Tensor, float] | None:
        """Images [N, C, H, W] and the seconds that drawing them took; None where there are none of this identity."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("identity") != _identity(drawing, settings):
                    return None
                return file.get_tensor("images"), float(about["seconds"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def keep(self, name: str, drawing: Drawing, settings: dict[str, int], images: Tensor, seconds: float) -> None:
        path = self._path(name)
        part = path.with_suffix(f".{os.getpid()}.part")
        about = {"identity": _identity(drawing, settings), "seconds": repr(seconds)}
        try:
            save_file({"images": images.contiguous()}, part, metadata=about)
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot keep images in {self.folder}: {reason}; choose another.") from None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '_')}.safetensors"


def _identity(drawing: Drawing, settings: dict[str, int]) -> str:
    content = json.dumps({"drawing": drawing.identity, **settings}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
