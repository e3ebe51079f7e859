"""What is wrong with noise or classes is one sentence, and the same one from PyTorch and from ONNX Runtime."""

from __future__ import annotations

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.errors import UserError
from fewstep.runtime import load
from fewstep.runtime.onnx import OnnxNetwork, OnnxSampler, convert_network

NOISE, LABELS = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])


@pytest.fixture(scope="module")
def samplers(student_folder, graph):
    """(of an artefact in PyTorch, of its graph in ONNX Runtime), at 4 steps."""
    student = load(student_folder)
    return (lambda noise, cond: student.sample(noise, cond, 4)), OnnxSampler(graph)


WRONG = {
    "one class for two images": (NOISE, LABELS[:1], "there are 1 classes for 2 images; give one class for each image."),
    "three classes": (NOISE, [1, 2, 3], "there are 3 classes for 2 images"),
    "a class alone": (NOISE, torch.tensor(1), "there are 1 classes for 2 images"),
    "a class of no class": (
        NOISE,
        torch.tensor([1, 11]),
        "class 11 is out of range; choose a whole number from 0 to 9",
    ),
    "a class from the end": (NOISE, [1, -1], "class -1 is out of range; choose a whole number from 0 to 9"),
    "fractions": (NOISE, LABELS.float(), "class 1.0 is out of range"),
    "truth": (NOISE, torch.tensor([True, False]), "class True is out of range"),
    "another picture": (NOISE[..., :7], LABELS, "noise has shape [2, 4, 1, 8, 7], it must be"),
    "too few slots": (NOISE[:, :3], LABELS, "noise has shape [2, 3, 1, 8, 8], it must be"),
    "too many dimensions": (NOISE[None], LABELS, "noise has shape [1, 2, 4, 1, 8, 8], it must be"),
    "no picture": (NOISE[:0], LABELS[:0], "with B from 1"),
    "whole numbers": (NOISE.long(), LABELS, "noise is torch.int64 [2, 4, 1, 8, 8]; it must be a floating-point tensor"),
    "complex numbers": (NOISE.cfloat(), LABELS, "noise is torch.complex64"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_pytorch_and_onnx_runtime_say_the_same(samplers, wrong):
    noise, condition, words = WRONG[wrong]
    for sampler in samplers:
        with pytest.raises(UserError) as caught:
            sampler(noise, condition)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_no_negatives_are_none(samplers, student_folder):
    graph, student = samplers[1], load(student_folder)
    assert torch.equal(graph(NOISE, LABELS, negatives=None), graph(NOISE, LABELS))
    assert torch.equal(student.sample(NOISE, LABELS, 4, negatives=None), student.sample(NOISE, LABELS, 4))


@pytest.mark.parametrize("noise", (NOISE.numpy(), None, "x"), ids=("an array", "nothing", "a word"))
def test_what_is_no_tensor_is_said_in_few_words(samplers, noise):
    for sampler in samplers:
        with pytest.raises(UserError) as caught:
            sampler(noise, LABELS)
        assert len(str(caught.value)) < 150 and "\n" not in str(caught.value)


def test_every_kind_of_number_that_can_be_meant_is_taken(samplers):
    student, graph = samplers
    expected = student(NOISE, LABELS)
    for noise in (NOISE.double(), NOISE.clone().requires_grad_(), NOISE.mT.contiguous().mT):
        for labels in ([1, 2], LABELS.int(), LABELS.numpy()):
            for sampler in samplers:
                torch.testing.assert_close(sampler(noise, labels), expected, rtol=0, atol=1e-4)  # two runtimes
    for sampler in samplers:
        torch.testing.assert_close(
            sampler(NOISE.bfloat16(), 1)[0], student(NOISE.bfloat16().float(), 1)[0], atol=1e-4, rtol=0
        )
    assert not torch.equal(graph(NOISE, 10), graph(NOISE, 9))  # the number of classes is none of them


def test_a_graph_says_what_it_needs(samplers, student_folder, graph, tmp_path):
    student, sampler = load(student_folder), samplers[1]
    with pytest.raises(UserError, match=r"needs a class for each image; give condition \(10 for none\)"):
        sampler(NOISE)
    for threads in (-1, 0, 2.0, "4", True):
        with pytest.raises(UserError, match=f"threads is {threads!r}"):
            OnnxSampler(graph, threads=threads)
    convert_network(student).save(tmp_path / "network.onnx")
    network = OnnxNetwork(student.denoiser.net, tmp_path / "network.onnx")
    with pytest.raises(UserError, match="takes x, t, cond and is no sampler's"):
        network.graph(NOISE, LABELS)
    with pytest.raises(UserError, match="ONNX Runtime cannot run this graph"):
        network(NOISE[:, 0], torch.ones(3), LABELS)


@pytest.mark.parametrize("cond", (torch.ones(1), torch.ones(3, 4), torch.tensor(1.0)), ids=("one", "three", "a scalar"))
@pytest.mark.parametrize("guidance", (None, 2.0))
def test_a_bare_network_too_is_told_one_condition_for_each_sample(cond, guidance):
    plan = solvers.plan("ddim", schedules.get("edm"), 2, prediction="edm", guidance=guidance)
    noise, several = torch.randn(2, 1, 4, 4), torch.ones(2)
    with pytest.raises(UserError, match=r"cond is torch.float32 .* and noise holds 2 samples; give one condition"):
        solvers.sample(lambda x, t, cond: x, plan, noise, cond, uncond=several)
    if guidance is not None:
        with pytest.raises(UserError, match=r"uncond is torch.float32 .* and noise holds 2 samples"):
            solvers.sample(lambda x, t, cond: x, plan, noise, several, uncond=cond)


@pytest.mark.parametrize("classes", ["ten", '"10"', "[1]", "-3", "null"])
def test_a_graph_that_does_not_know_its_classes_is_refused(graph, tmp_path, classes):
    import onnx

    model = onnx.load(graph)
    for entry in model.metadata_props:
        if entry.key == "fewstep.classes":
            entry.value = classes
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(UserError, match="is no sampler's; export one again"):
        OnnxSampler(tmp_path / "damaged.onnx")(NOISE, LABELS)
