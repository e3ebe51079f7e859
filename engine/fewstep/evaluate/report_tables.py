"""The report's tables and lists."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fewstep.evaluate import samplers

Cell = Any  # HTML, or a number


def latencies(results: Mapping[str, Any], runners: Mapping[str, str]) -> str:
    rows = (results.get("latency") or {}).get("rows") or []
    colours = samplers.colours(results)
    against = next((row for row in rows if row.get("speedup_over_eager_teacher") == 1), None)
    head = ["sampler", "evaluations", "runner", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s"]
    note = ""
    if against:
        head.append("speed-up")
        teacher = samplers.at(samplers.name(samplers.TEACHER, against.get("guidance")), against["evaluations"])
        runner = runners.get(against["runner"], against["runner"])
        note = f"<p class='note'>Speed-up: over the {text(teacher)} in {text(runner)}, at the same batch.</p>"
    body = []
    for row in rows:
        name = samplers.row_name(results, row)
        times = [f"{row[key]:.3g}" for key in ("p50_ms", "p90_ms", "p99_ms")]
        cells = [keyed(name, colours[name]), row["evaluations"], text(runners.get(row["runner"], row["runner"]))]
        cells += [row["batch"], *times, f"{row['images_per_second']:,.0f}"]
        if against:
            ratio = row.get("speedup_over_eager_teacher")
            cells.append(f"{ratio:.1f}×" if ratio else "")
        body.append(cells)
    return table(head, body, words={0, 2}) + note


def comparisons(results: Mapping[str, Any]) -> str:
    rows = results.get("comparisons") or []
    if not rows:
        return ""
    body = []
    for row in rows:
        verdict = ""
        if row.get("bound") is not None:
            good = row.get("holds")
            verdict = f'<span class="{"good" if good else "bad"}">{"≤" if good else "&gt;"} {row["bound"]:g}</span>'
        body.append(
            [
                *(_whose(results, row["name_a"]), _whose(results, row["name_b"])),
                *(f"{row['a']:.2f}", f"{row['b']:.2f}"),
                *(signed(row["difference"], "+.2f"), _interval(row["difference_interval"], "+.2f")),
                *(f"{row['ratio']:.3f}", _interval(row["ratio_interval"], ".3f")),
                verdict,
            ]
        )
    if all(row.get("bound") is None for row in rows):
        body = [cells[:-1] for cells in body]
    interval = f"{100 * rows[0]['confidence']:g}% interval"
    head = ["sampler", "against", "its distance", "the other’s", "difference", interval, "ratio", interval, "bound"]
    head = head[: len(body[0])]
    return (
        "<h2>How sure the differences are</h2><p class='soft'>Fréchet distances and paired bootstrap intervals: the "
        f"generated images are resampled, the held-out set stays as it is.</p>{table(head, body, words={0, 1})}"
    )


def numbers(results: Mapping[str, Any]) -> str:
    head = [
        *("sampler", "evaluations", "images", "Fréchet", "precision", "recall", "diversity", "class accuracy"),
        *("RMSE to teacher", "PSNR dB", "same class as teacher"),
    ]
    colours = samplers.colours(results)
    body: list[Sequence[Cell]] = []
    for each in samplers.scored(results):
        m, close = each.metrics, each.metrics.get("fidelity")
        body.append(
            [
                *(keyed(each.name, colours[each.name]), each.evaluations, f"{m['count']:,}", f"{m['frechet']:.2f}"),
                *(f"{m[key]:.3f}" for key in ("precision", "recall", "diversity", "accuracy")),
                *(_closeness(close) if close else ("", "", "")),
            ]
        )
    floor = results.get("floor")
    if floor:
        cells = [f"{floor[key]:.3f}" for key in ("precision", "recall", "diversity", "accuracy")]
        name = keyed("real training images", samplers.NEUTRAL)
        body.append([name, "", f"{floor['count']:,}", f"{floor['frechet']:.2f}", *cells, "", "", ""])
    return f"<h2>All numbers</h2>{table(head, body)}" if body else ""


def _closeness(fidelity: Mapping[str, Any]) -> tuple[str, str, str]:
    psnr = fidelity.get("psnr")
    return f"{fidelity['rmse']:.3f}", "–" if psnr is None else f"{psnr:.1f}", f"{fidelity['class_agreement']:.3f}"


def copying(results: Mapping[str, Any]) -> str:
    head = ["sampler", "evaluations", "copied", "median distance ratio", "verdict"]
    colours = samplers.colours(results)
    sets: list[tuple[Cell, Cell, Mapping[str, Any]]] = [
        (keyed(each.name, colours[each.name]), each.evaluations, each.metrics["copying"])
        for each in samplers.scored(results)
        if each.metrics.get("copying")
    ]
    control = results.get("copying_control")
    if control:
        sets.append((keyed("control: the training set replayed", samplers.NEUTRAL), "", control))
    if not sets:
        return ""
    body = [
        [
            *(name, evaluations, f"{100 * found['copied']:.1f}%", f"{found['median_ratio']:.3f}"),
            '<span class="good">passes</span>' if found["passes"] else '<span class="bad">fails</span>',
        ]
        for name, evaluations, found in sets
    ]
    threshold, usual = sets[0][2]["threshold"], sets[0][2]["real_median_ratio"]
    must_fail = " The last row, a control, must fail." if control else ""
    return (
        "<h2>Is the training set replayed?</h2><p class='soft'>Distance to the nearest training image over distance "
        f"to the nearest held-out one. Unseen real images have a median of {usual:.3f}; below their 1% quantile, "
        f"{threshold:.3f}, an image counts as copied.{must_fail}</p>{table(head, body)}"
    )


def measured(results: Mapping[str, Any]) -> str:
    machine = dict(results.get("machine") or {})
    memory = machine.pop("memory_gib", None)
    if memory is not None:
        machine["memory"] = f"{memory:g} GiB"
    lists = {
        "How it was measured": _facts(results),
        "Machine": {key.replace("_", " "): value for key, value in machine.items()},
        "Seconds by station": {key: f"{value:,.0f} s" for key, value in (results.get("seconds") or {}).items()},
        "Versions": results.get("versions") or {},
    }
    cards = []
    for title, pairs in lists.items():
        rows = "".join(
            f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in pairs.items() if value not in ("", None)
        )
        if rows:
            cards.append(f"<div class='card'><h3>{title}</h3><dl>{rows}</dl></div>")
    return f"<h2>Method and machine</h2><div class='pair'>{''.join(cards)}</div>" if cards else ""


def _facts(results: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    how, data, export = (results.get(key) or {} for key in ("measured", "data", "export"))
    if data:
        facts["data"] = (
            f"{data['name']}: {data['train']} to train on, {data['held_out']} held out (split {data['split_seed']})"
        )
    if how:
        facts |= {
            "images": f"{how['samples']:,} of each sampler, labels {how['labels']}, seed {how['seed']}",
            "features": f"{how['features']}; {100 * how['classifier_accuracy']:.1f}% right on held-out images",
            "precision, recall": f"{how['neighbours']} neighbours, at most {how['most_folds']} equal folds",
            "intervals": f"{how['resamples']} paired resamples, {100 * how['confidence']:g}%",
        }
        if how.get("reference"):
            family, guidance, evaluations = samplers.read(how["reference"])
            against = samplers.at(samplers.name(family, guidance), evaluations)
            facts["fidelity"] = f"against the {against}, from the same noise"
    if export.get("onnx"):
        student = samplers.at(samplers.title(export["student"]), export["steps"])
        error, seeds = export["onnx"]["max_abs_error"], export["onnx"]["seeds"]
        facts["ONNX"] = f"{student} in one graph; largest difference to PyTorch {error:.1e} on {seeds} seeds"
    if export.get("tensorrt"):
        engine = export["tensorrt"]
        backend = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}.get(engine["backend"], engine["backend"])
        size = f"{engine['bytes'] / 2**20:.1f} MiB"
        facts["TensorRT"] = f"{backend} engine of {size}, built in {engine['build_seconds']:.1f} s and not run here"
    return facts


def table(head: Sequence[str], body: Sequence[Sequence[Cell]], *, words: Collection[int] = (0,)) -> str:
    """A table, the columns `words` set to the left; where it is wider than the page it scrolls under its first."""
    kinds = ["words" if number in words else "" for number in range(len(head))]
    top = "".join(f'<th class="{kind}">{name}</th>' if kind else f"<th>{name}</th>" for kind, name in zip(kinds, head))
    rows = (
        "".join(f'<td class="{kind}">{cell}</td>' if kind else f"<td>{cell}</td>" for kind, cell in zip(kinds, row))
        for row in body
    )
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    hint = f"<p class='swipe'>Swipe sideways: {len(head)} columns →</p>"
    return (
        f'{hint}<div class="scroll" tabindex="0" role="region" aria-label="table of {len(body)} rows">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def keyed(words: str, colour: str | None) -> str:
    """Words behind a dot in their sampler's colour."""
    dot = f'<i style="background:{colour or samplers.NEUTRAL}"></i>'
    return f'<span class="key">{dot}{text(words)}</span>'


def text(value: Any) -> str:
    return html.escape(str(value))


def _whose(results: Mapping[str, Any], key: str) -> str:
    family, guidance, evaluations = samplers.read(key)
    name = samplers.name(family, guidance if family == samplers.TEACHER else None)
    return keyed(samplers.at(name, evaluations, short=True), samplers.colours(results).get(name))


def _interval(pair: Sequence[float], form: str) -> str:
    return f"{signed(pair[0], form)} to {signed(pair[1], form)}"


def signed(value: float, form: str) -> str:
    """With a minus of a figure's width, and none before zero."""
    words = f"{value:{form}}"
    return words.replace("-", "−") if float(words) else words.lstrip("+-")
