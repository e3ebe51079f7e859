"""A student draws the same picture from the same seed, and says in one sentence what it cannot do."""

from __future__ import annotations

import pytest
import torch

import fewstep_kernels as fk
from fewstep.errors import UserError
from fewstep.runtime import Student, load
from fewstep.runtime.student import KEPT_PLANS

# float32 sums in another order at another batch size: a few ulp of values of order 1
SAME_IMAGE = 1e-5


@pytest.fixture(scope="module")
def student(student_folder) -> Student:
    return load(student_folder)


@pytest.fixture(scope="module")
def teacher(teacher_folder) -> Student:
    return load(teacher_folder)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_seed_gives_the_same_picture_at_batch_1_and_16(student, steps):
    seeds, labels = list(range(100, 116)), [seed % 10 for seed in range(16)]
    together = student.sample(16, labels, steps, seeds)
    for index in (0, 7, 15):
        alone = student.sample(1, labels[index], steps, [seeds[index]])
        assert (alone[0] - together[index]).abs().max() <= SAME_IMAGE


def test_the_teacher_gives_the_same_picture_at_batch_1_and_16(teacher):
    together = teacher.sample(16, 3, 8, 50, guidance=2.0)
    alone = teacher.sample(1, 3, 8, [53], guidance=2.0)
    assert (alone[0] - together[3]).abs().max() <= SAME_IMAGE


def test_noise_is_bit_identical_at_any_batch(student):
    plan = student.plan(4)
    together = student.noise(torch.arange(16), plan)
    assert together.shape == (16, 1 + plan.stochastic_stages, 1, 8, 8)
    for index in range(16):
        assert torch.equal(student.noise(torch.tensor([index]), plan)[0], together[index])


def test_seeds_and_their_own_carried_noise_give_the_same_picture(student):
    plan = student.plan(4)
    seeds = torch.arange(5)
    assert plan.stochastic_stages == 3
    drawn = student.sample(5, 2, 4, seeds)
    carried = student.sample(student.noise(seeds, plan), 2, 4)
    assert (drawn - carried).abs().max() <= SAME_IMAGE


def test_different_seeds_and_classes_give_different_pictures(student):
    assert (student.sample(1, 2, 4, [0]) - student.sample(1, 2, 4, [1])).abs().max() > 1e-2
    assert (student.sample(1, 2, 4, [0]) - student.sample(1, 3, 4, [0])).abs().max() > 1e-2


def test_an_answer_is_not_overwritten_by_the_next_call(student):
    first = student.sample(2, 1, 4, 0)
    kept = first.clone()
    student.sample(2, 5, 4, 9)
    assert torch.equal(first, kept)


def test_without_seeds_torchs_generator_decides(student):
    torch.manual_seed(3)
    first = student.sample(2, 1)
    torch.manual_seed(3)
    assert torch.equal(student.sample(2, 1), first)
    assert not torch.equal(student.sample(2, 1), first)


def test_one_int_seed_counts_up(student):
    assert torch.equal(student.sample(3, 1, 2, 7), student.sample(3, 1, 2, [7, 8, 9]))
    assert torch.equal(student.sample(cond=1, steps=2, seeds=[7, 8, 9]), student.sample(3, 1, 2, 7))


def test_noise_is_what_the_kernels_draw(student):
    seeds = torch.tensor([3, 2**62])
    assert torch.equal(student.noise(seeds), fk.normal(seeds, (1, 8, 8), stream=0))


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_teacher_takes_any_number_of_steps_by_its_recorded_solver(teacher, steps):
    plan = teacher.plan(steps)
    assert (plan.solver, plan.evaluations, plan.guidance) == ("euler", steps, None)
    assert torch.isfinite(teacher.sample(1, 1, steps, 0)).all()


def test_guidance_moves_a_teachers_pictures_and_one_means_none(teacher):
    plain = teacher.sample(2, 4, 8, 0)
    assert torch.equal(teacher.sample(2, 4, 8, 0, guidance=1.0), plain)
    assert (teacher.sample(2, 4, 8, 0, guidance=3.0) - plain).abs().max() > 1e-2


