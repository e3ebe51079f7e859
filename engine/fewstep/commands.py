"""What each command of `fewstep` does with its arguments; `cli` reads them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fewstep.errors import UserError


def run_recipe(arguments: argparse.Namespace) -> None:
    from fewstep import config
    from fewstep.train import train

    recipe = config.load(arguments.recipe, arguments.overrides)
    wants_teacher = arguments.command == "distill"
    if wants_teacher and recipe.teacher is None:
        raise UserError(
            f"{arguments.recipe}: `fewstep distill` needs `teacher:`, an artefact folder; `fewstep train` makes one."
        )
    if not wants_teacher and recipe.teacher is not None:
        raise UserError(
            f"{arguments.recipe}: names a teacher, so it is a recipe for `fewstep distill`, not `fewstep train`."
        )
    artefact = train(recipe, resume=arguments.resume)
    print(f"saved {artefact}")


def evaluate(arguments: argparse.Namespace) -> None:
    from fewstep.evaluate.suite import evaluate_artefacts

    results = evaluate_artefacts(
        teacher=arguments.teacher,
        students=_named_paths(arguments.student),
        samples=arguments.samples,
        seed=arguments.seed,
        guidance=arguments.guidance,
        images=arguments.images,
    )
    _write_json(arguments.out, results)
    print(f"wrote {arguments.out}")


def _named_paths(items: Sequence[str]) -> dict[str, str]:
    """`["dmd2=runs/a", ...]` -> `{"dmd2": "runs/a"}`; a bare path is named after its folder."""
    named: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        named[name if equals else Path(item).name] = path if equals else item
    return named


def sample(arguments: argparse.Namespace) -> None:
    import torch

    import fewstep
    from fewstep.runtime.images import save_grid

    student = fewstep.load(arguments.artefact)
    count = arguments.count
    condition = None
    if arguments.label is not None:
        condition = torch.full((count,), arguments.label, dtype=torch.int64)
    elif student.classes is not None:
        condition = torch.arange(count) % student.classes
    seeds = torch.arange(arguments.seed, arguments.seed + count)
    images = student.sample(count, cond=condition, steps=arguments.steps, seeds=seeds, guidance=arguments.guidance)
    save_grid(images, arguments.out)
    print(f"wrote {arguments.out}")


def export(arguments: argparse.Namespace) -> None:
    from fewstep.export.onnx import export_onnx
    from fewstep.export.parity import check_parity

    if not (arguments.onnx or arguments.tensorrt):
        raise UserError("nothing to export: give --onnx, --tensorrt or both.")
    folder = Path(arguments.out or arguments.artefact)
    model = export_onnx(arguments.artefact, folder / f"student_{arguments.steps}.onnx", steps=arguments.steps)
    parity = check_parity(model, arguments.artefact, steps=arguments.steps)
    print(f"wrote {model}; largest difference to PyTorch over {parity['seeds']} seeds: {parity['max_abs_error']:.1e}")
    if arguments.tensorrt:
        from fewstep.export.tensorrt import build_engine

        engine = build_engine(model, model.with_suffix(".engine"))
        print(
            f"wrote {engine.path} ({engine.bytes / 2**20:.1f} MiB, built by {engine.backend} in {engine.seconds:.1f} s)"
        )


def bench(arguments: argparse.Namespace) -> None:
    from fewstep.runtime.bench import bench_artefacts, table

    results = bench_artefacts(teacher=arguments.teacher, student=arguments.student, seconds=arguments.seconds)
    print(table(results))
    if arguments.out:
        _write_json(arguments.out, results)
        print(f"wrote {arguments.out}")


def serve(arguments: argparse.Namespace) -> None:
    from fewstep import serve

    serve.run(arguments.artefact, host=arguments.host, port=arguments.port)


def search_grid(arguments: argparse.Namespace) -> None:
    from fewstep.evaluate.grid_search import search_grid, table

    grid = search_grid(
        arguments.teacher,
        arguments.out,
        cost=arguments.cost,
        steps=arguments.steps,
        nodes=arguments.nodes,
        points=arguments.points,
        samples=arguments.samples,
        batch=arguments.batch,
        growth=arguments.growth,
        guidance=arguments.guidance,
        solver=arguments.solver,
        data=arguments.data,
        seed=arguments.seed,
        device=arguments.device,
    )
    print(table(grid))
    print(f"{arguments.out}: use it as grid={{'name': 'searched', 'path': {arguments.out!r}}}")


def report(arguments: argparse.Namespace) -> None:
    from fewstep.evaluate.report import write_report

    path = Path(arguments.results)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a readable results file ({error}).") from None
    out = Path(arguments.out) if arguments.out else path.with_name("report.html")
    write_report(results, out)
    print(f"wrote {out}")


def demo(arguments: argparse.Namespace) -> None:
    from fewstep.demo import demo

    demo(Path(arguments.out), seed=arguments.seed, resume=arguments.resume)


def methods(arguments: argparse.Namespace) -> None:
    from fewstep import methods

    for name in methods.names():
        method = methods.get(name)
        first_line = (method.__doc__ or "").strip().splitlines()[0]
        module = sys.modules[method.__module__]
        source = (module.__doc__ or "").strip().splitlines()[0]
        print(f"{name:26} {first_line}\n{'':26} {source}\n{'':26} {_shown_path(module.__file__)}")


def solvers(arguments: argparse.Namespace) -> None:
    from fewstep import solvers

    for name, line in solvers.describe().items():
        print(f"{name:14} {line}")
    from fewstep.solvers import grids

    print(f"time grids: {', '.join(grids.names())}")


def doctor(arguments: argparse.Namespace) -> None:
    from fewstep import doctor

    print(doctor.report(), flush=True)
    if arguments.self_test:
        page, problems = doctor.self_test()
        print(page)
        if problems:
            more = f" {len(problems) - 1} more checks failed." if len(problems) > 1 else ""
            print(f"fewstep: {problems[0]}{more}", file=sys.stderr)
            sys.exit(1)


def _shown_path(path: str | None) -> str:
    resolved = Path(path or "").resolve()
    try:
        return str(resolved.relative_to(Path.cwd()))
    except ValueError:
        return str(resolved)


def _write_json(path: str, content: object) -> None:
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}.") from None
