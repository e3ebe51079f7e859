"""The same batches through an NVIDIA DALI pipeline: its threads read and decode, on the GPU where there is one.

Our order says which file comes next; DALI reads, decodes and prefetches, and keeps its position in its own checkpoint.
Pixels leave it as bytes and are normalised by the one rule of every loader, so PNGs give exactly the numbers PyTorch's
loader gives. The SHA-256 of a manifest is not checked here (`TorchLoader` checks it at every read).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.folder import ImageFolder
from fewstep.data.loader import Loader
from fewstep.data.order import Order
from fewstep.errors import UserError

try:
    from nvidia.dali import Pipeline, fn, types
except ImportError as error:
    raise UserError(
        f"data.loader is dali, and DALI cannot be imported ({error}); "
        "pip install nvidia-dali-cuda130, or use data.loader=torch."
    ) from error

_PREFETCH = 2


class DaliLoader(Loader):
    """Images of a folder decoded by DALI. On a CUDA device the decoder is the mixed one and batches stay on the GPU."""

    kind = "dali"

    def __init__(self, folder: ImageFolder, order: Order, *, fingerprint: str, device: str, threads: int = 2) -> None:
        super().__init__(
            order,
            folder.labels,
            image_shape=folder.image_shape,
            classes=len(folder.classes),
            fingerprint=fingerprint,
            device=device,
        )
        self.folder = folder
        self.threads = threads
        self._paths = [np.frombuffer(str((folder.path / file).resolve()).encode(), np.uint8) for file in folder.files]
        self._start(first=0, checkpoint=None)

    def _start(self, first: int, checkpoint: bytes | None) -> None:
        """Build a pipeline whose iteration i serves step `first + i`, at the position in `checkpoint` (or 0)."""
        gpu = self.device.type == "cuda"
        self._first = first

        def source(iteration: int) -> tuple[list[np.ndarray], np.ndarray]:
            images = self.order.images(first + iteration).numpy()
            return [self._paths[image] for image in images], images[:, None]

        self._pipeline = Pipeline(
            batch_size=self.order.local_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=_PREFETCH,
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        with self._pipeline:
            paths, images = fn.external_source(source=source, num_outputs=2, batch=True)
            pixels = fn.decoders.image(
                fn.io.file.read(paths),  # type: ignore[attr-defined]
                device="mixed" if gpu else "cpu",
                output_type=types.GRAY if self.image_shape[0] == 1 else types.RGB,  # type: ignore[attr-defined]
            )
            self._pipeline.set_outputs(pixels, images)
        self._pipeline.build()

    def _next(self) -> tuple[Tensor, Tensor]:
        expected = self.order.images(self.step)
        try:
            decoded, numbers = self._pipeline.run()
            images = torch.from_dlpack(numbers.as_tensor()).flatten().clone()
            pixels = torch.from_dlpack(decoded.as_tensor()).permute(0, 3, 1, 2)  # DALI decodes to [B, H, W, C]
        except (RuntimeError, ValueError, TypeError) as error:
            self._name_bad_file(error)
        if not torch.equal(images, expected):
            raise UserError(
                f"DALI's position is not step {self.step} of this data set; resume from the checkpoint before this one."
            )
        if tuple(pixels.shape[1:]) != self.image_shape:
            self._name_bad_file(ValueError(f"images of shape {list(pixels.shape[1:])}"))
        return images, self.folder.normalised(pixels)

    def _name_bad_file(self, error: Exception) -> None:
        """Raise the UserError that names the file DALI stumbled over, by reading those in its queue one by one."""
        for step in range(self.step, self.step + _PREFETCH + 2):
            for image in self.order.images(step).tolist():
                self.folder.read(image)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"DALI could not read {str(self.folder.path)!r} ({reason}); try data.loader=torch.") from error

    def state(self) -> dict[str, Any]:
        blob = base64.b64encode(self._pipeline.checkpoint()).decode()
        return {**super().state(), "dali": {"first": self._first, "checkpoint": blob}}

    def _seek(self, state: Mapping[str, Any]) -> None:
        mine = state.get("dali")
        if mine is None:  # written by another loader: start a pipeline at that step
            return self._start(first=self.step, checkpoint=None)
        try:
            checkpoint = base64.b64decode(mine["checkpoint"], validate=True)
            self._start(first=int(mine["first"]), checkpoint=checkpoint)
        except (KeyError, TypeError, ValueError, binascii.Error, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the checkpoint's DALI position cannot be restored ({reason}); resume from the checkpoint before it."
            ) from error
