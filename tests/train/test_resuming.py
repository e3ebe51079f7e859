"""Resuming goes on with the same teacher, or not at all."""

import pytest
import torch

from fewstep import artefact, config, solvers
from fewstep.errors import UserError
from fewstep.train import Trainer
from tests.train import small


def save_teacher(folder, scale=1.0):
    teacher = small.teacher()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(scale)
    plan = solvers.plan("euler", teacher.schedule, 1, prediction=teacher.prediction)
    about = {"image_shape": (1, 8, 8), "classes": 10, "provenance": {}, "kind": "teacher"}
    return artefact.save(folder, denoiser=teacher, plans={1: plan}, **about)


def distillation(output, teacher, updates, resume=False):
    recipe = {**small.recipe(output, updates=updates).to_dict(), "teacher": str(teacher)}
    return Trainer(config.from_dict(recipe), loader=small.Digits(), resume=resume)


def test_a_student_is_not_gone_on_with_under_another_teacher(tmp_path):
    distillation(tmp_path / "student", save_teacher(tmp_path / "teacher"), 1).run()
    save_teacher(tmp_path / "teacher", scale=1.5)
    with pytest.raises(UserError, match=r"teacher .* is not the one of the checkpoint of update 1"):
        distillation(tmp_path / "student", tmp_path / "teacher", 2, resume=True)


def test_the_same_teacher_may_have_moved(tmp_path):
    distillation(tmp_path / "student", save_teacher(tmp_path / "teacher"), 1).run()
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert distillation(tmp_path / "student", tmp_path / "moved", 2, resume=True).step == 1