def test_more_teacher_steps_come_closer_to_the_limit(teacher):
    limit = teacher.sample(4, 1, 256, 0)
    errors = [float((teacher.sample(4, 1, steps, 0) - limit).abs().mean()) for steps in (4, 16, 64)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"n_or_noise": 1, "cond": 10}, "0 to 9"),
        ({"n_or_noise": 1, "cond": -1}, "0 to 9"),
        ({"n_or_noise": 1, "cond": 1.5}, "class"),
        ({"n_or_noise": 2, "cond": [1]}, "1 classes for 2 images"),
        ({"n_or_noise": 1, "steps": 0}, "steps is 0"),
        ({"n_or_noise": 1, "steps": 3}, "1, 2, 4"),
        ({"n_or_noise": 1, "steps": True}, "steps is True"),
        ({"n_or_noise": 0}, "n is 0"),
        ({}, "n is None"),
        ({"n_or_noise": 2, "seeds": [1, 2, 3]}, "3 seeds for 2 images"),
        ({"n_or_noise": 1, "seeds": [-1]}, "-1"),
        ({"n_or_noise": 1, "seeds": [1.5]}, "1.5"),
        ({"n_or_noise": 1, "seeds": "x"}, "'x'"),
        ({"n_or_noise": 1, "seeds": 0.5}, "0.5"),
        ({"n_or_noise": 1, "cond": torch.tensor([0.5])}, "0.5"),
        ({"n_or_noise": 1, "cond": 1, "steps": 4, "guidance": 2.0}, "guidance"),
        ({"n_or_noise": torch.zeros(2, 3, 8, 8)}, "[2, 3, 8, 8]"),
        ({"n_or_noise": torch.zeros(2, 2, 1, 8, 8), "steps": 4}, "[B, 4, 1, 8, 8]"),
    ],
)
def test_a_wrong_request_is_one_sentence(student, call, words):
    with pytest.raises(UserError) as caught:
        student.sample(**call)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_guidance_without_a_class_is_refused(teacher):
    with pytest.raises(UserError, match="needs a class"):
        teacher.sample(1, None, 8, 0, guidance=2.0)


def test_an_unknown_device_is_one_sentence(student_folder):
    with pytest.raises(UserError, match="device 'abacus' is not available"):
        load(student_folder, "abacus")


def test_a_teacher_samples_on_other_times_by_other_solvers_and_in_other_forms(teacher):
    own = teacher.plan(8)
    laid = teacher.plan(8, grid="log_snr")
    assert laid.solver == own.solver and laid.times != own.times
    other = teacher.plan(8, solver="dpmpp_2m")
    assert other.solver == "dpmpp_2m" and other.times == own.times
    assert teacher.plan(8, 2.0).guidance == 2.0
    limited = teacher.sample(2, 3, 8, 0, guidance={"name": "cfg", "scale": 2.0, "stop": 4})
    always = teacher.sample(2, 3, 8, 0, guidance={"name": "cfg", "scale": 2.0})
    assert (always - teacher.sample(2, 3, 8, 0, guidance=2.0)).abs().max() == 0
    assert (always - limited).abs().max() > 1e-4
    with pytest.raises(UserError, match="needs 9 times"):
        teacher.plan(8, grid=[80.0, 1.0, 0.0])


def test_a_teacher_is_guided_by_another_artefact_and_away_from_classes(teacher, teacher_folder):
    form = {"name": "autoguidance", "scale": 2.0}
    weak = load(teacher_folder)
    with torch.no_grad():
        for parameter in weak.denoiser.parameters():
            parameter.mul_(0.9)
    plain, guided = teacher.sample(2, 3, 8, 0), teacher.sample(2, 3, 8, 0, guidance=form, others={"weak": weak})
    assert (guided - plain).abs().max() > 1e-3
    itself = teacher.sample(2, 3, 8, 0, guidance=form, others={"weak": teacher})
    torch.testing.assert_close(itself, plain, rtol=0, atol=1e-4)  # 2 D - D, in float32
    away = teacher.sample(2, 3, 8, 0, guidance={"name": "perp_neg", "scale": 2.0}, negatives=[[5, 6]])
    assert (away - teacher.sample(2, 3, 8, 0, guidance=2.0)).abs().max() > 1e-3
    with pytest.raises(UserError, match="role 'weak'"):
        teacher.sample(2, 3, 8, 0, guidance=form)


def test_a_student_keeps_its_solver_steps_and_guidance_but_may_be_asked_at_other_times(student):
    laid = student.plan(4, grid="uniform")
    assert laid.solver == student.plan(4).solver and laid.times != student.plan(4).times
    for options, words in (
        ({"solver": "ddim"}, "has its own"),
        ({"steps": 3, "grid": "uniform"}, "distilled for: 1, 2, 4"),
        ({"guidance": 2.0, "grid": "uniform"}, "guidance inside"),
        ({"guidance": {"name": "cfg", "scale": 2.0}}, "guidance inside"),
    ):
        with pytest.raises(UserError, match=words):
            student.plan(**{"steps": 4, **options})


def test_a_teacher_asked_for_many_guidances_keeps_few_plans(teacher):
    for number in range(KEPT_PLANS + 10):
        teacher.plan(2, 1.5 + number / 100)
    assert len(teacher._plans) <= KEPT_PLANS
    assert teacher.plan(2, 1.5 + (KEPT_PLANS + 9) / 100) is teacher.plan(2, 1.5 + (KEPT_PLANS + 9) / 100)
