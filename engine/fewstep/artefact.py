"""The self-describing folder a network is saved to: weights, and everything needed to sample from them.

    artefact.json         format, network config, schedule, prediction, plans by number of steps, image shape, classes,
                          provenance, the SHA-256 of every other file and of its own content
    weights.safetensors   the network's state

Nothing in it is ever unpickled, imported or executed: the network is rebuilt by `nets.build` from its registered name
and values.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fewstep import nets
from fewstep.diffusion import prediction as predictions
from fewstep.diffusion import schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.solvers import Plan

FORMAT = "fewstep-artefact"
VERSION = 1
MANIFEST = "artefact.json"
WEIGHTS = "weights.safetensors"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class _Manifest(BaseModel):
    """What artefact.json holds; an unknown or missing key refuses the artefact."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["fewstep-artefact"]
    version: int
    kind: Literal["student", "teacher"]
    fewstep: str
    network: dict[str, Any]
    schedule: dict[str, Any]
    prediction: dict[str, Any]
    plans: dict[str, dict[str, Any]]
    image_shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    classes: int | None = Field(ge=1)
    provenance: dict[str, Any]
    files: dict[str, _File]
    sha256: str


@dataclass(frozen=True)
class Artefact:
    """A loaded artefact. `digest` is the SHA-256 of the manifest, which names the SHA-256 of the weights."""

    path: Path
    kind: Literal["student", "teacher"]
    denoiser: Denoiser
    plans: dict[int, Plan]
    image_shape: tuple[int, ...]
    classes: int | None
    provenance: dict[str, Any]
    digest: str
    fewstep: str

    @property
    def method(self) -> str | None:
        """The name of the method that made it, where its provenance holds a recipe."""
        name = self._recipe_of_method.get("name")
        return str(name) if name else None

    @property
    def guidance(self) -> float:
        """The scale at which its teacher was guided, inside a student from then on; 1 where none is recorded.

        Of a form of guidance, whatever else it does, its scale.
        """
        given = self._recipe_of_method.get("guidance")
        scale = given.get("scale") if isinstance(given, Mapping) else given
        return float(scale) if isinstance(scale, int | float) and scale else 1.0

    @property
    def _recipe_of_method(self) -> Mapping[str, Any]:
        recipe = self.provenance.get("recipe")
        method = recipe.get("method") if isinstance(recipe, Mapping) else None
        return method if isinstance(method, Mapping) else {}


def version() -> str:
    """The installed version of fewstep, or "source" when it runs from a source tree."""
    try:
        return importlib.metadata.version("fewstep")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def network_config(net: Any) -> dict[str, Any]:
    """The config that `nets.build` makes the network of again. Raises UserError where it has none."""
    config = nets.registry.described(net)
    if not config:
        raise UserError(
            f"a {type(net).__name__} cannot be saved as an artefact, which rebuilds its network from a name: decorate "
            "its class with fewstep.nets.register('NAME'), make it by fewstep.nets.build({'name': 'NAME', ...})."
        )
    return config


