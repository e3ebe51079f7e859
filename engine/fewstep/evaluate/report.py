"""One self-contained report.html, no network, no script. `fewstep.evaluate.results` says what it is drawn from."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from fewstep.evaluate import plots, samplers
from fewstep.evaluate.report_tables import comparisons, copying, keyed, latencies, measured, numbers, text
from fewstep.evaluate.results import write_text

_MOST_POINTS = 240  # of a loss curve; above, runs of neighbours are averaged
_FEW = 4  # evaluations: teacher's sheets up to here stand beside the students'
_FEW_IMAGES = 2000  # real digits: 7.7 from 200 of them, 5.0 from 500, 3.3 from 1,437, in one classifier's features
RUNNERS = {"eager": "PyTorch eager", "compile": "torch.compile", "onnx": "ONNX Runtime"}


def write_report(results: Mapping[str, Any], out: str | Path) -> Path:
    """Draw the report into the file `out`, written beside and renamed; UserError where that is not writable.

    Any part of the results may be missing: what it would show is left out.
    """
    template = importlib.resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8")
    sections = (_head, _samples, _curves, _latency, comparisons, numbers, copying, _losses, measured)
    body = "\n".join(section(results) for section in sections)
    return write_text(out, Template(template).substitute(title="fewstep: what the students can do", body=body))


def _head(results: Mapping[str, Any]) -> str:
    students = [each for each in samplers.scored(results) if not each.is_teacher]
    if not students:
        return '<p class="brand">fewstep</p><h1>No student has been scored yet.</h1>'
    best = min(students, key=lambda each: (each.evaluations, each.metrics["frechet"]))
    student, frechet = samplers.title(best.family), best.metrics["frechet"]
    calls = "one network evaluation" if best.evaluations == 1 else f"{best.evaluations} network evaluations"
    sentence = f"With {calls} the {text(student)} scores a Fréchet distance of {frechet:.2f}"
    tiles = [(f"{frechet:.2f}", f"Fréchet distance of the {student} at {samplers.calls(best.evaluations)}")]
    rival = samplers.reference(results, best.guidance)
    if rival and rival.metrics["frechet"] > 0:
        sentence += f"; its teacher at {rival.evaluations} evaluations is at {rival.metrics['frechet']:.2f}"
        words = f"the distance of the {samplers.at(rival.name, rival.evaluations)} ({rival.metrics['frechet']:.2f})"
        tiles.append((f"{frechet / rival.metrics['frechet']:.2f}×", words))
    tiles += [tile for tile in [_speed(results, best)] if tile]
    floor = results.get("floor")
    if floor:
        tiles.append((f"{floor['frechet']:.2f}", "the floor: what real training images score, not 0"))
    cells = "".join(
        f'<div class="tile"><b>{value}</b><span class="soft">{text(words)}</span></div>' for value, words in tiles
    )
    return f'<p class="brand">fewstep</p><h1>{sentence}.</h1>{_set_up(results)}<div class="tiles">{cells}</div>'


def _set_up(results: Mapping[str, Any]) -> str:
    data, how = results.get("data"), results.get("measured")
    if not (data and how):
        return ""
    caution = " On so few images a distance is mostly bias." if how["samples"] < _FEW_IMAGES else ""
    return (
        f"<p class='soft'>{how['samples']:,} images of each sampler against {data['held_out']:,} held-out images "
        f"({text(data['name'])}); a lower distance is better.{caution}</p>"
    )


def _speed(results: Mapping[str, Any], best: samplers.Scored) -> tuple[str, str] | None:
    """The benchmarked student at as many evaluations against the same teacher that quality is compared with."""
    rows = [row for row in (results.get("latency") or {}).get("rows") or [] if row["runner"] == "eager"]
    fast = [row for row in rows if row["model"] != samplers.TEACHER and row["evaluations"] == best.evaluations]
    row = min(fast, key=lambda row: row["batch"], default=None)
    rival = next((each for each in rows if row and _is_reference(each, best.guidance, row["batch"])), None)
    if row is None or rival is None:
        return None
    student = samplers.title(samplers.benchmarked(results, row))
    teacher = samplers.at(samplers.name(samplers.TEACHER, best.guidance), rival["evaluations"])
    what = f"{student} at {samplers.calls(row['evaluations'])} than the {teacher}"
    return (
        f"{rival['p50_ms'] / row['p50_ms']:.0f}× faster",
        f"{what}; {RUNNERS['eager']}, batch {row['batch']}, same run",
    )


def _is_reference(row: Mapping[str, Any], guidance: float, batch: int) -> bool:
    wanted = (samplers.TEACHER, samplers.REFERENCE_EVALUATIONS, guidance, batch)
    scale = 1.0 if row.get("guidance") is None else row["guidance"]
    return (row["model"], row["evaluations"], scale, row["batch"]) == wanted


def _samples(results: Mapping[str, Any]) -> str:
    """Sheets in rows: teacher, then each student, at few evaluations; last what they aim at."""
    sheets = results.get("samples") or {}
    if not sheets:
        return ""
    read = {key: samplers.read(key) for key in sheets}
    order = sorted(sheets, key=lambda key: read[key][1:])
    few = [key for key in order if read[key][2] > 0 and (read[key][0] != samplers.TEACHER or read[key][2] <= _FEW)]
    families = dict.fromkeys([samplers.TEACHER, *(results.get("students") or {}), *(read[key][0] for key in few)])
    rows = [(samplers.title(family), [key for key in few if read[key][0] == family]) for family in families]
    aims = [key for key in order if read[key][0] == samplers.TEACHER and read[key][2] == samplers.REFERENCE_EVALUATIONS]
    rows.append(
        (
            f"what they aim at: {samplers.REFERENCE_EVALUATIONS} evaluations, and real images",
            [*aims, *(key for key in sheets if read[key][2] == 0)],
        )
    )
    metrics = {(each.family, each.guidance, each.evaluations): each.metrics for each in samplers.scored(results)}
    colours = samplers.colours(results)
    blocks = []
    for head, keys in rows:
        cards = "".join(_sheet(key, sheets[key], metrics, colours) for key in keys)
        if cards:
            blocks.append(f"<h3>{text(head[:1].upper() + head[1:])}</h3><div class='grid'>{cards}</div>")
    return (
        "<h2>Samples</h2><p class='soft'>The same noise and labels everywhere: one column a class, four draws each, "
        f"not chosen.</p>{''.join(blocks)}"
    )


def _sheet(key: str, png: str, metrics: Mapping[Any, Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    family, guidance, evaluations = samplers.read(key)
    name = samplers.name(family, guidance if family == samplers.TEACHER else None)
    few = family != samplers.TEACHER or evaluations <= _FEW  # these stand under their sampler's name
    words = samplers.calls(evaluations) if few else samplers.at(name, evaluations, short=True)
    what = samplers.at(name, evaluations)
    if not evaluations:
        words = what = "real images, held out"
    found = metrics.get((family, guidance, evaluations))
    score = f"<span>Fréchet {found['frechet']:.2f}</span>" if found else ""
    return (
        f'<figure class="card"><img alt="{text(what)}: four images of each class" src="data:image/png;base64,'
        f'{text(png)}"><figcaption>{keyed(words, colours.get(name))}{score}</figcaption></figure>'
    )


def _curves(results: Mapping[str, Any]) -> str:
    parts = [part for part in (_quality(results), _guidance(results)) if part]
    return f"<div class='pair'>{''.join(f'<section>{part}</section>' for part in parts)}</div>" if parts else ""


def _quality(results: Mapping[str, Any]) -> str:
    found: dict[str, list[plots.Point]] = {}
    for each in samplers.scored(results):
        found.setdefault(each.name, []).append((each.evaluations, each.metrics["frechet"]))
    if not found:
        return ""
    colours, floor = samplers.colours(results), results.get("floor")
    plot = plots.lines(
        [plots.Series(name, sorted(points), colours[name]) for name, points in found.items()],
        x="network evaluations (log scale)",
        y="Fréchet distance",
        log_x=True,
        log_y=True,
        ticks=sorted({x for points in found.values() for x, _ in points}),
        floor=(floor["frechet"], f"floor: real training images, {floor['frechet']:.2f}") if floor else None,
    )
    return (
        "<h2>Quality against evaluations</h2><p class='soft'>Fréchet distance to the held-out images, both axes "
        f"logarithmic; lower is better.</p><div class='card'>{plot}</div>"
    )


def _guidance(results: Mapping[str, Any]) -> str:
    found: dict[str, list[samplers.Scored]] = {}
    for each in samplers.scored(results):
        if not each.is_teacher or each.evaluations in (8, samplers.REFERENCE_EVALUATIONS):
            found.setdefault(each.name, []).append(each)
    if not found:
        return ""
    colours = samplers.colours(results)
    series = [
        plots.Series(
            name,
            [(each.metrics["diversity"], each.metrics["accuracy"]) for each in group],
            colours[name],
            [str(each.evaluations) for each in group],
        )
        for name, group in found.items()
    ]
    floor = results.get("floor")
    if floor:
        series.append(plots.Series("real images", [(floor["diversity"], floor["accuracy"])], samplers.NEUTRAL))
    plot = plots.scatter(series, x="diversity: variance within a class, held-out images = 1", y="class accuracy")
    return (
        "<h2>Fidelity against diversity</h2><p class='soft'>Class accuracy upward, diversity to the right; the numbers "
        f"are evaluations. Guidance buys the first with the second.</p><div class='card'>{plot}</div>"
    )


def _losses(results: Mapping[str, Any]) -> str:
    colours = samplers.colours(results)
    cards = []
    for run, networks in (results.get("losses") or {}).items():
        own, title = colours.get(samplers.name(run), samplers.NEUTRAL), samplers.title(run)
        series = []
        for network, points in networks.items():
            trained = network == "student"  # the network a run is for, also where that is a teacher
            colour = own if trained else samplers.NEUTRAL
            label = "" if len(networks) == 1 else title if trained else samplers.name(network)
            series.append(plots.Series(label, _thinned(points), colour, dashed=not trained))
        positive = all(y > 0 for each in series for _, y in each.points if math.isfinite(y))
        plot = plots.lines(series, x="update", y="loss", log_y=positive, marks=False)
        cards.append(f"<div class='card'><h3>{keyed(title[:1].upper() + title[1:], own)}</h3>{plot}</div>")
    return f"<h2>Training losses</h2><div class='trio'>{''.join(cards)}</div>" if cards else ""


def _thinned(points: list[list[float]]) -> list[plots.Point]:
    size = -(-len(points) // _MOST_POINTS)
    chunks = (points[start : start + size] for start in range(0, len(points), max(size, 1)))
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _latency(results: Mapping[str, Any]) -> str:
    latency = results.get("latency") or {}
    rows = latency.get("rows") or []
    if not rows:
        return ""
    colours = samplers.colours(results)
    cards = []
    for batch in sorted({row["batch"] for row in rows}):
        groups: dict[str, list[plots.Bar]] = {}
        for row in sorted((row for row in rows if row["batch"] == batch), key=lambda row: -row["evaluations"]):
            name = samplers.row_name(results, row)
            bar = plots.Bar(samplers.at(name, row["evaluations"]), row["p50_ms"], row["p90_ms"], colours[name])
            groups.setdefault(row["runner"], []).append(bar)
        drawn = [
            (RUNNERS.get(runner, runner), groups[runner]) for runner in dict.fromkeys(row["runner"] for row in rows)
        ]
        cards.append(f"<div class='card'><h3>Batch {batch}</h3>{plots.bars(drawn, unit='ms')}</div>")
    skipped = "".join(
        f"<p class='note'>Not measured: {text(RUNNERS.get(row['runner'], row['runner']))} ({text(row['reason'])}).</p>"
        for row in latency.get("skipped") or []
    )
    where = {"cpu": "the CPU"}.get(str(latency.get("device", "cpu")), latency.get("device"))
    return (
        "<h2>Latency</h2><p class='soft'>Bars are medians, whiskers reach the 90th percentile; all in one run, on "
        f"{text(where)}, number of threads: {text(latency.get('threads', '?'))}, "
        f"{text(latency.get('warmup_calls', '?'))} warm-up calls before the clock, "
        f"{text(latency.get('rounds', '?'))} interleaved rounds.</p><div class='pair'>{''.join(cards)}</div>"
        f"{latencies(results, RUNNERS)}{skipped}"
    )
