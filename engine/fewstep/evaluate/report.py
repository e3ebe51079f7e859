"""One self-contained report.html from results.json: no network, no script.

results.json, any part of which may be missing:

    format        1
    machine       {processor, cores, memory_gib, accelerator, system}
    versions      {package: version};  seconds {station: s}
    data          {name, train, held_out, classes, image_shape, split_seed}
    measured      {samples, seed, labels, batch, features, classifier_accuracy, resamples, confidence, neighbours,
                  most_folds, reference, seconds}
    floor         metrics of the real training images
    teacher       {guidance: {evaluations: metrics}}
    students      {method: {evaluations: metrics}}
    metrics       {count, guidance, frechet, precision, recall, diversity, accuracy, seconds,
                  fidelity {rmse, psnr, class_agreement, count}, copying {copied, threshold, median_ratio,
                  real_median_ratio, passes}}
    copying_control   the copying check on a replayed training set, which must fail it
    comparisons   [{a, b (Frechet distances), difference, difference_interval, ratio, ratio_interval, confidence,
                  bound and holds where a bound was set}], with the sets' names in name_a and name_b
    samples       {sampler name or "held out": PNG sheet in base64, one pixel for each of the images'}
    losses        {run: {network: [[update, loss], ...]}}
    latency       {rows: [{model, evaluations, guidance, runner, batch, p50_ms, p90_ms, p99_ms, images_per_second,
                  speedup_over_eager_teacher}], skipped, warmup_calls, rounds, threads, device, ...}
    export        {student, steps, onnx {...}, tensorrt {...}}
"""

from __future__ import annotations

import html
import importlib.resources
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

from fewstep.errors import UserError
from fewstep.evaluate import plots

_MOST_POINTS = 300  # of a loss curve; above, runs of neighbours are averaged


def write_report(results: Mapping[str, Any], out: str | Path) -> Path:
    """Draw the report into the file `out`, written beside and renamed; UserError where that is not writable."""
    out = Path(out)
    template = importlib.resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8")
    sections = (_head, _samples, _curves, _losses, _latency, _comparisons, _numbers, _copying, _measured)
    body = "\n".join(section(results) for section in sections)
    page = Template(template).substitute(title="fewstep: what the students can do", body=body)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {str(out)!r} ({error.strerror}); give a writable file.") from error
    return out


def _all(results: Mapping[str, Any]) -> Iterator[tuple[str, bool, int, Mapping[str, Any]]]:
    """Every scored set: (name of its group, is it the teacher, evaluations, metrics)."""
    for guidance, group in (results.get("teacher") or {}).items():
        name = "teacher" if float(guidance) == 1 else f"teacher, guidance {guidance}"
        for evaluations, metrics in group.items():
            yield name, True, int(evaluations), metrics
    for name, group in (results.get("students") or {}).items():
        for evaluations, metrics in group.items():
            yield name, False, int(evaluations), metrics


