"""The results file: what it holds, how it is read, and where it may be written.

Any of the parts may be missing from a file; what is there must be whole.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fewstep.errors import UserError

Whole = Annotated[int, Field(ge=0)]
Evaluations = Annotated[str, Field(pattern=r"^[1-9]\d*$")]
Guidance = Annotated[str, Field(pattern=r"^-?\d+(\.\d+)?$")]
Interval = tuple[FiniteFloat, FiniteFloat]
Above0 = Annotated[FiniteFloat, Field(gt=0)]
_SAMPLER = r"[^/@]+(@-?\d+(\.\d+)?)?/\d+"  # fewstep.evaluate.suite.Name
SamplerName = Annotated[str, Field(pattern=f"^{_SAMPLER}$")]
SheetName = Annotated[str, Field(pattern=f"^({_SAMPLER}|[^/@]+)$")]
_WHOSE = "give the results.json of `fewstep demo` or the file of `fewstep evaluate`"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Fidelity(_Part):
    """Against the reference's images from the same noise."""

    rmse: FiniteFloat
    psnr: FiniteFloat | None = None
    class_agreement: FiniteFloat


class Copying(_Part):
    """How many images are much nearer to a training image than to any held-out one."""

    copied: FiniteFloat
    threshold: FiniteFloat
    median_ratio: FiniteFloat
    real_median_ratio: FiniteFloat
    passes: bool


class Floor(_Part):
    """What the real training images score."""

    count: Whole
    frechet: FiniteFloat
    precision: FiniteFloat
    recall: FiniteFloat
    diversity: FiniteFloat
    accuracy: FiniteFloat


class Metrics(Floor):
    guidance: FiniteFloat | None = None
    fidelity: Fidelity | None = None
    copying: Copying | None = None


class Comparison(_Part):
    """Two Frechet distances with paired bootstrap intervals, and the bound on their ratio where one was set."""

    name_a: SamplerName
    name_b: SamplerName
    a: FiniteFloat
    b: FiniteFloat
    difference: FiniteFloat
    difference_interval: Interval
    ratio: FiniteFloat
    ratio_interval: Interval
    confidence: FiniteFloat
    bound: FiniteFloat | None = None
    holds: bool | None = None


class Row(_Part):
    """Latency of one model in one runner at one batch size."""

    model: str
    evaluations: Whole
    guidance: FiniteFloat | None = None
    method: str | None = None
    runner: str
    batch: Whole
    p50_ms: Above0
    p90_ms: Above0
    p99_ms: Above0
    images_per_second: Above0
    speedup_over_eager_teacher: FiniteFloat | None = None


class Skipped(_Part):
    runner: str
    reason: str


class Latency(_Part):
    rows: list[Row] = []
    skipped: list[Skipped] = []


class Machine(_Part):
    processor: str | None = None
    cores: Whole | None = None
    memory_gib: FiniteFloat | None = None


class Data(_Part):
    name: str
    train: Whole
    held_out: Whole
    split_seed: int


class Measured(_Part):
    samples: Whole
    seed: int
    labels: str
    features: str
    classifier_accuracy: FiniteFloat
    resamples: Whole
    confidence: FiniteFloat
    neighbours: Whole
    most_folds: Whole
    reference: SamplerName | None = None


class Onnx(_Part):
    max_abs_error: FiniteFloat
    seeds: Whole


class TensorRT(_Part):
    backend: str
    bytes: Whole
    build_seconds: FiniteFloat


class Export(_Part):
    student: str
    steps: Whole
    onnx: Onnx | None = None
    tensorrt: TensorRT | None = None


class Results(_Part):
    """All parts. Names are families such as teacher or dmd2; evaluations and guidance scales are keys, in decimal."""

    format: Literal[1]
    machine: Machine | None = None
    versions: dict[str, str | None] = {}
    seconds: dict[str, float] = {}  # by station
    data: Data | None = None
    measured: Measured | None = None
    floor: Floor | None = None
    teacher: dict[Guidance, dict[Evaluations, Metrics]] = {}
    students: dict[str, dict[Evaluations, Metrics]] = {}
    comparisons: list[Comparison] = []
    copying_control: Copying | None = None  # the copying check on a replayed training set, which must fail it
    samples: dict[
        SheetName, str
    ] = {}  # sampler or "held out" -> PNG sheet in base64, one pixel for each of the images'
    losses: dict[str, dict[str, list[tuple[float, float]]]] = {}  # run -> network -> (update, loss)
    latency: Latency | None = None
    export: Export | None = None


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The file's content, checked.

    Raises UserError, one sentence, for a file that cannot be read, is not JSON, holds no results, or lacks or
    mistypes a value (named by its dotted key).
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {str(file)!r}; {_WHOSE}.") from None
    except IsADirectoryError:
        raise UserError(f"{str(file)!r} is a folder; {_WHOSE}.") from None
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r} ({error.strerror or error}); {_WHOSE}.") from None
    except json.JSONDecodeError as error:
        what = "is empty" if not error.doc.strip() else f"is not whole JSON (line {error.lineno}: {error.msg})"
        raise UserError(f"{str(file)!r} {what}; {_WHOSE}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{str(file)!r} is not a text of JSON; {_WHOSE}.") from None
    if not isinstance(content, dict) or content.get("format") is None:
        raise UserError(f"{str(file)!r} holds no results (its `format` is missing); {_WHOSE}.")
    if type(content["format"]) is not int or content["format"] != 1:
        raise UserError(
            f"{str(file)!r} holds no results of format 1 (its `format` is {content['format']!r}); {_WHOSE}."
        )
    if not (content.get("teacher") or content.get("students")):
        raise UserError(f"{str(file)!r} has scored nothing (`teacher` and `students` are missing); {_WHOSE}.")
    try:
        # JSON text, not the parsed value: only there may a strict tuple be written as a list
        Results.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]")
        what = "is missing" if first["type"] == "missing" else f"is {_short(first['input'])} ({first['msg']})"
        raise UserError(f"{str(file)!r} is damaged: `{key}` {what}; {_WHOSE}.") from None
    return content


def _short(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 40 else f"{words[:37]}..."


def check_writable(path: str | os.PathLike[str]) -> Path:
    """`path`, its folder made, if a file can be written there; for use before the work whose result goes there.

    What is there already stays as it is. Raises UserError, one sentence, where it cannot be written.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists()
        file.open("ab").close()
        if new:
            file.unlink()
    except OSError as error:
        raise _unwritable(file, error) from None
    return file


def write_text(path: str | os.PathLike[str], content: str) -> Path:
    """Write a file beside `path` and rename it; UserError, one sentence, where that cannot be written."""
    file = Path(path)
    special = file.exists() and not file.is_file()  # such as /dev/stdout: not to be replaced
    partial = file if special else file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(content, encoding="utf-8")
        if not special:
            partial.replace(file)
    except OSError as error:
        if not special:
            with contextlib.suppress(OSError):
                partial.unlink()
        raise _unwritable(file, error) from None
    return file


def write_results(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """`write_text` of `content` as JSON."""
    return write_text(path, json.dumps(content, indent=1) + "\n")


def _unwritable(file: Path, error: OSError) -> UserError:
    beneath_a_file = isinstance(error, FileExistsError | NotADirectoryError)
    reason = "a folder on its way is a file" if beneath_a_file else error.strerror or error
    return UserError(f"cannot write {str(file)!r} ({reason}); give a writable file with --out.")
