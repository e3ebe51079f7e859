"""Checkpoints: a folder of safetensors and JSON with a manifest of SHA-256 sums, written beside and renamed. No pickle.

step_000500/<part>.safetensors   networks, optimiser states, the method's tensors
step_000500/state.json           step, stage, counters, data position, recipe, the method's plain values
step_000500/manifest.json        the SHA-256 of each, and of itself
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import UserError

STATE, MANIFEST = "state.json", "manifest.json"
PARTIAL = ".partial"
FORMAT = 1


class Damaged(Exception):
    """A checkpoint that cannot be trusted; the text names the file."""


@dataclass
class Checkpoint:
    """parts: {name: {tensor name: tensor}}, one file each; state: plain JSON values."""

    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step_<step>` completely or not at all, then remove all but the last `keep` up to it.

    What was left by a process that was killed while writing is removed too. Raises `UserError`.
    """
    final = folder / f"step_{step:06d}"
    beside = folder / f".{final.name}{PARTIAL}"
    try:
        for leftover in folder.glob(f".step_*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, tensors in checkpoint.parts.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, beside / f"{name}.safetensors")
        (beside / STATE).write_text(json.dumps(checkpoint.state, indent=1), encoding="utf-8")
        files = {path.name: _sum(path) for path in sorted(beside.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files}
        manifest["sha256"] = _own_sum(manifest)
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*beside.iterdir(), beside):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(beside, final)
        _flush(folder)
        written = [path for number, path in listed(folder) if number <= step]  # later ones are damaged: no reserve
        for path in written[:-keep]:
            shutil.rmtree(path, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {final}: {getattr(error, 'strerror', None) or error}.") from None
    return final


def listed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder, oldest first; unfinished ones are not among them."""
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def verify(path: Path) -> None:
    """Raises `Damaged`, naming the file, unless every file is there with the recorded SHA-256."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        own = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{path / MANIFEST} is missing or unreadable") from None
    if own != _own_sum(manifest):
        raise Damaged(f"{path / MANIFEST} does not match its SHA-256")
    if manifest["format"] != FORMAT:
        raise Damaged(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}")
    for name, expected in files.items():
        try:
            actual = _sum(path / name)
        except OSError:
            raise Damaged(f"{path / name} is missing or unreadable") from None
        if actual != expected:
            raise Damaged(f"{path / name} does not match its SHA-256")


def newest_good(folder: Path) -> tuple[int | None, list[str]]:
    """The step of the newest undamaged checkpoint (None: there is none) and what was wrong with those after it.

    Raises `UserError` where all there are are damaged.
    """
    problems: list[str] = []
    found = listed(folder)
    for step, path in reversed(found):
        try:
            verify(path)
            return step, problems
        except Damaged as error:
            problems.append(str(error))
    if found:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({'; '.join(problems)}); start again without --resume."
        )
    return None, problems


def read(folder: Path, step: int) -> Checkpoint:
    """A verified checkpoint's content. Raises `UserError` where it cannot be read."""
    path = folder / f"step_{step:06d}"
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        parts = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}.") from None
    return Checkpoint(parts, state)


def split(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Nested values with each tensor moved into `tensors` and a {"tensor": key} left in its place."""
    if isinstance(value, Tensor):
        tensors[path or "value"] = value.detach().cpu().clone()
        return {"tensor": path or "value"}
    if isinstance(value, Mapping):
        return {"section": {str(key): split(item, tensors, f"{path}.{key}".strip(".")) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [split(item, tensors, f"{path}.{index}".strip(".")) for index, item in enumerate(value)]}
    return value


def join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split` (tuples come back as lists)."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [join(item, tensors) for item in value["list"]]
    return {key: join(item, tensors) for key, item in value["section"].items()}


def set_aside(folder: Path) -> Path:
    """Move a folder of checkpoints to `<folder>.previous`, in place of what was set aside before.

    What was set aside before stays where it had come further: then the new one is `<folder>.previous_2`, and so on.
    """
    aside = folder.with_name(f"{folder.name}.previous")
    number = 1
    while listed(aside) and listed(aside)[-1][0] > listed(folder)[-1][0]:
        number += 1
        aside = folder.with_name(f"{folder.name}.previous_{number}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    except OSError as error:
        raise UserError(f"cannot move {folder} to {aside}: {error.strerror or error}.") from None
    return aside


def _sum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _own_sum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