def _rival(results: Mapping[str, Any], metrics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The teacher at 32 evaluations and the guidance of `metrics`, if it was scored."""
    group = (results.get("teacher") or {}).get(f"{metrics.get('guidance', 1):g}") or {}
    return group.get("32")


def _head(results: Mapping[str, Any]) -> str:
    students = [(name, n, metrics) for name, teacher, n, metrics in _all(results) if not teacher]
    if not students:
        return '<p class="brand">fewstep</p><h1>No student has been scored yet.</h1>'
    name, evaluations, best = min(students, key=lambda row: (row[1], row[2]["frechet"]))
    rival = _rival(results, best)
    calls = "one network evaluation" if evaluations == 1 else f"{evaluations} network evaluations"
    sentence = f"With {calls} the {_label(name)} student scores a Fréchet distance of {best['frechet']:.2f}"
    tiles = [(f"{best['frechet']:.2f}", f"Fréchet distance, {_label(name)} at {evaluations}")]
    if rival:
        ratio = best["frechet"] / rival["frechet"]
        sentence += f"; its teacher at 32 evaluations is at {rival['frechet']:.2f}"
        tiles.append((f"{ratio:.2f}×", f"the teacher’s at 32 evaluations, {rival['frechet']:.2f}"))
    speed = _speed(results, evaluations)
    if speed:
        tiles.append(speed)
    if results.get("floor"):
        tiles.append((f"{results['floor']['frechet']:.2f}", "the floor: real training digits"))
    cells = "".join(
        f'<div class="tile"><b>{value}</b><span class="soft">{words}</span></div>' for value, words in tiles
    )
    return f'<p class="brand">fewstep</p><h1>{sentence}.</h1><div class="tiles">{cells}</div>'


def _speed(results: Mapping[str, Any], evaluations: int) -> tuple[str, str] | None:
    """The tile on speed: the benchmarked student at `evaluations` against the teacher, both eager, smallest batch."""
    eager = [row for row in (results.get("latency") or {}).get("rows", []) if row["runner"] == "eager"]
    students = [row for row in eager if row["model"] == "student" and row["evaluations"] == evaluations]
    row = min(students, key=lambda row: row["batch"], default=None)
    teacher = next(
        (each for each in eager if each["model"] == "teacher" and row and each["batch"] == row["batch"]), None
    )
    if row is None or teacher is None or not row.get("speedup_over_eager_teacher"):
        return None
    student = _label((results.get("export") or {}).get("student", "student"))
    words = f"{student} at {evaluations} than {_text(_model(teacher))}: PyTorch eager, batch {row['batch']}, same run"
    return f"{row['speedup_over_eager_teacher']:.0f}× faster", words


def _samples(results: Mapping[str, Any]) -> str:
    sheets = results.get("samples") or {}
    if not sheets:
        return ""
    scored = {f"{name}/{n}": metrics for name, _, n, metrics in _all(results)}
    teacher = sorted((key for key in sheets if key.startswith("teacher")), key=_by_evaluations)
    shown = [key for key in teacher if _by_evaluations(key)[1] in (1, 2, 4, 32)]
    students = sorted((key for key in sheets if not key.startswith("teacher") and "/" in key), key=_by_evaluations)
    cards = []
    for key in [*shown, *students, *(key for key in sheets if key == "held out")]:
        family, _, evaluations = key.partition("/")
        name, _, guidance = family.partition("@")
        words = "real, held out" if not evaluations else _calls(int(evaluations))
        if guidance:
            words += f", guidance {guidance}"
        metrics = scored.get(f"{name}/{evaluations}") if name != "teacher" else None
        group = f"{name}, guidance {guidance}" if guidance and name == "teacher" else name
        metrics = metrics or scored.get(f"{group}/{evaluations}")
        score = f"<span>Fréchet {metrics['frechet']:.2f}</span>" if metrics else ""
        cards.append(
            f'<figure class="card"><img alt="{_text(key)}: four images of each class" '
            f'src="data:image/png;base64,{_text(sheets[key])}"><figcaption><span><b>'
            f"{_label(name) if evaluations else 'Digits'}</b> · {_text(words)}</span>{score}</figcaption></figure>"
        )
    return (
        "<h2>Samples</h2><p class='soft'>The same noise and labels everywhere: one column a class, four draws each, "
        f"not chosen.</p><div class='grid'>{''.join(cards)}</div>"
    )


def _curves(results: Mapping[str, Any]) -> str:
    parts = [part for part in (_quality(results), _guidance(results)) if part]
    return f"<div class='pair'>{''.join(f'<section>{part}</section>' for part in parts)}</div>" if parts else ""


def _quality(results: Mapping[str, Any]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for name, _, evaluations, metrics in _all(results):
        series.setdefault(_label(name), []).append((evaluations, metrics["frechet"]))
    if not series:
        return ""
    ticks = sorted({x for points in series.values() for x, _ in points})
    floor = results.get("floor")
    plot = plots.lines(
        series,
        x="network evaluations (log scale)",
        y="Fréchet distance",
        log_x=True,
        ticks=ticks,
        floor=(floor["frechet"], "floor: real training digits") if floor else None,
    )
    return (
        "<h2>Quality against the number of evaluations</h2><p class='soft'>Fréchet distance to the held-out digits, "
        f"lower is better.</p><div class='card'>{plot}</div>"
    )


def _guidance(results: Mapping[str, Any]) -> str:
    series: dict[str, list[tuple[float, float, str]]] = {}
    for name, teacher, evaluations, metrics in _all(results):
        if not teacher or evaluations in (8, 32):
            point = (metrics["diversity"], metrics["accuracy"], f"{evaluations}")
            series.setdefault(_label(name), []).append(point)
    if not series:
        return ""
    plot = plots.scatter(series, x="diversity: variance within a class, real = 1", y="class accuracy")
    return (
        "<h2>Fidelity against diversity</h2><p class='soft'>Class accuracy upward, diversity to the right; numbers "
        "beside the points are network evaluations. Guidance buys the first with the second.</p>"
        f"<div class='card'>{plot}</div>"
    )


def _losses(results: Mapping[str, Any]) -> str:
    cards = []
    for run, networks in (results.get("losses") or {}).items():
        series = {_text(name): _thinned(points) for name, points in networks.items()}
        positive = all(y > 0 for points in series.values() for _, y in points)
        plot = plots.lines(series, x="update", y="loss", log_y=positive, marks=False, size=(520, 280))
        cards.append(f"<div class='card'><h3>{_label(run)}</h3>{plot}</div>")
    return f"<h2>Training losses</h2><div class='pair'>{''.join(cards)}</div>" if cards else ""


def _thinned(points: list[list[float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _MOST_POINTS)
    chunks = (points[start : start + size] for start in range(0, len(points), max(size, 1)))
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _latency(results: Mapping[str, Any]) -> str:
    latency = results.get("latency") or {}
    rows = latency.get("rows") or []
    if not rows:
        return ""
    shades = {key: n for n, key in enumerate(dict.fromkeys((row["model"], row["evaluations"]) for row in rows))}
    cards = []
    for batch in sorted({row["batch"] for row in rows}):
        chosen = sorted((row for row in rows if row["batch"] == batch), key=lambda row: -row["p50_ms"])
        drawn = [
            (f"{_model(row)} · {row['runner']}", row["p50_ms"], row["p90_ms"], shades[row["model"], row["evaluations"]])
            for row in chosen
        ]
        cards.append(f"<div class='card'><h3>Batch {batch}</h3>{plots.bars(drawn, unit='ms')}</div>")
    head = ("model", "runner", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up over eager teacher")
    body = [
        (
            _text(_model(row)),
            _text(row["runner"]),
            row["batch"],
            f"{row['p50_ms']:.3g}",
            f"{row['p90_ms']:.3g}",
            f"{row['p99_ms']:.3g}",
            f"{row['images_per_second']:,.0f}",
            f"{row['speedup_over_eager_teacher']:.1f}×" if row.get("speedup_over_eager_teacher") else "",
        )
        for row in rows
    ]
    skipped = "".join(
        f"<p class='note'>Not measured: {_text(row['runner'])} ({_text(row['reason'])}).</p>"
        for row in latency.get("skipped") or []
    )
    return (
        "<h2>Latency</h2><p class='soft'>Bars are medians, whiskers reach the 90th percentile; all in one run, on "
        f"{_text(latency.get('device', 'cpu'))} with {_text(latency.get('threads', '?'))} threads, "
        f"{_text(latency.get('warmup_calls', '?'))} warm-up calls before the clock, "
        f"{_text(latency.get('rounds', '?'))} interleaved rounds.</p><div class='pair'>{''.join(cards)}</div>"
        f"{_table(head, body)}{skipped}"
    )


def _comparisons(results: Mapping[str, Any]) -> str:
    rows = results.get("comparisons") or []
    if not rows:
        return ""
    body = []
    for row in rows:
        verdict = ""
        if row.get("bound") is not None:
            good = row["holds"]
            verdict = f'<span class="{"good" if good else "bad"}">{"≤" if good else "&gt;"} {row["bound"]:g}</span>'
        body.append(
            (
                f"{_text(row['name_a'])} to {_text(row['name_b'])}",
                f"{row['a']:.2f}",
                f"{row['b']:.2f}",
                f"{row['difference']:+.2f}",
                _interval(row["difference_interval"], "+.2f"),
                f"{row['ratio']:.3f}",
                _interval(row["ratio_interval"], ".3f"),
                verdict,
            )
        )
    percent = f"{100 * rows[0]['confidence']:g}%"
    head = ("Fréchet distances", "a", "b", "a − b", percent, "a / b", percent, "bound")
    return (
        "<h2>How sure the differences are</h2><p class='soft'>Paired bootstrap over the generated images, "
        f"the held-out set as it is.</p>{_table(head, body)}"
    )


def _numbers(results: Mapping[str, Any]) -> str:
    head = (
        *("sampler", "evaluations", "images", "Fréchet", "precision", "recall", "diversity", "class accuracy"),
        *("RMSE to teacher", "PSNR dB", "same class as teacher"),
    )
    body: list[tuple[Any, ...]] = []
    for name, _, evaluations, m in _all(results):
        close = m.get("fidelity") or {}
        body.append(
            (
                *(_label(name), evaluations, f"{m['count']:,}", f"{m['frechet']:.2f}", f"{m['precision']:.3f}"),
                *(f"{m['recall']:.3f}", f"{m['diversity']:.3f}", f"{m['accuracy']:.3f}"),
                f"{close['rmse']:.3f}" if close else "",
                f"{close['psnr']:.1f}" if close.get("psnr") is not None else ("–" if close else ""),
                f"{close['class_agreement']:.3f}" if close else "",
            )
        )
    floor = results.get("floor")
    if floor:
        cells = [f"{floor[key]:.3f}" for key in ("precision", "recall", "diversity", "accuracy")]
        body.append(("real training digits", "", f"{floor['count']:,}", f"{floor['frechet']:.2f}", *cells, "", "", ""))
    return f"<h2>All numbers</h2>{_table(head, body)}" if body else ""


def _copying(results: Mapping[str, Any]) -> str:
    head = ("sampler", "evaluations", "copied", "median distance ratio", "verdict")
    sets: list[tuple[Any, ...]] = [
        (_label(name), n, m["copying"]) for name, _, n, m in _all(results) if m.get("copying")
    ]
    control = results.get("copying_control")
    if control:
        sets.append(("the training set replayed (control)", "", control))
    if not sets:
        return ""
    body = [
        (
            *(name, n, f"{100 * found['copied']:.1f}%", f"{found['median_ratio']:.3f}"),
            '<span class="good">passes</span>' if found["passes"] else '<span class="bad">fails</span>',
        )
        for name, n, found in sets
    ]
    threshold, usual = sets[0][2]["threshold"], sets[0][2]["real_median_ratio"]
    return (
        "<h2>Is the training set replayed?</h2><p class='soft'>Distance to the nearest training image over distance "
        f"to the nearest held-out one. Unseen real digits have a median of {usual:.3f}; below their 1% quantile, "
        f"{threshold:.3f}, an image counts as copied. The last row must fail.</p>{_table(head, body)}"
    )


def _measured(results: Mapping[str, Any]) -> str:
    measured, data = results.get("measured") or {}, results.get("data") or {}
    facts: dict[str, Any] = {}
    if data:
        facts["data"] = (
            f"{data['name']}: {data['train']} to train on, {data['held_out']} held out, split {data['split_seed']}"
        )
    if measured:
        facts |= {
            "images": f"{measured['samples']:,} of each sampler, labels {measured['labels']}, seed {measured['seed']}",
            "features": f"{measured['features']}, {100 * measured['classifier_accuracy']:.1f}% right when held out",
            "precision, recall": f"{measured['neighbours']} neighbours, at most {measured['most_folds']} equal folds",
            "intervals": f"{measured['resamples']} paired resamples, {100 * measured['confidence']:g}%",
            "fidelity": f"against {measured['reference']}, from the same noise" if measured.get("reference") else "",
        }
    export = results.get("export") or {}
    if export.get("onnx"):
        facts["ONNX"] = (
            f"{export['student']} at {export['steps']} in one graph; largest difference to PyTorch "
            f"{export['onnx'].get('max_abs_error', float('nan')):.1e} on {export['onnx'].get('seeds', '?')} seeds"
        )
    if export.get("tensorrt"):
        engine = export["tensorrt"]
        facts["TensorRT"] = (
            f"{engine['backend']}, {engine['bytes'] / 2**20:.1f} MiB, built in {engine['build_seconds']:.1f} s"
        )
    machine = {key.replace("_", " "): value for key, value in (results.get("machine") or {}).items()}
    seconds = {key: f"{value:g} s" for key, value in (results.get("seconds") or {}).items()}
    lists = {
        "How it was measured": facts,
        "Machine": machine,
        "Seconds by station": seconds,
        "Versions": results.get("versions") or {},
    }
    cards = []
    for title, pairs in lists.items():
        if pairs:
            rows = "".join(
                f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in pairs.items() if value != ""
            )
            cards.append(f"<div class='card'><h3>{title}</h3><dl>{rows}</dl></div>")
    return f"<h2>Method and machine</h2><div class='pair'>{''.join(cards)}</div>" if cards else ""


def _table(head: tuple[Any, ...], body: list[tuple[Any, ...]]) -> str:
    top = "".join(f"<th>{name}</th>" for name in head)
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'


def _interval(pair: Any, form: str) -> str:
    return f"{pair[0]:{form}} to {pair[1]:{form}}"


def _model(row: Mapping[str, Any]) -> str:
    scale = row.get("guidance")
    return f"{row['model']} at {row['evaluations']}" + (f", guidance {scale:g}" if scale not in (None, 1) else "")


def _calls(number: int) -> str:
    return f"{number} evaluation" + ("s" if number != 1 else "")


def _by_evaluations(key: str) -> tuple[str, int]:
    family, _, number = key.partition("/")
    return family, int(number or 0)


def _label(name: str) -> str:
    return _text({"dmd2": "DMD2"}.get(name, name.replace("_", " ")))


def _text(value: Any) -> str:
    return html.escape(str(value))
