"""The pages of the command line explain each option with its default; examples work, and mistakes are sentences."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from fewstep import arguments, cli, config
from fewstep.errors import UserError

PARSER = cli._parser()
COMMANDS = sorted(PARSER.commands)


def command(name: str) -> arguments.Parser:
    return PARSER.commands[name]


def options(name: str) -> list[argparse.Action]:
    return [action for action in command(name)._actions if not isinstance(action, argparse._HelpAction)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_with_its_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    page = command(name).format_help()
    for option in options(name):
        assert option.help, option.dest
        optional = option.nargs != 0 and not option.required and option.default != []
        if optional:
            line = next(line for line in page.splitlines() if option.help.partition(" (")[0] in line)
            assert re.search(r"\(default: .+\)", line), line
            if option.default is not None and not isinstance(option.default, list):
                assert f"default: {option.default}" in line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_page_ends_with_an_example_that_works(name):
    parser = command(name)
    assert parser.format_help().rstrip().endswith(f"example:\n  {parser.example}")
    program, *words = shlex.split(parser.example)
    given = arguments.read(PARSER, words)
    assert program == "fewstep" and given.command == name
    if name in ("train", "distill"):
        recipe = config.load(given.recipe, given.overrides)
        assert (recipe.teacher is None) == (name == "train")


def test_overrides_are_optional_and_may_stand_on_either_side_of_options():
    for words in (
        ["--resume", "r.yaml", "a=1", "b=2"],
        ["r.yaml", "--resume", "a=1", "b=2"],
        ["r.yaml", "a=1", "--resume", "b=2"],
    ):
        given = arguments.read(PARSER, ["train", *words])
        assert (given.recipe, given.overrides, given.resume) == ("r.yaml", ["a=1", "b=2"], True)
    assert arguments.read(PARSER, ["train", "r.yaml"]).overrides == []
    with pytest.raises(UserError, match=r"required: recipe; `fewstep train --help`"):
        arguments.read(PARSER, ["train"])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("smaple", r"command 'smaple' is not known \(did you mean 'sample'\?\)"),
        ("train r.yaml --resum", "'--resum' is not understood"),
        ("train r.yaml x=1 --resume 5", "'5' is not understood"),
        ("sample a b", "'b' is not understood"),
        ("sample --count -3", "'-3' is not a whole number from 1;"),
        ("sample --count 1e3", "'1e3' is not a whole number from 1;"),
        ("sample --guidance nan", "'nan' is not a number from -100 to 100;"),
        ("sample --guidance {name:", "'{name:' is not a form of guidance"),
        ("serve --port 70000", "'70000' is not a whole number from 0 to 65535;"),
        ("bench --seconds 0", "'0' is not a number above 0;"),
        ("evaluate --seed 99999999999", "whole number from 0 to 2147483647;"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_page_to_read(line, sentence):
    with pytest.raises(UserError, match=re.escape(sentence) if "(" not in sentence else sentence) as caught:
        arguments.read(PARSER, shlex.split(line))
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ("--help" in text or "choose one of" in text)


def test_guidance_is_a_number_or_a_form():
    assert arguments.guidance("1.5") == 1.5
    assert arguments.guidance("{name: cfg, scale: 2}") == {"name": "cfg", "scale": 2}


def test_without_a_command_the_page_is_shown(capsys):
    assert cli.main([]) == 2
    assert "search-grid" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and re.fullmatch(r"fewstep \S.*\n", capsys.readouterr().out)
