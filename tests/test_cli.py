"""The command line, as a person meets it: a mistake is one sentence on stderr and exit code 2."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from PIL import Image

from fewstep.cli import main
from fewstep.demo import loss_curves, side_by_side
from fewstep.errors import UserError

RECIPE = "recipes/digits_teacher.yaml"


def refused(capsys, *arguments: object) -> str:
    """The one sentence with which a command ends in code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("fewstep: ") and said.endswith(".") and "\n" not in said and "Traceback" not in said
    return said


def test_an_unreadable_recipe_is_named(capsys, tmp_path):
    assert "nowhere.yaml" in refused(capsys, "train", tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [unclosed")
    assert "broken.yaml" in refused(capsys, "train", broken)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "binary.yaml" in refused(capsys, "train", binary)


def test_an_unknown_method_brings_the_choices(capsys):
    said = refused(capsys, "train", RECIPE, "method.name=denoise")
    assert "'denoise'" in said and "denoising" in said and "dmd2" in said


@pytest.mark.parametrize(
    "override,words",
    [
        ("train.updates=0", ["train.updates", "0"]),
        ("train.updats=5", ["train.updats", "updates"]),
        ("train.optimizer.lr=fast", ["train.optimizer.lr", "fast"]),
        ("method.condition_dropout=2", ["method.condition_dropout", "2"]),
        ("network.name=resnet", ["resnet", "unet"]),
        ("train.strategy=horovod", ["train.strategy", "horovod", "deepspeed"]),
    ],
)
def test_a_bad_value_is_named_by_its_dotted_key(capsys, override, words):
    said = refused(capsys, "train", RECIPE, override)
    assert all(word in said for word in words), said


def test_train_and_distill_refuse_each_others_recipes(capsys):
    assert "fewstep distill" in refused(capsys, "train", "recipes/digits_dmd2.yaml")
    assert "fewstep train" in refused(capsys, "distill", RECIPE)


def test_zero_steps_and_a_class_out_of_range_are_refused(capsys, student_folder, tmp_path):
    out = tmp_path / "x.png"
    assert "0" in refused(capsys, "sample", student_folder, "--steps", 0, "--out", out)
    said = refused(capsys, "sample", student_folder, "--label", 12, "--out", out)
    assert "12" in said and "9" in said
    assert not out.exists()


def test_a_flipped_byte_is_found_wherever_an_artefact_is_opened(capsys, student_folder, tmp_path):
    copy = tmp_path / "student"
    shutil.copytree(student_folder, copy)
    weights = copy / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    commands = (["sample", copy], ["export", copy, "--onnx"], ["serve", copy], ["evaluate", "--teacher", copy])
    for command in commands:
        assert "weights.safetensors" in refused(capsys, *command)


def test_a_missing_folder_is_named(capsys, tmp_path):
    for command in (
        ["sample", tmp_path / "no"],
        ["serve", tmp_path / "no"],
        ["report", tmp_path / "no" / "results.json"],
    ):
        assert str(tmp_path / "no") in refused(capsys, *command)


def test_an_output_that_cannot_be_written_is_named(capsys, student_folder, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("not a folder")
    below = taken / "out"
    for command in (
        ["sample", student_folder, "--steps", 1, "--count", 1, "--out", below / "x.png"],
        ["demo", "--out", below],
        ["train", RECIPE, f"output={below}", "train.updates=1"],
        ["export", student_folder, "--onnx", "--steps", 1, "--out", below],
    ):
        assert str(taken) in refused(capsys, *command)


def test_export_wants_to_be_told_what(capsys, student_folder):
    assert "--onnx" in refused(capsys, "export", student_folder)


def test_the_lists_name_methods_solvers_and_operators(capsys):
    for command, words in (
        ("methods", ["consistency_distillation", "dmd2", "2405.14867", "engine/fewstep/methods/dmd2.py"]),
        ("solvers", ["ddim", "dpmpp_2m", "karras"]),
        ("doctor", ["lincomb", "ema_update", "torch"]),
    ):
        assert main([command]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words), said


def test_samples_of_all_classes_land_in_one_picture(capsys, student_folder, tmp_path):
    out = tmp_path / "digits.png"
    assert main(["sample", str(student_folder), "--steps", "1", "--count", "10", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width >= 8 and picture.height >= 8


def test_a_failed_job_of_the_demo_says_its_own_sentence():
    with pytest.raises(UserError, match=r"one stopped with code 2: fewstep: .*nowhere\.yaml"):
        side_by_side({"one": ["train", "nowhere.yaml"], "two": ["solvers"]})


def test_a_job_of_the_demo_waits_for_a_place_and_begins_after_anothers_failure(tmp_path, student_folder):
    picture = tmp_path / "late.png"
    late = ["sample", str(student_folder), "--steps", "1", "--count", "1", "--out", str(picture)]
    with pytest.raises(UserError, match="one stopped with code 2"):
        side_by_side({"one": ["train", "nowhere.yaml"], "late": late}, at_once=1)
    assert picture.exists()


def test_loss_curves_come_from_the_logs(tmp_path):
    rows = ['{"update": 10, "loss/student": 0.5, "rate": 3}', '{"update": 20, "loss/student": 0.25, "loss/critic": 1}']
    (tmp_path / "log.jsonl").write_text("\n".join(rows) + "\n")
    curves = loss_curves({"run": tmp_path})
    assert curves == {"run": {"student": [[10, 0.5], [20, 0.25]], "critic": [[20, 1]]}}


def test_a_mistake_leaves_the_process_with_code_2_and_no_traceback():
    run = subprocess.run([sys.executable, "-m", "fewstep", "sample", "no/such/folder"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "no/such/folder" in run.stderr
