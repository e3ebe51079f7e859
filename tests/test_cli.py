"""The command line, as a person meets it: a mistake is one sentence on stderr and exit code 2."""

from __future__ import annotations

import errno
import functools
import shutil
import subprocess
import sys

import pytest
from PIL import Image, ImageChops

from fewstep import commands
from fewstep.cli import main
from fewstep.demo import loss_curves, side_by_side
from fewstep.errors import UserError
from fewstep_kernels import backends

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


def test_export_takes_guidance_and_the_networks_that_it_asks(capsys, teacher_folder):
    form = ["--onnx", "--steps", 1, "--guidance", "{name: autoguidance, scale: 2}"]
    assert "give --other weak=FOLDER" in refused(capsys, "export", teacher_folder, *form)
    assert "asks for 'weak'" in refused(capsys, "export", teacher_folder, *form, "--other", f"bad={teacher_folder}")


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


def test_a_sample_is_guided_by_another_artefact_or_away_from_a_class(capsys, teacher_folder, tmp_path):
    command = ["sample", str(teacher_folder), "--steps", "2", "--count", "2", "--out", str(tmp_path / "a.png")]
    weak = ["--guidance", "{name: autoguidance, scale: 2}", "--other", f"weak={teacher_folder}"]
    assert main([*command, *weak]) == 0
    assert main([*command, "--guidance", "{name: perp_neg, scale: 2}", "--negative", "3"]) == 0
    capsys.readouterr()
    assert main([*command, *weak[:2]]) == 2
    assert "give --other weak=FOLDER" in capsys.readouterr().err
    assert main([*command, *weak[2:]]) == 2
    assert "this guidance asks no other network" in capsys.readouterr().err


def test_a_large_count_is_drawn_in_batches_and_refused_only_where_it_cannot_be_kept(capsys, student_folder, tmp_path):
    """The batch changes no picture, and the sheet of 300 is that of one call."""
    command = ["sample", str(student_folder), "--steps", "1", "--count", "300", "--out"]
    assert main([*command, str(tmp_path / "a.png"), "--batch", "7"]) == 0
    assert main([*command, str(tmp_path / "b.png"), "--batch", "300"]) == 0
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "b.png") as other:
        assert one.size == other.size == (18 * 72 - 8, 17 * 72 - 8)
        assert ImageChops.difference(one, other).getextrema()[1] <= 1  # 1e-5 may cross a rounding
    enormous = ["sample", student_folder, "--steps", 1, "--count", 10**8]
    assert "folder" in refused(capsys, *enormous, "--out", tmp_path / "c.png")
    assert "GiB free" in refused(capsys, *enormous, "--count", 10**12, "--out", tmp_path / "folder")
    assert "2^63" in refused(capsys, *enormous, "--seed", 2**63 - 5, "--out", tmp_path / "folder")


def test_one_picture_each_is_named_by_its_seed(student_folder, tmp_path):
    out = tmp_path / "pictures"
    assert main(["sample", str(student_folder), "--steps", "1", "--count", "3", "--seed", "5", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["5.png", "6.png", "7.png"]
    with Image.open(out / "6.png") as picture:
        assert picture.size == (8, 8)


def test_other_kinds_of_file_are_refused(capsys, student_folder, tmp_path):
    assert "PNG" in refused(capsys, "sample", student_folder, "--out", tmp_path / "x.jpg")


def test_a_searched_grid_is_used_by_name_of_its_file(capsys, teacher_folder, tmp_path):
    grid = tmp_path / "grid.json"
    search = ["search-grid", teacher_folder, "--steps", 2, 3, "--points", 6, "--samples", 2, "--out", grid]
    assert main([str(word) for word in search]) == 0
    assert f"--grid {grid}" in capsys.readouterr().out
    sample = ["sample", teacher_folder, "--count", 2, "--steps", 3, "--out", tmp_path / "x.png"]
    assert main([str(word) for word in [*sample, "--grid", grid]]) == 0
    assert "not of 5" in refused(capsys, *sample, "--steps", 5, "--grid", grid)
    assert "nowhere.json" in refused(capsys, *sample, "--grid", tmp_path / "nowhere.json")
    assert "did you mean 'karras'" in refused(capsys, *sample, "--grid", "karas")
    assert "did you mean 'heun'" in refused(capsys, *sample, "--solver", "huen")


@pytest.mark.parametrize("command", [["methods"], ["doctor", "--no-self-test"], ["sample", "no/such"]])
def test_an_unknown_backend_is_one_sentence(command, capsys, monkeypatch):
    monkeypatch.setattr(backends, "override", functools.cache(backends.override.__wrapped__))  # not the session's
    monkeypatch.setenv("FEWSTEP_KERNELS", "bogus")
    said = refused(capsys, *command)
    assert all(word in said for word in ("FEWSTEP_KERNELS", "'bogus'", "reference", "triton"))


def test_what_the_system_refuses_is_one_sentence(capsys, monkeypatch):
    for error, words in (
        (OSError(errno.ENOSPC, "No space left on device", "runs/log"), ["runs/log", "no space left"]),
        (MemoryError(), ["not enough memory"]),
        (RuntimeError("can't allocate memory: you tried to allocate 8589934592000 bytes."), ["8,000.0 GiB"]),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), ["20.00 GiB"]),
    ):  # fmt: skip

        def fail(arguments, error=error):
            raise error

        monkeypatch.setattr(commands, "methods", fail)
        said = refused(capsys, "methods")
        assert all(word in said for word in words), said
    monkeypatch.setattr(commands, "methods", lambda arguments: [][1])
    with pytest.raises(IndexError):  # what is no user's mistake keeps its traceback
        main(["methods"])


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
