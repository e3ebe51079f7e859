"""The command line, `fewstep COMMAND`: what it takes; a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fewstep import commands, host
from fewstep.errors import UserError

Command = Callable[[argparse.Namespace], None]


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML recipe, such as recipes/digits_teacher.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.ema.decay=0.99")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last good checkpoint in the output folder"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewstep",
        description="Distil diffusion and flow teachers into students of one to four network calls, and run them.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    demo = add(
        "demo", commands.demo, "the whole way on the digits: teacher, students, evaluation, export, benchmark, report"
    )
    demo.add_argument("--out", default="runs/demo", help="output folder (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--resume", action="store_true", help="keep the finished stations and go on with the one that was cut off"
    )

    _recipe_arguments(add("train", commands.run_recipe, "train a teacher from a recipe"))
    _recipe_arguments(add("distill", commands.run_recipe, "distil a student from a recipe"))

    evaluate = add("evaluate", commands.evaluate, "quality of a teacher and its students against held-out data")
    evaluate.add_argument("--teacher", default="runs/demo/teacher")
    evaluate.add_argument(
        "--student", action="append", default=[], metavar="NAME=FOLDER", help="may be given several times"
    )
    evaluate.add_argument("--samples", type=int, default=10_000)
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--guidance", type=float, default=1.5, help="also score the guided teacher at this scale")
    evaluate.add_argument("--images", help="a folder where drawn images are kept and, if still right, found again")
    evaluate.add_argument("--out", default="runs/evaluation.json")

    sample = add("sample", commands.sample, "draw images from an artefact into one PNG grid")
    sample.add_argument("artefact")
    sample.add_argument("--steps", type=int, default=None)
    sample.add_argument("--count", type=int, default=16)
    sample.add_argument("--label", type=int, default=None, help="class to draw (default: all classes in turn)")
    sample.add_argument("--guidance", type=float, default=None)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", default="samples.png")

    export = add("export", commands.export, "write a student with its solver as one ONNX graph, and a TensorRT engine")
    export.add_argument("artefact", nargs="?", default="runs/demo/student")
    export.add_argument("--onnx", action="store_true")
    export.add_argument("--tensorrt", action="store_true", help="build a TensorRT engine (implies --onnx)")
    export.add_argument("--steps", type=int, default=4)
    export.add_argument("--out", default=None, help="folder to write to (default: the artefact's)")

    bench = add(
        "bench", commands.bench, "latency and throughput of teacher and student: eager, torch.compile, ONNX Runtime"
    )
    bench.add_argument("--teacher", default="runs/demo/teacher")
    bench.add_argument("--student", default="runs/demo/student")
    bench.add_argument("--seconds", type=float, default=0.5, help="least measuring time for each row")
    bench.add_argument("--out", default=None)

    serve = add("serve", commands.serve, "answer POST /v1/images/generations with pictures from an artefact")
    serve.add_argument("artefact", nargs="?", default="runs/demo/student")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)

    searching = add(
        "search-grid", commands.search_grid, "find the times at which to ask a teacher, by dynamic programming"
    )
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

    report = add("report", commands.report, "draw report.html from a results.json")
    report.add_argument("results", nargs="?", default="runs/demo/results.json")
    report.add_argument("--out", default=None)

    add("methods", commands.methods, "list the distillation methods: name, idea, paper, file")
    add("solvers", commands.solvers, "list the solvers and time grids")
    doctor = add(
        "doctor", commands.doctor, "what this machine has: versions, each operator's backend, and whether they work"
    )
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
