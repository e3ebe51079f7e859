"""The command line, `fewstep COMMAND`: what it takes; a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Callable, Sequence

from fewstep import commands, host
from fewstep.arguments import LARGEST_SEED, Parser, guidance, number, read, whole
from fewstep.errors import UserError

Command = Callable[[argparse.Namespace], None]
seed = whole(0, LARGEST_SEED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 2 after a user's mistake (one sentence on stderr); 130 after Ctrl-C."""
    host.prepare()
    try:
        given = sys.argv[1:] if argv is None else list(argv)
        parser = _parser()
        if not given:
            parser.print_help()
            return 2
        arguments = read(parser, given)
        _check_backend(arguments.command)
        arguments.run(arguments)
    except UserError as error:
        return _told(str(error))
    except KeyboardInterrupt:
        print("fewstep: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _told(f"{place}{(error.strerror or str(error)).lower()}; mend that and give the command again.")
    except (MemoryError, RuntimeError) as error:
        asked = _memory(error)
        if asked is None:
            raise
        return _told(f"there is not enough memory{asked}; ask for fewer images, a smaller batch or a smaller network.")
    return 0


def _told(sentence: str) -> int:
    print(f"fewstep: {sentence}", file=sys.stderr)
    return 2


def _memory(error: BaseException) -> str | None:
    """What an error says was asked for, in words; None for an error that is not about memory."""
    text = str(error)
    found = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGTPE]iB)", text)
    if found:
        return f" (one piece of {found[2] or f'{int(found[1]) / 2**30:,.1f} GiB'} was asked for)"
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "overflow" in text:
        return ""
    return None


def _check_backend(command: str) -> None:
    """FEWSTEP_KERNELS must be a backend there is; `fewstep doctor` itself tells of those that cannot run here."""
    from fewstep_kernels import backends

    try:
        backends.override()
        if command != "doctor":
            backends.choose("lincomb", "cpu")
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None


def _version() -> str:
    try:
        return importlib.metadata.version("fewstep")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: from its sources)"


