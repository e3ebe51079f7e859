"""What a run shows and records: a progress bar (plain lines where there is no terminal), JSON lines, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.errors import UserError
from fewstep.train.interruption import outliving_the_terminal

FIRST_WORD, NEXT_WORD = 1.0, 15.0  # seconds of silence after which an update is told, where there is no bar


class Means:
    """Means of logged values since they were last taken, kept on the device: adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        value = value.detach().float().mean() if isinstance(value, Tensor) else float(value)
        self._sums[name] = self._sums.get(name, 0.0) + weight * value
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def partial(self) -> dict[str, tuple[float, float, bool]]:
        """{name: (sum, weight, whether the sum is kept on the host)} of what no mean has been taken of yet."""
        held = {name: isinstance(value, float) for name, value in self._sums.items()}
        return {name: (float(self._sums[name]), self._weights[name], held[name]) for name in sorted(self._sums)}

    def go_on(self, partial: Mapping[str, Sequence[Any]], device: torch.device) -> None:
        """The inverse of `partial`."""
        for name, (total, weight, on_host) in partial.items():
            self._sums[name] = float(total) if on_host else torch.tensor(total, dtype=torch.float32, device=device)
            self._weights[name] = float(weight)

    def tensor(self, device: torch.device) -> tuple[list[str], Tensor]:
        """The names in sorted order and their means, [names] float32; then everything is forgotten."""
        names = sorted(self._sums)
        means = [
            torch.as_tensor(self._sums[name], device=device, dtype=torch.float32) / self._weights[name]
            for name in names
        ]
        self._sums.clear()
        self._weights.clear()
        return names, torch.stack(means) if means else torch.zeros(0, device=device)


class Progress:
    """The face of a run on its leading process; a silent object on the others.

    `<output>/log.jsonl` gets one object a logged update, `<output>/tensorboard/` the same numbers where tensorboard is
    installed. Resuming drops logged lines after the checkpoint's update, so that a log never tells an update twice.
    """

    def __init__(self, name: str, output: Path, total: int, start: int, *, leads: bool, device: torch.device) -> None:
        self.name, self.total, self.done, self.leads, self.device = name, total, start, leads, device
        self._began, self._start = time.monotonic(), start
        self._told, self._patience = self._began, FIRST_WORD
        self._bar: tqdm[Any] | None = None
        self._folder = output / "tensorboard"
        self._board: Any = None
        self._opened = False
        if not leads:
            return
        try:
            output.mkdir(parents=True, exist_ok=True)
            path = output / "log.jsonl"
            _keep_until(path, start)
            self._log = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to the output folder {output}: {error.strerror or error}.") from None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=name, unit="update", dynamic_ncols=True, smoothing=0.1)

    def advance(self) -> None:
        """Count an update; where there is no bar, a line now and then before the first means are logged."""
        self.done += 1
        if self._bar is not None:
            with outliving_the_terminal():
                self._bar.update()
        elif self.leads and time.monotonic() - self._told > self._patience and self.done < self.total:
            self._tell(*self._pace(), {})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show and record the means of the updates since the last call."""
        if not self.leads:
            return
        rate, left = self._pace()
        entry = {
            "update": step,
            **values,
            "updates_per_second": rate,
            "seconds_left": left,
            "memory_mib": self.memory_mib(),
            "time": time.time(),
        }
        self._log.write(json.dumps(entry) + "\n")
        self._log.flush()
        board = self._tensorboard()
        if board is not None:
            for key, value in entry.items():
                if key not in {"update", "time", "seconds_left"}:
                    board.add_scalar(key, value, step)
        shown = {key: f"{value:.4g}" for key, value in values.items() if key.startswith("loss/")}
        if self._bar is not None:
            with outliving_the_terminal():
                self._bar.set_postfix({**shown, "MiB": f"{entry['memory_mib']:.0f}"})
        else:
            self._tell(rate, left, shown)

    def _pace(self) -> tuple[float, float]:
        """Updates a second since the run began, and the seconds left at that rate."""
        rate = (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)
        return rate, (self.total - self.done) / max(rate, 1e-9)

    def _tell(self, rate: float, left: float, losses: Mapping[str, str]) -> None:
        parts = [f"{self.name}: update {self.done}/{self.total}", f"{rate:.1f} updates/s", f"{_clock(left)} left"]
        parts += [" ".join(f"{key} {value}" for key, value in losses.items())] if losses else []
        self.say(" | ".join([*parts, f"{self.memory_mib():.0f} MiB"]))
        self._told, self._patience = time.monotonic(), NEXT_WORD

    def image(self, step: int, path: Path) -> None:
        """Show a written PNG on the board."""
        board = self._tensorboard()
        if board is not None:
            import numpy
            from PIL import Image

            board.add_image("samples", numpy.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def say(self, sentence: str) -> None:
        """A line above the bar."""
        if self.leads:
            with outliving_the_terminal():
                tqdm.write(sentence, file=sys.stderr)
                sys.stderr.flush()

    def memory_mib(self) -> float:
        """Most memory held so far: of the GPU where there is one, of this process otherwise."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def _tensorboard(self) -> Any:
        """The board's writer, opened when first needed (it takes a second); None where tensorboard is not installed."""
        if self.leads and not self._opened:
            self._opened = True
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self._folder), purge_step=self._start + 1 if self._start else None)
        return self._board

    def close(self) -> None:
        if self.leads:
            self._log.close()
            if self._bar is not None:
                with outliving_the_terminal():
                    self._bar.close()
            if self._board is not None:
                self._board.close()


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["update"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was cut off, or damage
    path.write_text("".join(kept), encoding="utf-8")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