def save(
    path: str | os.PathLike[str],
    *,
    denoiser: Denoiser,
    plans: Mapping[int, Plan],
    image_shape: Sequence[int],
    classes: int | None,
    provenance: Mapping[str, Any],
    kind: Literal["student", "teacher"] = "student",
) -> Path:
    """Write the artefact into the folder `path`, which may hold other files (a run's logs); return the folder.

    Each file is written beside its final name, flushed to disk and renamed, the manifest last.
    Raises UserError where the path cannot be written, a value cannot be stored as JSON or the network has no name.
    """
    folder = Path(path)
    net: Any = denoiser.net
    state = {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "fewstep": version(),
        "network": network_config(net),
        "schedule": denoiser.schedule.to_dict(),
        "prediction": denoiser.prediction.to_dict(),
        "plans": {str(steps): json.loads(plan.to_json()) for steps, plan in sorted(plans.items())},
        "image_shape": [int(size) for size in image_shape],
        "classes": classes,
        "provenance": dict(provenance),
    }
    pending: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / f".{WEIGHTS}.{os.getpid()}.partial"
        pending.append(weights)
        save_file(state, weights)
        _flush(weights)
        content["files"] = {WEIGHTS: {"sha256": _digest(weights), "bytes": weights.stat().st_size}}
        content = json.loads(json.dumps(content, allow_nan=False))
        content["sha256"] = _canonical(content)
        manifest = folder / f".{MANIFEST}.{os.getpid()}.partial"
        pending.append(manifest)
        manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _flush(manifest)
        os.replace(weights, folder / WEIGHTS)
        os.replace(manifest, folder / MANIFEST)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the artefact to {str(folder)!r} ({reason}); give a writable folder.") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"the artefact's description cannot be stored as JSON ({error}); give plain values.") from error
    finally:
        for leftover in pending:
            with contextlib.suppress(OSError):
                leftover.unlink()
    return folder


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Artefact:
    """Read an artefact, verify its manifest's and every file's SHA-256, build its network in eval mode, gradients off.

    Raises UserError, one sentence, for a missing folder or file, a changed byte, an unknown format version or network.
    """
    folder = Path(path)
    content = _read_manifest(folder)
    for name, entry in content.files.items():
        _verify(folder, name, entry)
    if WEIGHTS not in content.files:
        raise UserError(f"the artefact {str(folder)!r} lists no {WEIGHTS}; save it again.")
    try:
        schedule = schedules.from_dict(content.schedule)
        prediction = predictions.from_dict(content.prediction)
        plans = {int(steps): Plan.from_json(json.dumps(plan)) for steps, plan in content.plans.items()}
        net = nets.build(content.network)
        net.load_state_dict(load_file(folder / WEIGHTS))
        _agree(content)
    except UserError:
        raise
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        SafetensorError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the artefact {str(folder)!r} does not describe its own weights ({reason}); save it again."
        ) from error
    denoiser = Denoiser(net, schedule, prediction).to(device).eval().requires_grad_(False)
    return Artefact(
        path=folder,
        kind=content.kind,
        denoiser=denoiser,
        plans=plans,
        image_shape=tuple(content.image_shape),
        classes=content.classes,
        provenance=content.provenance,
        digest=content.sha256,
        fewstep=content.fewstep,
    )


def _agree(content: _Manifest) -> None:
    """Raises ValueError where the images or classes it tells of are not those its network is made for."""
    if nets.registry.is_registered(content.network["name"]):
        return
    shape, config = content.image_shape, content.network.get("base", content.network)
    if "channels" in config and len(shape) != 3:
        raise ValueError(f"its network makes images [C, H, W] and its image_shape is {shape}")
    told = {"channels": shape[0], "dim": math.prod(shape), "classes": content.classes}
    for key, value in (*told.items(), *(("image_size", size) for size in shape[1:])):
        if value is not None and config.get(key, value) != value:
            raise ValueError(f"{key} of its network is {config[key]} and its images and classes say {value}")


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


def _read_manifest(folder: Path) -> _Manifest:
    if not folder.is_dir():
        raise UserError(f"there is no artefact folder {str(folder)!r}; give the folder that train or distill wrote.")
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError as error:
        raise UserError(
            f"the folder {str(folder)!r} holds no {MANIFEST}; give the folder that train or distill wrote."
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {str(folder / MANIFEST)!r} ({error.strerror}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(folder / MANIFEST)!r} is damaged: it is not JSON; copy the artefact again.") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(
            f"{str(folder / MANIFEST)!r} is not a fewstep artefact; give the folder that train or distill wrote."
        )
    if raw.get("version") != VERSION:
        raise UserError(
            f"the artefact {str(folder)!r} has format version {raw.get('version')!r}, this fewstep reads version "
            f"{VERSION}; install the fewstep that wrote it or save it again."
        )
    if raw.get("sha256") != _canonical(raw):
        raise UserError(
            f"{str(folder / MANIFEST)!r} is damaged: its content does not match its SHA-256; copy the artefact again."
        )
    try:
        return _Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{str(folder / MANIFEST)!r} is not valid at {key!r} ({first['msg']}); save it again."
        ) from error


def _verify(folder: Path, name: str, entry: _File) -> None:
    if Path(name).name != name or name in {".", ".."}:
        raise UserError(f"the artefact {str(folder)!r} lists the file {name!r} outside its folder; save it again.")
    file = folder / name
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{str(file)!r} is no plain file; copy the artefact again.")
        digest = _digest(file) if about.st_size == entry.bytes else ""
    except FileNotFoundError as error:
        raise UserError(f"the artefact {str(folder)!r} lacks its file {name!r}; copy the artefact again.") from error
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r} ({error.strerror}); check its permissions.") from error
    if not digest:
        raise UserError(
            f"{str(file)!r} is damaged: it has {about.st_size} bytes, the artefact records {entry.bytes}; copy the "
            "artefact again."
        )
    if digest != entry.sha256:
        raise UserError(
            f"{str(file)!r} is damaged: its SHA-256 is {digest[:12]}…, the artefact records {entry.sha256[:12]}…; "
            "copy the artefact again."
        )


def _canonical(content: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own digest, with sorted keys and no white space."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