def _parser() -> Parser:
    parser = Parser(
        prog="fewstep",
        description="Distil diffusion and flow teachers into students of one to four network calls, and run them.",
        example="fewstep COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"fewstep {_version()}", help="the version, and no more")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, summary: str, example: str) -> Parser:
        command: Parser = subparsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", example=example
        )
        command.set_defaults(run=run)
        return command

    demo = add(
        "demo",
        commands.demo,
        "the whole way on the digits: teacher, students, evaluation, export, benchmark, report",
        "fewstep demo --out runs/again --seed 1",
    )
    demo.add_argument("--out", default="runs/demo", metavar="FOLDER", help="output folder")
    demo.add_argument("--seed", type=seed, default=0, help="of every training and every sample")
    demo.add_argument(
        "--resume", action="store_true", help="keep the finished stations and go on with the one that was cut off"
    )

    _recipe(
        add(
            "train",
            commands.run_recipe,
            "train a teacher from a recipe",
            "fewstep train recipes/digits_teacher.yaml train.updates=500 output=runs/small/teacher",
        ),
        "recipes/digits_teacher.yaml",
    )
    _recipe(
        add(
            "distill",
            commands.run_recipe,
            "distil a student from a recipe that names a teacher",
            "fewstep distill recipes/digits_dmd2.yaml teacher=runs/demo/teacher method.guidance=1.5",
        ),
        "recipes/digits_dmd2.yaml",
    )

    evaluate = add(
        "evaluate",
        commands.evaluate,
        "quality of a digits teacher and its students against held-out digits",
        "fewstep evaluate --teacher runs/demo/teacher --student dmd2=runs/demo/dmd2 --out runs/dmd2.json",
    )
    evaluate.add_argument("--teacher", metavar="FOLDER", help="the teacher's artefact (default: runs/demo/teacher)")
    evaluate.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a student's artefact; may be given several times (default: the demo's, where --teacher is left out too)",
    )
    evaluate.add_argument("--samples", type=whole(1), default=10_000, help="images drawn of each")
    evaluate.add_argument("--seed", type=seed, default=0, help="of the noise all of them start from")
    evaluate.add_argument(
        "--guidance", type=number(-100, 100), default=1.5, help="also score the guided teacher at this scale"
    )
    evaluate.add_argument(
        "--images",
        metavar="FOLDER",
        help="where drawn images are kept and, if still right, found again (default: nowhere)",
    )
    evaluate.add_argument("--out", default="runs/evaluation.json", metavar="FILE", help="where the numbers go")

    sample = add(
        "sample",
        commands.sample,
        "draw images from an artefact into one PNG, or one PNG each",
        "fewstep sample runs/demo/student --steps 4 --count 100 --out digits.png",
    )
    sample.add_argument("artefact", nargs="?", default="runs/demo/student", help="a student's or a teacher's folder")
    sample.add_argument("--steps", type=whole(1), help="network evaluations (default: the most the artefact records)")
    sample.add_argument("--count", type=whole(1), default=16, help="how many images")
    sample.add_argument("--label", type=whole(0), help="class to draw (default: all classes in turn)")
    sample.add_argument(
        "--guidance",
        type=guidance,
        metavar="SCALE|FORM",
        help="of a teacher: a number, 1 is none, or a form such as '{name: cfg, scale: 2, sigma_high: 5}' "
        "(default: what the artefact records)",
    )
    sample.add_argument(
        "--other",
        action="append",
        default=[],
        metavar="ROLE=FOLDER",
        help="an artefact that a form of guidance asks besides: --other weak=FOLDER for autoguidance",
    )
    sample.add_argument(
        "--negative",
        action="append",
        default=[],
        type=whole(0),
        metavar="CLASS",
        help="a class to steer away from, in guidance of form perp_neg; repeat it for several",
    )
    sample.add_argument(
        "--grid",
        metavar="NAME|FILE",
        help="of a teacher: a time grid by name (see `fewstep solvers`) or what `fewstep search-grid` wrote "
        "(default: what the artefact records)",
    )
    sample.add_argument("--solver", help="of a teacher: one of `fewstep solvers` (default: what the artefact records)")
    sample.add_argument("--seed", type=whole(0), default=0, help="of the first image; the next one has the next")
    sample.add_argument(
        "--batch", type=whole(1), help="images drawn at once; changes no image (default: by their size)"
    )
    sample.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    sample.add_argument(
        "--out", default="samples.png", metavar="FILE.png|FOLDER", help="one picture of all, or a folder of one each"
    )

    export = add(
        "export",
        commands.export,
        "write a student with its solver as one ONNX graph, and a TensorRT engine",
        "fewstep export runs/demo/student --onnx --steps 4",
    )
    export.add_argument("artefact", nargs="?", default="runs/demo/student", help="a student's or a teacher's folder")
    export.add_argument("--onnx", action="store_true", help="write the ONNX graph and hold it against PyTorch")
    export.add_argument("--tensorrt", action="store_true", help="build a TensorRT engine too (implies --onnx)")
    export.add_argument("--steps", type=whole(1), default=4, help="network evaluations in the graph")
    export.add_argument(
        "--guidance",
        type=guidance,
        metavar="SCALE|FORM",
        help="of a teacher: a number or a form, as `fewstep sample` takes it (default: what the artefact records)",
    )
    export.add_argument(
        "--other",
        action="append",
        default=[],
        metavar="ROLE=FOLDER",
        help="an artefact that a form of guidance asks besides, for the same graph: --other weak=FOLDER",
    )
    export.add_argument("--out", metavar="FOLDER", help="folder to write to (default: the artefact's)")

    bench = add(
        "bench",
        commands.bench,
        "latency and throughput of teacher and student: eager, torch.compile, ONNX Runtime",
        "fewstep bench --teacher runs/demo/teacher --student runs/demo/student --out runs/latency.json",
    )
    bench.add_argument("--teacher", default="runs/demo/teacher", metavar="FOLDER", help="the teacher's artefact")
    bench.add_argument("--student", default="runs/demo/student", metavar="FOLDER", help="the student's artefact")
    bench.add_argument("--seconds", type=number(0, above=True), default=0.5, help="least measuring time for each row")
    bench.add_argument("--out", metavar="FILE", help="where the numbers go as JSON (default: only the table is shown)")

    serve = add(
        "serve",
        commands.serve,
        "answer POST /v1/images/generations with pictures from an artefact",
        "fewstep serve runs/demo/student --port 8000",
    )
    serve.add_argument("artefact", nargs="?", default="runs/demo/student", help="a student's or a teacher's folder")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for other machines too")
    serve.add_argument("--port", type=whole(0, 65535), default=8000, help="0 takes a free one")

    searching = add(
        "search-grid",
        commands.search_grid,
        "find the times at which to ask a teacher, by dynamic programming or gradient descent",
        "fewstep search-grid runs/demo/teacher --steps 4 6 8 --out runs/grid.json",
    )
    searching.add_argument("teacher", help="a teacher's artefact folder")
    searching.add_argument(
        "--cost",
        default="gits",
        help="gits, gits-l1, gits-l2, bound or analytic; by gradient descent: samples or kernel",
    )
    searching.add_argument(
        "--steps", type=whole(1), nargs="+", default=[2, 4, 6, 8, 10], help="numbers of steps to find grids of"
    )
    searching.add_argument(
        "--out", default="grid.json", metavar="FILE", help="where the grids go; a search found there is not repeated"
    )
    searching.add_argument(
        "--nodes", metavar="GRID", help="time grid of the nodes, and where descent starts (default: the schedule's)"
    )
    searching.add_argument("--points", type=whole(2), default=60, help="steps between the nodes")
    searching.add_argument("--samples", type=whole(1), default=256, help="trajectories or images that are followed")
    searching.add_argument("--batch", type=whole(1), default=64, help="of them at once; changes nothing that is found")
    searching.add_argument(
        "--growth", type=number(0, above=True), help="weight of what follows a step (default: 1.15 for gits, else 1)"
    )
    searching.add_argument("--guidance", type=number(-100, 100), help="of the teacher that is followed (default: none)")
    searching.add_argument("--solver", default="dpmpp_2m", help="how the teacher walks over the nodes")
    searching.add_argument("--sampler", default="ddim", help="solver whose grid descent searches")
    searching.add_argument("--rounds", type=whole(1), default=100, help="how often descent moves the grid")
    searching.add_argument(
        "--data", help="'digits' or a folder, for bound and analytic (default: what the teacher was trained on)"
    )
    searching.add_argument("--seed", type=seed, default=0, help="of the noise")
    searching.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")

    report = add(
        "report",
        commands.report,
        "draw report.html from a results.json",
        "fewstep report runs/demo/results.json --out runs/demo/report.html",
    )
    report.add_argument("results", nargs="?", default="runs/demo/results.json", help="what demo or evaluate wrote")
    report.add_argument("--out", metavar="FILE", help="where the page goes (default: report.html beside the results)")

    add("methods", commands.methods, "list the distillation methods: name, idea, paper, file", "fewstep methods")
    add("solvers", commands.solvers, "list the solvers and time grids", "fewstep solvers")
    doctor = add(
        "doctor",
        commands.doctor,
        "what this machine has: versions, each operator's backend, and whether they work",
        "fewstep doctor --no-self-test",
    )
    doctor.add_argument(
        "--no-self-test", dest="self_test", action="store_false", help="do not run the operators' self-test (seconds)"
    )
    parser.commands = subparsers.choices
    return parser


def _recipe(parser: Parser, shown: str) -> None:
    parser.add_argument("recipe", help=f"a YAML recipe, such as {shown}")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without one, argparse says that overrides are required
        metavar="key=value",
        help="optional: what is to differ from the recipe, by dotted key, such as train.ema.decay=0.99",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last good checkpoint in the output folder"
    )


if __name__ == "__main__":
    sys.exit(main())
