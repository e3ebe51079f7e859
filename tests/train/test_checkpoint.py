"""Nothing is lost: resuming is bit for bit, and a damaged checkpoint is refused by name and the one before it used."""

import json
import shutil

import pytest
import torch

from fewstep.errors import UserError
from fewstep.train import Trainer, checkpoint
from tests.train import small


def trainer(folder, method="consistency_distillation", resume=False, **train):
    recipe = small.recipe(folder, method, **train)
    return Trainer(recipe, teacher=small.teacher(), loader=small.Digits(), resume=resume)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "/" in key or key == "update"} for line in lines]


def equal(first, second):
    return all(torch.equal(value, second[part][name]) for part, state in first.items() for name, value in state.items())


@pytest.mark.parametrize("method", small.METHODS)
def test_2n_updates_are_n_updates_and_n_more_after_resuming(tmp_path, method):
    whole = trainer(tmp_path / "whole", method, updates=8)
    whole.fit()
    trainer(tmp_path / "cut", method, updates=4).fit()
    cut = trainer(tmp_path / "cut", method, updates=8, resume=True)
    assert cut.step == 4
    cut.fit()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ends = [checkpoint.read(tmp_path / name / "checkpoints", 8) for name in ("whole", "cut")]
    assert equal(ends[0].parts, ends[1].parts) and ends[0].parts.keys() == ends[1].parts.keys()
    assert any(name.startswith("optimizer.") for name in ends[0].parts)
    states = [{**end.state, "recipe": None} for end in ends]
    assert states[0] == states[1]


TIMES = {"updates_per_second", "seconds_left", "memory_mib", "time"}


def lines(folder):
    told = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in told]


@pytest.mark.parametrize("fault", [None, 3])
def test_the_log_of_a_run_that_was_killed_and_resumed_is_that_of_one_that_was_not(tmp_path, monkeypatch, fault):
    """Killed at update 7, after the line of update 6 and the checkpoint of 4: two of the mean's three are before it."""
    settings = {"updates": 9, "log_every": 3, "checkpoint_every": 4, "non_finite": "skip"}

    def run(folder, resume=False):
        recipe = small.recipe(tmp_path / folder, "dmd2", **settings)
        return Trainer(recipe, teacher=small.teacher(), loader=small.Digits(fault=fault), resume=resume)

    run("whole").fit()
    killed = run("cut")
    iterate = killed.iterate
    monkeypatch.setattr(killed, "iterate", lambda: iterate() if killed.step < 7 else pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        killed.fit()
    again = run("cut", resume=True)
    assert again.step == 4
    again.fit()
    whole = lines(tmp_path / "whole")
    assert [line["update"] for line in whole] == [3, 6, 9]
    assert ("skipped" in whole[-1]) == (fault is not None)
    assert json.dumps(lines(tmp_path / "cut")) == json.dumps(whole)  # as text: NaN is NaN


def test_every_bit_of_a_checkpoint_is_safetensors_or_json(tmp_path):
    trainer(tmp_path).fit()
    (_, path), = checkpoint.listed(tmp_path / "checkpoints")  # fmt: skip
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("file", ["network.student.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_used(tmp_path, file, capsys):
    trainer(tmp_path, checkpoint_every=2).fit()
    damaged = tmp_path / "checkpoints/step_000004" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    run = trainer(tmp_path, resume=True)
    assert run.step == 2
    run.fit()
    shown = capsys.readouterr().err
    assert str(damaged) in shown and "using the checkpoint before it" in shown
    assert run.step == 4


def test_a_missing_file_is_damage_too(tmp_path):
    trainer(tmp_path, checkpoint_every=2).fit()
    (tmp_path / "checkpoints/step_000004/optimizer.student.safetensors").unlink()
    assert trainer(tmp_path, resume=True).step == 2


def test_an_unfinished_checkpoint_is_none(tmp_path):
    trainer(tmp_path, updates=2).fit()
    shutil.copytree(tmp_path / "checkpoints/step_000002", tmp_path / "checkpoints/.step_000004.partial")
    assert trainer(tmp_path, resume=True).step == 2


def test_when_all_are_damaged_the_run_says_so(tmp_path):
    trainer(tmp_path, updates=2).fit()
    (tmp_path / "checkpoints/step_000002/state.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"every checkpoint in .* is damaged \(.*state.json does not match its SHA-256\)"
    ):
        trainer(tmp_path, resume=True)


def test_only_the_last_ones_are_kept(tmp_path):
    trainer(tmp_path, updates=6, checkpoint_every=1, keep_checkpoints=3).fit()
    assert [step for step, _ in checkpoint.listed(tmp_path / "checkpoints")] == [4, 5, 6]


def test_a_finished_run_says_that_it_is(tmp_path, capsys):
    trainer(tmp_path, updates=2).fit()
    trainer(tmp_path, updates=2, resume=True).fit()
    assert "small: all 2 updates are done" in capsys.readouterr().err


def test_resuming_without_a_checkpoint_starts_at_the_beginning_and_says_so(tmp_path, capsys):
    run = trainer(tmp_path, resume=True, updates=1)
    run.fit()
    assert "no checkpoint in" in capsys.readouterr().err


def test_starting_anew_sets_earlier_checkpoints_aside_and_says_how_to_go_on_with_them(tmp_path, capsys):
    trainer(tmp_path, updates=2).fit()
    run = trainer(tmp_path)
    assert run.step == 0
    aside = tmp_path / "checkpoints.previous"
    assert (aside / "step_000002/manifest.json").exists()
    run.fit()
    shown = capsys.readouterr().err
    assert f"are now in {aside}" in shown and f"move them back to {tmp_path / 'checkpoints'} and add --resume" in shown
    shutil.rmtree(tmp_path / "checkpoints")
    aside.rename(tmp_path / "checkpoints")
    assert trainer(tmp_path, resume=True).step == 2


def test_what_was_set_aside_is_only_replaced_by_what_came_as_far(tmp_path):
    for updates in (3, 1, 3, 2):  # each run sets the one before it aside
        trainer(tmp_path, updates=updates).fit()
    kept = {path.name: checkpoint.listed(path)[-1][0] for path in tmp_path.glob("checkpoints*")}
    assert kept == {"checkpoints": 2, "checkpoints.previous": 3, "checkpoints.previous_2": 1}


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    trainer(tmp_path, updates=2).fit()
    with pytest.raises(
        UserError, match=r"method.name is 'dmd2' but the checkpoint of update 2 was made with 'consistency"
    ):
        trainer(tmp_path, "dmd2", resume=True)


def test_method_state_of_any_nesting_comes_back():
    state = {"count": 3, "table": {"a": [torch.arange(3), 1.5, None]}, "text": "x"}
    tensors = {}
    stored = json.loads(json.dumps(checkpoint.split(state, tensors)))
    back = checkpoint.join(stored, tensors)
    assert torch.equal(back["table"]["a"][0], torch.arange(3)) and back["table"]["a"][1:] == [1.5, None]
    assert (back["count"], back["text"]) == (3, "x")


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the output folder"):
        trainer(tmp_path / "file/run").fit()


def test_a_damaged_log_is_gone_on_with(tmp_path):
    trainer(tmp_path, updates=2).fit()
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'\xff\xfe{\n[1]\n{"update": 2')
    trainer(tmp_path, updates=4, resume=True).fit()
    assert [line["update"] for line in lines(tmp_path)] == [1, 2, 3, 4]
