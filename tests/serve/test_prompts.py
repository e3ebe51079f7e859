"""A prompt names one class, or is refused in one sentence."""

from __future__ import annotations

import pytest

from fewstep.errors import UserError
from fewstep.serve import prompts


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("7", 7),
        ("seven", 7),
        ("a handwritten 7", 7),
        ("A Handwritten SEVEN.", 7),
        ("  the digit zero! ", 0),
        ("class 3", 3),
        ("7, seven", 7),
        ("007", 7),
    ],
)
def test_a_class_is_understood(prompt, label):
    assert prompts.parse(prompt, 10) == label


def test_a_model_of_many_classes_takes_their_numbers():
    assert prompts.parse("class 281", 1000) == 281


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("", "names no class"),
        ("a handwritten", "names no class"),
        ("10", "out of range"),
        ("-7", "'-7'"),
        ("a 7 and a 3", "'and'"),
        ("7 3", "several"),
        ("a cat", "'cat'"),
        ("seventy", "'seventy'"),
        ("٧", "not understood"),
        ("9" * 500, "not understood"),
        ("<script>alert(7)</script>", "not understood"),
    ],
)
def test_anything_else_is_refused(prompt, word):
    with pytest.raises(UserError) as caught:
        prompts.parse(prompt, 10)
    assert word in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_model_without_classes_takes_no_prompt():
    with pytest.raises(UserError, match="no classes"):
        prompts.parse("7", None)
