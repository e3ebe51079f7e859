"""What the pages say is so: their code runs, their excerpts are in the files they name, their commands parse and their
links lead somewhere.

A ```python block runs, in the page's order, in one namespace a page, beside `recipes/` and small artefacts with random
weights in `runs/demo/`. Under `<!-- excerpt: PATH -->` it must stand in that file word for word instead (a line that is
only `...` leaves something out); under `<!-- sketch: WHY -->` it must only parse.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fewstep
import fewstep_kernels
from fewstep import cli, config
from fewstep.arguments import read
from fewstep.errors import UserError
from fewstep.methods import registry as method_registry
from fewstep.solvers import registry as solver_registry

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SHELL = ("", "sh", "bash", "console")
MADE = ("runs/", "build/", ".venv/", "~", "$")  # what only a run leaves behind


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code, from 1
    language: str
    mark: str  # "excerpt: ..", "sketch: .." or ""
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    language, lines, above, start = None, [], "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip().startswith("```"):
            if language is None:
                language, lines, start = line.strip().strip("`"), [], number + 1
            else:
                mark = re.fullmatch(r"<!--\s*((?:excerpt|sketch):.*?)\s*-->", above)
                yield Block(page, start, language, mark[1] if mark else "", "\n".join(lines))
                language, above = None, ""
        elif language is not None:
            lines.append(line)
        elif line.strip():
            above = line.strip()


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
RUN = sorted({block.page for block in PYTHON if not block.mark})


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, as lists of words; comments and what follows a pipe are left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")]
        if words:
            yield words[: min(ends, default=len(words))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_runs(page, tmp_path, monkeypatch, request, student_folder, teacher_folder):
    monkeypatch.setattr(method_registry, "_METHODS", dict(method_registry._METHODS))  # a page may register its own
    monkeypatch.setattr(solver_registry, "_SOLVERS", dict(solver_registry._SOLVERS))
    shutil.copytree(student_folder, tmp_path / "runs/demo/student")
    if "student_4.onnx" in page.read_text(encoding="utf-8"):
        shutil.copy(request.getfixturevalue("graph"), tmp_path / "runs/demo/student/student_4.onnx")
    shutil.copytree(teacher_folder, tmp_path / "runs/demo/teacher")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in PYTHON:
        if block.page == page and not block.mark:
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("block", [block for block in PYTHON if block.mark], ids=lambda block: block.name)
def test_every_excerpt_is_in_its_file_and_every_sketch_parses(block):
    kind, _, rest = (part.strip() for part in block.mark.partition(":"))
    if kind == "sketch":
        ast.parse(block.text)
        return
    source = (ROOT / rest).read_text(encoding="utf-8")
    for piece in re.split(r"^\s*\.\.\.$", block.text, flags=re.M):
        found = source.find(piece.strip("\n"))
        assert found >= 0, f"{block.name}: not in {rest}:\n{piece}"
        source = source[found + len(piece.strip("\n")) :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for block in BLOCKS:
        for words in commands(block) if block.page == page and block.language in SHELL else ():
            if words[0] == "make":
                assert set(words[1:]) <= targets, f"{block.name}: {words}"
            elif words[0] == "fewstep":
                accepts(block, words[1:])
            elif words[0] != "curl":
                paths = [word for word in words if "/" in word and "://" not in word and not word.startswith(MADE)]
                assert not [path for path in paths if not list(ROOT.glob(path.partition("::")[0]))], (
                    f"{block.name}: {words}"
                )


def accepts(block: Block, words: list[str]) -> None:
    """The command line takes these words, and a recipe among them takes its overrides."""
    try:
        arguments = read(cli._parser(), words)
    except (SystemExit, UserError) as error:
        pytest.fail(f"{block.name}: fewstep {' '.join(words)}: {error}")
    if "recipe" in arguments and (ROOT / "recipes").joinpath(Path(arguments.recipe).name).exists():
        config.load(arguments.recipe, arguments.overrides)


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_every_named_file_exists(page):
    text = prose(page)
    links = [link.partition("#") for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text)]
    linked = [page.parent / path for path, _, _ in links]
    for path, _, anchor in links:
        assert not anchor or anchor in anchors(page.parent / path if path else page), f"{page.name}: {path}#{anchor}"
    # `folder/file.py`, as seen from the root or, within a list of neighbours, from the folder named before it
    spans = [span for span in re.findall(r"`([^`\s]+)`", text) if re.fullmatch(r"[\w.-]+(/[\w.*-]+)+/?", span)]
    tops = {path.name for path in ROOT.iterdir()}
    named = [ROOT / span for span in spans if span.split("/")[0] in tops and not span.startswith(MADE)]
    missing = [str(path) for path in (*linked, *named) if "*" not in path.name and not path.exists()]
    assert not missing, missing


def test_the_readmes_commands_follow_each_other(tmp_path, monkeypatch, capsys):
    """Each finds what the one before left: a teacher, a student, its graph. Short and small, and without TensorRT."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    lines = [words for block in BLOCKS if block.page.name == "README.md" for words in commands(block)]
    chain = [words[1:] for words in lines if words[0] == "fewstep" and words[1] in ("train", "distill", "export")]
    assert [words[0] for words in chain] == ["train", "distill", "export"]
    for command, *words in chain:
        small = ["--steps", "1"] if command == "export" else ["train.updates=2", "data.batch_size=8"]
        given = [command, *(word for word in words if word != "--tensorrt"), *small]
        assert cli.main(given) == 0, capsys.readouterr().err
    assert list((tmp_path / chain[-1][1]).glob("*.onnx"))


def test_commands_named_in_the_text_exist():
    known = set(cli._parser()._subparsers._group_actions[0].choices)
    for page in PAGES:
        named = set(re.findall(r"`fewstep ([a-z-]+)", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.name}: {named - known}"


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("kernels.md", fewstep_kernels.__all__),
        ("methods.md", fewstep.methods.names()),
        ("solvers.md", [*fewstep.solvers.names(), *fewstep.grids.names(), *fewstep.schedules.names()]),
    ],
)
def test_nothing_public_is_left_out(page, names):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    missing = [name for name in names if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_the_numbers_of_the_kernels_page_are_those_of_the_records():
    """`python benchmarks/kernels/page.py` mends it."""
    script = runpy.run_path(str(ROOT / "benchmarks/kernels/page.py"))
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    records = script["records"]()
    assert set(records) <= set(re.findall(r"<!-- numbers: (\w+) -->", page))
    assert script["written"](page, records) == page
