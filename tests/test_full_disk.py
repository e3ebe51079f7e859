"""A full disk, or a process killed while it writes: one sentence, nothing lost, nothing left behind."""

import contextlib
import resource

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluate import features
from fewstep.evaluate.kept import KeptImages
from fewstep.export import tensorrt
from fewstep.train import checkpoint
from fewstep.train.checkpoint import Checkpoint

TENSORS = 100_000  # bytes in each file below; a tenth of it fits


@contextlib.contextmanager
def full_disk():
    """Files end at a tenth of what is to be written (EFBIG, as ENOSPC an OSError, or safetensors' own error).

    Around the write alone: the limit holds for this process, whose own log may be a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (TENSORS // 10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(value: float = 0.0) -> Checkpoint:
    return Checkpoint({"network.student": {"weight": torch.full((TENSORS // 4,), value)}}, {"step": 0})


def test_a_checkpoint_that_does_not_fit_is_one_sentence_and_leaves_the_one_before_it(tmp_path):
    checkpoint.write(tmp_path, 2, content(), keep=2)
    with full_disk(), pytest.raises(UserError, match=r"cannot write the checkpoint .*step_000004: .*large"):
        checkpoint.write(tmp_path, 4, content(), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    checkpoint.verify(tmp_path / "step_000002")


def test_what_killed_processes_left_of_checkpoints_is_removed(tmp_path):
    for step in (3, 5):
        (tmp_path / f".step_{step:06d}.partial").mkdir()
        (tmp_path / f".step_{step:06d}.partial/state.json").write_text("{")
    checkpoint.write(tmp_path, 6, content(), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000006"]


def test_damaged_checkpoints_further_on_do_not_push_out_good_ones(tmp_path):
    for step in (2, 8, 9):
        checkpoint.write(tmp_path, step, content(), keep=3)
    for step in (8, 9):
        (tmp_path / f"step_{step:06d}/state.json").write_text("{}")
    checkpoint.write(tmp_path, 3, content(), keep=2)
    checkpoint.write(tmp_path, 4, content(), keep=2)
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [3, 4, 8, 9]
    assert checkpoint.newest_good(tmp_path)[0] == 4


def test_images_that_do_not_fit_are_one_sentence(tmp_path):
    class Drawing:
        identity = "weights and plan"

    kept = KeptImages(tmp_path)
    with full_disk(), pytest.raises(UserError, match="cannot keep images in"):
        kept.keep("teacher/1", Drawing(), {"images": 1}, torch.zeros(TENSORS // 4), 1.0)
    assert not list(tmp_path.iterdir())


def test_a_classifier_that_does_not_fit_is_one_sentence(tmp_path):
    with full_disk(), pytest.raises(UserError, match=r"cannot keep the classifier in .*; set FEWSTEP_CACHE"):
        features._save(features.DigitClassifier(), tmp_path / "classifier.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_engine_that_does_not_fit_is_one_sentence(tmp_path, graph):
    pytest.importorskip("tensorrt_rtx_bindings")
    with full_disk(), pytest.raises(UserError, match="cannot write"):
        tensorrt.build_engine(graph, tmp_path / "student.engine", architectures=("SM89",))
    assert not list(tmp_path.iterdir())
