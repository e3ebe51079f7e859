"""One evaluation of a teacher and its students: all from the same noise, labels and seeds, against the same digits."""

from __future__ import annotations

import base64
import io
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fewstep_kernels as fk
from fewstep.data.digits import CLASSES, SPLIT_SEED, digits
from fewstep.errors import UserError
from fewstep.evaluate import bootstrap, nearest
from fewstep.evaluate.features import DIMENSIONS, DigitClassifier, digit_classifier, recipe_hash
from fewstep.evaluate.fidelity import fidelity
from fewstep.evaluate.frechet import frechet_distance, moments
from fewstep.evaluate.kept import Drawing, KeptImages
from fewstep.evaluate.precision_recall import MOST_FOLDS, NEIGHBOURS, diversity, precision_recall

SAMPLES = 10_000
TEACHER_EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)
SHOWN_ROWS = 4
Sampler = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # (noise [B, C, H, W], labels [B], seeds [B]) -> images [B, C, H, W]


@dataclass(frozen=True)
class Name:
    """What a sampler is called: `family[@guidance]/evaluations`, such as `teacher@1.5/32` or `dmd2/1`."""

    family: str
    guidance: float
    evaluations: int

    @staticmethod
    def parse(text: str) -> Name:
        match = re.fullmatch(r"([^/@]+)(?:@(-?\d+(?:\.\d+)?))?/(\d+)", text)
        if not match:
            raise UserError(f"the sampler name {text!r} is not family[@guidance]/evaluations; write 'teacher@1.5/32'.")
        return Name(match[1], float(match[2] or 1), int(match[3]))

    def __str__(self) -> str:
        scale = "" if self.guidance == 1 else f"@{self.guidance:g}"
        return f"{self.family}{scale}/{self.evaluations}"


@dataclass
class _Real:
    """The digits every set is judged against, with their features."""

    network: DigitClassifier

    def __post_init__(self) -> None:
        self.train, self.train_labels = digits("train")
        self.held_out, self.labels = digits("held_out")
        self.train_features = self.network.features(self.train)
        self.features = self.network.features(self.held_out)
        self.moments = moments(self.features)


@dataclass
class _Drawn:
    images: Tensor
    features: Tensor
    classes: Tensor
    seconds: float


