"""What each command of `fewstep` does with its arguments; `cli` reads them."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, choose


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
    from fewstep.demo import STUDENTS
    from fewstep.evaluate.results import check_writable, write_results
    from fewstep.evaluate.suite import evaluate_artefacts

    students = _named_paths(arguments.student)
    if arguments.teacher is None and not students:  # like the other commands: what `fewstep demo` made
        students = {name: f"runs/demo/{name}" for name in STUDENTS}
    out = check_writable(arguments.out)
    results = evaluate_artefacts(
        teacher=arguments.teacher or "runs/demo/teacher",
        students=students,
        samples=arguments.samples,
        seed=arguments.seed,
        guidance=arguments.guidance,
        images=arguments.images,
    )
    write_results(out, results)
    print(f"wrote {out}")


def _named_paths(items: Sequence[str]) -> dict[str, str]:
    """`["dmd2=runs/a", ...]` -> `{"dmd2": "runs/a"}`; a bare path is named after its folder."""
    named: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        name, path = (name, path) if equals else (Path(item).name, item)
        if not name or name == "teacher" or name in named:
            what = f"the name {name!r} twice" if name in named else f"{name!r} for a name"
            raise UserError(f"--student {item!r} gives {what}; write NAME=FOLDER with a name of its own for each.")
        named[name] = path
    return named


def sample(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    import fewstep
    from fewstep.runtime import images
    from fewstep.runtime.student import LARGEST_SEED

    count, out = arguments.count, Path(arguments.out)
    if arguments.seed + count - 1 > LARGEST_SEED:
        raise UserError(f"seeds from {arguments.seed} for {count} images go beyond 2^63 - 1; give a smaller --seed.")
    one_picture = out.suffix.lower() == ".png" and not out.is_dir()
    if not one_picture and (out.suffix or out.is_file()):
        raise UserError(f"--out {str(out)!r} is neither a .png file nor a folder; pictures are written as PNG.")
    student = fewstep.load(arguments.artefact, arguments.device)
    options = {
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "grid": _grid(arguments.grid),
        "solver": arguments.solver,
    }
    others = _others(arguments, student.plan(**options).roles)
    sheet = images.Sheet(count, student.image_shape) if one_picture else None
    folder = None if one_picture else images.Folder(out, count)
    if one_picture:
        images.check_place(out)
    size = arguments.batch or max(1, min(256, 2**22 // math.prod(student.image_shape)))
    with tqdm(total=count, desc="sample", unit="image", dynamic_ncols=True, disable=None) as bar:
        for first in range(0, count, size):
            numbers = range(first, min(first + size, count))
            seeds = [arguments.seed + number for number in numbers]
            condition = arguments.label
            if condition is None and student.classes is not None:
                condition = [number % student.classes for number in numbers]
            drawn = student.sample(
                len(seeds), cond=condition, seeds=seeds, others=others, negatives=arguments.negative, **options
            )
            if sheet is not None:
                sheet.add(drawn)
            if folder is not None:
                folder.add(drawn, seeds)
            bar.update(len(seeds))
    if sheet is not None:
        images.save(sheet.picture, out)
    print(f"wrote {out}" if one_picture else f"wrote {count} pictures to {out}, each named by its seed")


def _others(arguments: argparse.Namespace, wanted: Sequence[str]) -> dict[str, Any]:
    """The artefacts of `--other`, for the roles that the guidance asks."""
    import fewstep

    asked = f"asks for {' and '.join(map(repr, wanted))}" if wanted else "asks no other network"
    paths = {}
    for item in arguments.other:
        role, _, paths[role] = item.partition("=")
        if role not in wanted or not paths[role]:
            raise UserError(f"--other {item!r} is not ROLE=FOLDER of a role that is asked; this guidance {asked}.")
    for role in wanted:
        if role not in paths:
            raise UserError(f"this guidance asks a network in the role {role!r}; give --other {role}=FOLDER.")
    device = getattr(arguments, "device", "cpu")
    return {role: fewstep.load(path, device) for role, path in paths.items()}


def _grid(given: str | None) -> str | dict[str, str] | None:
    """A grid by name, or the file that a search wrote."""
    from fewstep.solvers import grids

    if given is None or given in grids.names():
        return given
    if Path(given).exists() or Path(given).suffix or len(Path(given).parts) > 1:
        return {"name": "searched", "path": given}
    raise choose("grid", given, [*grids.names(), "a file that `fewstep search-grid` wrote"])


def export(arguments: argparse.Namespace) -> None:
    import fewstep
    from fewstep.export.onnx import export_onnx
    from fewstep.export.parity import check_parity

    if not (arguments.onnx or arguments.tensorrt):
        raise UserError("nothing to export: give --onnx, --tensorrt or both.")
    student = fewstep.load(arguments.artefact)
    plan = student.plan(arguments.steps, arguments.guidance)
    asked: dict[str, Any] = {"steps": arguments.steps, "guidance": arguments.guidance}
    asked["others"] = _others(arguments, plan.roles)
    folder = Path(arguments.out or arguments.artefact)
    model = export_onnx(student, folder / f"student_{arguments.steps}.onnx", **asked)
    parity = check_parity(model, student, **asked)
    print(f"wrote {model}; largest difference to PyTorch over {parity['seeds']} seeds: {parity['max_abs_error']:.1e}")
    if arguments.tensorrt:
        from fewstep.export.tensorrt import build_engine

        engine = build_engine(model, model.with_suffix(".engine"))
        print(
            f"wrote {engine.path} ({engine.bytes / 2**20:.1f} MiB, built by {engine.backend} in {engine.seconds:.1f} s)"
        )


def bench(arguments: argparse.Namespace) -> None:
    from fewstep.evaluate.results import check_writable, write_results
    from fewstep.runtime.bench import bench_artefacts, table

    out = check_writable(arguments.out) if arguments.out else None
    results = bench_artefacts(teacher=arguments.teacher, student=arguments.student, seconds=arguments.seconds)
    print(table(results))
    if out:
        write_results(out, results)
        print(f"wrote {out}")


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
        sampler=arguments.sampler,
        rounds=arguments.rounds,
        seed=arguments.seed,
        device=arguments.device,
    )
    print(table(grid))
    print(f"use it: fewstep sample {arguments.teacher} --steps {max(grid.grids)} --grid {arguments.out}")
    print(f"in Python: grid={{'name': 'searched', 'path': {arguments.out!r}}}")


def report(arguments: argparse.Namespace) -> None:
    from fewstep.evaluate.report import write_report
    from fewstep.evaluate.results import read_results

    path = Path(arguments.results)
    results = read_results(path)
    out = Path(arguments.out) if arguments.out else path.with_name("report.html")
    if out.resolve() == path.resolve():
        raise UserError(f"--out {str(out)!r} is the results file itself; give another for the page.")
    write_report(results, out)
    print(f"wrote {out}")


def demo(arguments: argparse.Namespace) -> None:
    from fewstep.demo import demo

    demo(Path(arguments.out), seed=arguments.seed, resume=arguments.resume)


def methods(arguments: argparse.Namespace) -> None:
    from fewstep import columns, methods

    size = max(map(len, methods.names()))
    for name in methods.names():
        method = methods.get(name)
        module = sys.modules[method.__module__]
        about = [(text or "").strip().splitlines()[0] for text in (method.__doc__, module.__doc__)]
        rows = zip((name.ljust(size), "", ""), (*about, _shown_path(module.__file__)))
        print("\n".join(columns.aligned(list(rows), indent=0)))


def solvers(arguments: argparse.Namespace) -> None:
    from fewstep import columns, solvers
    from fewstep.solvers import grids

    print("solvers\n" + "\n".join(columns.aligned(list(solvers.describe().items()))))
    print("time grids\n" + "\n".join(columns.aligned(list(grids.describe().items()))))


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
