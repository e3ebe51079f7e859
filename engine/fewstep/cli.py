"""The command line, `fewstep COMMAND`: one small function each; a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fewstep import host
from fewstep.errors import UserError

Command = Callable[[argparse.Namespace], None]


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML recipe, such as recipes/digits_teacher.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.ema.decay=0.99")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last good checkpoint in the output folder"
    )


def _run_recipe(arguments: argparse.Namespace) -> None:
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


def _evaluate(arguments: argparse.Namespace) -> None:
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


def _sample(arguments: argparse.Namespace) -> None:
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


def _export(arguments: argparse.Namespace) -> None:
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


def _bench(arguments: argparse.Namespace) -> None:
    from fewstep.runtime.bench import bench_artefacts, table

    results = bench_artefacts(teacher=arguments.teacher, student=arguments.student, seconds=arguments.seconds)
    print(table(results))
    if arguments.out:
        _write_json(arguments.out, results)
        print(f"wrote {arguments.out}")


def _serve(arguments: argparse.Namespace) -> None:
    from fewstep import serve

    serve.run(arguments.artefact, host=arguments.host, port=arguments.port)


def _search_grid(arguments: argparse.Namespace) -> None:
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


def _report(arguments: argparse.Namespace) -> None:
    from fewstep.evaluate.report import write_report

    path = Path(arguments.results)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a readable results file ({error}).") from None
    out = Path(arguments.out) if arguments.out else path.with_name("report.html")
    write_report(results, out)
    print(f"wrote {out}")


def _demo(arguments: argparse.Namespace) -> None:
    from fewstep.demo import demo

    demo(Path(arguments.out), seed=arguments.seed, resume=arguments.resume)


def _methods(arguments: argparse.Namespace) -> None:
    from fewstep import methods

    for name in methods.names():
        method = methods.get(name)
        first_line = (method.__doc__ or "").strip().splitlines()[0]
        module = sys.modules[method.__module__]
        source = (module.__doc__ or "").strip().splitlines()[0]
        print(f"{name:26} {first_line}\n{'':26} {source}\n{'':26} {_shown_path(module.__file__)}")


def _solvers(arguments: argparse.Namespace) -> None:
    from fewstep import solvers

    for name, line in solvers.describe().items():
        print(f"{name:14} {line}")
    from fewstep.solvers import grids

    print(f"time grids: {', '.join(grids.names())}")


def _doctor(arguments: argparse.Namespace) -> None:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewstep",
        description="Distil diffusion and flow teachers into students of one to four network calls, and run them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    demo = add("demo", _demo, "the whole way on the digits: teacher, students, evaluation, export, benchmark, report")
    demo.add_argument("--out", default="runs/demo", help="output folder (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--resume", action="store_true", help="keep the finished stations and go on with the one that was cut off"
    )

    _recipe_arguments(add("train", _run_recipe, "train a teacher from a recipe"))
    _recipe_arguments(add("distill", _run_recipe, "distil a student from a recipe"))

    evaluate = add("evaluate", _evaluate, "quality of a teacher and its students against held-out data")
    evaluate.add_argument("--teacher", default="runs/demo/teacher")
    evaluate.add_argument(
        "--student", action="append", default=[], metavar="NAME=FOLDER", help="may be given several times"
    )
    evaluate.add_argument("--samples", type=int, default=10_000)
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--guidance", type=float, default=1.5, help="also score the guided teacher at this scale")
    evaluate.add_argument("--images", help="a folder where drawn images are kept and, if still right, found again")
    evaluate.add_argument("--out", default="runs/evaluation.json")

    sample = add("sample", _sample, "draw images from an artefact into one PNG grid")
    sample.add_argument("artefact")
    sample.add_argument("--steps", type=int, default=None)
    sample.add_argument("--count", type=int, default=16)
    sample.add_argument("--label", type=int, default=None, help="class to draw (default: all classes in turn)")
    sample.add_argument("--guidance", type=float, default=None)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", default="samples.png")

    export = add("export", _export, "write a student with its solver as one ONNX graph, and a TensorRT engine")
    export.add_argument("artefact", nargs="?", default="runs/demo/student")
    export.add_argument("--onnx", action="store_true")
    export.add_argument("--tensorrt", action="store_true", help="build a TensorRT engine (implies --onnx)")
    export.add_argument("--steps", type=int, default=4)
    export.add_argument("--out", default=None, help="folder to write to (default: the artefact's)")

    bench = add("bench", _bench, "latency and throughput of teacher and student: eager, torch.compile, ONNX Runtime")
    bench.add_argument("--teacher", default="runs/demo/teacher")
    bench.add_argument("--student", default="runs/demo/student")
    bench.add_argument("--seconds", type=float, default=0.5, help="least measuring time for each row")
    bench.add_argument("--out", default=None)

    serve = add("serve", _serve, "answer POST /v1/images/generations with pictures from an artefact")
    serve.add_argument("artefact", nargs="?", default="runs/demo/student")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)

    searching = add("search-grid", _search_grid, "find the times at which to ask a teacher, by dynamic programming")
    searching.add_argument("teacher", help="a teacher's artefact folder")
    searching.add_argument("--cost", default="gits", help="gits, gits-l1, gits-l2, bound or analytic (default: gits)")
    searching.add_argument("--steps", type=int, nargs="+", default=[2, 4, 6, 8, 10])
    searching.add_argument(
        "--out", default="grid.json", help="where the grids go; a search found there is not repeated"
    )
    searching.add_argument("--nodes", default=None, help="time grid the nodes are taken from (default: the schedule's)")
    searching.add_argument("--points", type=int, default=60, help="steps between the nodes")
    searching.add_argument("--samples", type=int, default=256)
    searching.add_argument("--batch", type=int, default=64)
    searching.add_argument("--growth", type=float, default=None, help="weight of what follows a step (gits: 1.15)")
    searching.add_argument("--guidance", type=float, default=None, help="of the teacher that gits follows")
    searching.add_argument("--solver", default="dpmpp_2m", help="how gits' teacher walks over the nodes")
    searching.add_argument("--data", default=None, help="'digits' or a folder, for bound and analytic")
    searching.add_argument("--seed", type=int, default=0)
    searching.add_argument("--device", default="cpu")

    report = add("report", _report, "draw report.html from a results.json")
    report.add_argument("results", nargs="?", default="runs/demo/results.json")
    report.add_argument("--out", default=None)

    add("methods", _methods, "list the distillation methods: name, idea, paper, file")
    add("solvers", _solvers, "list the solvers and time grids")
    doctor = add("doctor", _doctor, "what this machine has: versions, each operator's backend, and whether they work")
    doctor.add_argument(
        "--no-self-test", dest="self_test", action="store_false", help="do not run the operators' self-test (seconds)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 2 after a user's mistake (one sentence on stderr); 130 after Ctrl-C."""
    host.prepare()
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewstep: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