def evaluate(
    samplers: Mapping[str, Sampler],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    batch: int = 250,
    resamples: int = bootstrap.RESAMPLES,
    reference: str | None = None,
    comparisons: Sequence[tuple[str, str, float | None]] = (),
    kept: KeptImages | None = None,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score every sampler against the 360 held-out digits; the layout of the result is in `fewstep.evaluate.results`.

    samplers: by name (`Name`); family "teacher" goes under results["teacher"], every other under results["students"].
    samples: how many images of each, labels i mod 10, Philox seeds `seed * 2^32 + i`. reference: the sampler others'
    images are compared with, noise by noise. comparisons: (a, b, bound): Frechet a over b with paired intervals, held
    to the bound on the ratio where there is one. kept: where the images of artefacts (`Drawing`) are kept and found.
    Raises UserError for a name that cannot be read or is not there, too few samples, or images not finite.
    """
    names = {text: Name.parse(text) for text in samplers}
    for text in [*(name for pair in comparisons for name in pair[:2]), *([reference] if reference else [])]:
        if text not in names:
            raise UserError(f"the sampler {text!r} is not among those evaluated: {', '.join(names)}.")
    begun = time.perf_counter()
    real = _Real(digit_classifier())
    if samples < len(real.labels):
        raise UserError(f"samples is {samples}; give at least {len(real.labels)}, the number of held-out digits.")
    shape = tuple(real.held_out.shape[1:])
    index = torch.arange(samples)
    seeds, labels = seed * 2**32 + index, index % CLASSES
    results: dict[str, Any] = {
        "format": 1,
        "data": {
            "name": "scikit-learn digits",
            "train": len(real.train),
            "held_out": len(real.held_out),
            "classes": CLASSES,
            "image_shape": list(shape),
            "split_seed": SPLIT_SEED,
        },
        "measured": {
            "samples": samples,
            "seed": seed,
            "labels": "i mod 10",
            "batch": batch,
            "features": f"digit classifier {recipe_hash()}, {DIMENSIONS} features",
            "classifier_accuracy": _share(real.network.classes(real.features) == real.labels),
            "resamples": resamples,
            "confidence": bootstrap.CONFIDENCE,
            "neighbours": NEIGHBOURS,
            "most_folds": MOST_FOLDS,
        },
        "floor": _floor(real),
        "copying_control": nearest.copying(real.train, real.train, real.held_out).to_dict(),
        "teacher": {},
        "students": {},
        "comparisons": [],
        "samples": {},
    }
    wanted = {name for pair in comparisons for name in pair[:2]}
    resampled: dict[str, bootstrap.Resampled] = {}
    target: _Drawn | None = None
    for text in sorted(names, key=lambda text: text != reference):  # the reference first
        drawn = _draw(text, samplers[text], shape, seeds, labels, batch, real.network, kept)
        target = drawn if text == reference else target
        name, metrics = names[text], _metrics(drawn, labels, real)
        metrics["guidance"] = name.guidance
        if target is not None:
            metrics["fidelity"] = fidelity(drawn.images, target.images, drawn.classes, target.classes).to_dict()
        place = results["teacher"] if name.family == "teacher" else results["students"]
        group = f"{name.guidance:g}" if name.family == "teacher" else name.family
        place.setdefault(group, {})[str(name.evaluations)] = metrics
        results["samples"][str(name)] = sheet(drawn.images[: SHOWN_ROWS * CLASSES], CLASSES)
        if text in wanted:
            resampled[text] = bootstrap.resample(drawn.features, real.moments, resamples, seed)
        progress(
            f"{text:20} Frechet {metrics['frechet']:7.2f}   class accuracy {metrics['accuracy']:.3f}   "
            f"diversity {metrics['diversity']:.2f}   {samples} images in {drawn.seconds:.1f} s"
        )
    for group in [*results["teacher"].values(), *results["students"].values()]:
        ordered = sorted(group.items(), key=lambda item: int(item[0]))
        group.clear()
        group.update(ordered)
    for a, b, bound in comparisons:
        row: dict[str, Any] = {"name_a": a, "name_b": b}
        row |= bootstrap.compare(resampled[a], resampled[b]).to_dict()
        if bound is not None:
            row |= {"bound": bound, "holds": row["ratio"] <= bound}
        results["comparisons"].append(row)
    results["samples"]["held out"] = sheet(_one_of_each(real.held_out, real.labels), CLASSES)
    results["measured"]["reference"] = reference
    results["measured"]["seconds"] = round(time.perf_counter() - begun, 1)
    progress(f"{'real train':20} Frechet {results['floor']['frechet']:7.2f}   the floor: {len(real.train)} real digits")
    return results


def evaluate_artefacts(
    teacher: str | os.PathLike[str],
    students: Mapping[str, str | os.PathLike[str]],
    samples: int = SAMPLES,
    seed: int = 0,
    guidance: float = 1.5,
    *,
    teacher_evaluations: Sequence[int] = TEACHER_EVALUATIONS,
    bounds: Mapping[tuple[str, int, int], float] | None = None,
    images: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """`evaluate` for artefact folders: the teacher at each number of evaluations, the students at each they offer.

    The teacher's curve has the guidance the students were distilled at (their provenance, else 1); at 32 evaluations
    it is also scored unguided and at `guidance`, for fidelity against diversity. Each student is compared with the
    teacher at 32 and, with one evaluation, at 1. bounds: the largest ratio of Frechet distances that (student, its
    steps, the teacher's evaluations) is held to. images: a folder where drawn images are kept and, when weights, plan
    and seed are the same, found again.
    """
    bounds = bounds or {}
    from fewstep.runtime.student import (
        load,
    )  # the one import upward, and a late one: whoever evaluates folders has both

    model = load(teacher)
    if model.image_shape != (1, 8, 8) or model.classes != CLASSES:
        raise UserError(
            f"{os.fspath(teacher)!r} makes {model.classes} classes of shape {list(model.image_shape)}; "
            "evaluation is for the ten classes of 1x8x8 digits."
        )

    def teacher_sampler(evaluations: int, scale: float) -> Sampler:
        """The most steps of the teacher's solver that `evaluations` network calls allow."""
        for steps in range(evaluations, 0, -1):
            if model.plan(steps, scale).evaluations <= evaluations:
                return Drawing(model, steps, scale)
        raise UserError(f"the teacher's solver cannot sample in {evaluations} evaluations; choose more.")

    loaded = {name: load(path) for name, path in students.items()}
    scales = {name: student.artefact.guidance for name, student in loaded.items()}
    main = next(iter(scales.values()), 1.0)
    most = max(teacher_evaluations)
    samplers: dict[str, Sampler] = {}
    for scale, evaluations in [
        *((main, evaluations) for evaluations in teacher_evaluations),
        *((scale, 32) for scale in {1.0, float(guidance), *scales.values()} - {main}),
    ]:
        samplers[str(Name("teacher", scale, evaluations))] = teacher_sampler(evaluations, scale)
    comparisons: list[tuple[str, str, float | None]] = []
    for name, student in loaded.items():
        for steps in student.steps_offered:
            text = str(Name(name, scales[name], student.plan(steps).evaluations))
            samplers[text] = Drawing(student, steps)
            rival = str(Name("teacher", scales[name], 32))
            if rival in samplers:
                comparisons.append((text, rival, bounds.get((name, steps, 32))))
            start = str(Name("teacher", scales[name], 1))
            if steps == 1 and start in samplers:
                comparisons.append((text, start, bounds.get((name, steps, 1))))
    for name, path in {"teacher": teacher, **students}.items():
        kinds: dict[float, list[str]] = {}
        for each in map(Name.parse, samplers):
            if each.family == name:
                kinds.setdefault(each.guidance, []).append(str(each.evaluations))
        at = [", ".join(n) + (f" (guidance {w:g})" if w != 1 else "") for w, n in kinds.items()]
        progress(f"scoring {name} ({os.fspath(path)}) at {', and at '.join(at)} evaluations, {samples} images each")
    if not students:
        progress("no student is given: only the teacher is scored")
    return evaluate(
        samplers,
        samples=samples,
        seed=seed,
        reference=str(Name("teacher", main, most)),
        comparisons=comparisons,
        kept=None if images is None else KeptImages(images),
        progress=progress,
    )


def sheet(images: Tensor, columns: int, gap: int = 1) -> str:
    """Images [N, 1 or 3, H, W] in rows of `columns` as one PNG with clear gaps, in base64, pixel for pixel."""
    height, width = images.shape[-2] + gap, images.shape[-1] + gap
    rows = -(-len(images) // columns)
    canvas = torch.zeros(4, rows * height - gap, columns * width - gap, dtype=torch.uint8)
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    for number, picture in enumerate(pixels):
        top, left = number // columns * height, number % columns * width
        place = canvas[:, top : top + height - gap, left : left + width - gap]
        place[:3], place[3] = picture, 255
    stream = io.BytesIO()
    Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy(), "RGBA").save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def _draw(
    text: str,
    sampler: Sampler,
    shape: tuple[int, ...],
    seeds: Tensor,
    labels: Tensor,
    batch: int,
    network: DigitClassifier,
    kept: KeptImages | None,
) -> _Drawn:
    def work(chunk: Tensor, label: Tensor) -> Tensor:
        return sampler(fk.normal(chunk, shape), label, chunk).detach().float().cpu()

    settings = {"first seed": int(seeds[0]), "images": len(seeds), "batch": batch}
    found = kept.find(text, sampler, settings) if kept and isinstance(sampler, Drawing) else None
    if found is not None:
        drawn, seconds = found
    else:
        begun = time.perf_counter()
        drawn = torch.cat(_side_by_side(work, seeds.split(batch), labels.split(batch)))
        seconds = time.perf_counter() - begun
    if tuple(drawn.shape) != (len(seeds), *shape) or not drawn.isfinite().all():
        raise UserError(
            f"the sampler {text!r} gave images that are not finite or not of shape {list(shape)}; check it."
        )
    if found is None and kept and isinstance(sampler, Drawing):
        kept.keep(text, sampler, settings, drawn, seconds)
    features = network.features(drawn)
    return _Drawn(drawn, features, network.classes(features), seconds)


def _side_by_side(work: Callable[..., Tensor], *chunks: Sequence[Tensor]) -> list[Tensor]:
    """`work` on every chunk, in order. On a CPU one thread each, as many at once as torch had threads: a small network
    gains nothing from two threads in one operation."""
    threads = torch.get_num_threads()
    if torch.cuda.is_available() or threads == 1:
        return [work(*chunk) for chunk in zip(*chunks)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, *chunks))
    finally:
        torch.set_num_threads(threads)


def _metrics(drawn: _Drawn, labels: Tensor, real: _Real) -> dict[str, Any]:
    precision, recall = precision_recall(drawn.features, real.features)
    return {
        "count": len(labels),
        "frechet": frechet_distance(drawn.features, real.moments),
        "precision": precision,
        "recall": recall,
        "diversity": diversity(drawn.features, labels, real.features, real.labels),
        "accuracy": _share(drawn.classes == labels),
        "copying": nearest.copying(drawn.images, real.train, real.held_out).to_dict(),
        "seconds": round(drawn.seconds, 3),
    }


def _floor(real: _Real) -> dict[str, Any]:
    """What the real training digits score against the held-out ones."""
    precision, recall = precision_recall(real.train_features, real.features)
    classes = real.network.classes(real.train_features)
    return {
        "count": len(real.train),
        "frechet": frechet_distance(real.train_features, real.moments),
        "precision": precision,
        "recall": recall,
        "diversity": diversity(real.train_features, real.train_labels, real.features, real.labels),
        "accuracy": _share(classes == real.train_labels),
    }


def _one_of_each(images: Tensor, labels: Tensor) -> Tensor:
    rows = [images[labels == label][:SHOWN_ROWS] for label in range(CLASSES)]
    return torch.stack(rows, dim=1).flatten(0, 1)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
