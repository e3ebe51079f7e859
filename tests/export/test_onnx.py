"""The exported graph is the whole sampler, and draws PyTorch's pictures."""

from __future__ import annotations

import json

import onnx
import pytest
import torch

from fewstep.errors import UserError
from fewstep.export.onnx import export_onnx
from fewstep.export.parity import ParityError, check_parity
from fewstep.runtime import load
from fewstep.runtime.onnx import OPSET, OnnxSampler, exported_program, opaque_operators
from fewstep.solvers import Plan


@pytest.fixture(scope="module")
def student(student_folder):
    return load(student_folder)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load(teacher_folder)


def test_64_seeds_match_pytorch_and_any_batch_gives_the_same(graph, student_folder):
    report = check_parity(graph, student_folder, steps=4)
    assert report["seeds"] == 64
    assert report["max_abs_error"] <= 1e-4
    assert report["max_batch_difference"] <= 1e-5


def test_the_graph_has_a_free_batch_and_the_promised_inputs(graph):
    model = onnx.load(graph)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [size.dim_value or "free" for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"noise": ["free", 4, 1, 8, 8], "condition": ["free"], "image": ["free", 1, 8, 8]}
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]


def test_only_standard_operators_reach_the_graph(graph):
    model = onnx.load(graph)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions


def test_no_opaque_operator_reaches_the_exported_program(student, teacher):
    assert opaque_operators(exported_program(student, student.plan(2))) == []
    assert opaque_operators(exported_program(teacher, teacher.plan(2, 3.0))) == []


def test_an_opaque_operator_would_be_seen():
    library = torch.library.Library("fewstep_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")

    class Doubled(torch.nn.Module):
        def forward(self, x):
            return torch.ops.fewstep_test.twice(x)

    program = torch.export.export(Doubled(), (torch.zeros(2),))
    assert opaque_operators(program) == ["fewstep_test.twice.default"]


def test_the_metadata_describes_the_sampler(graph, student):
    facts = OnnxSampler(graph).metadata
    assert Plan.from_json(facts["fewstep.plan"]) == student.plan(4)
    assert json.loads(facts["fewstep.schedule"]) == student.denoiser.schedule.to_dict()
    assert json.loads(facts["fewstep.prediction"]) == student.denoiser.prediction.to_dict()
    assert facts["fewstep.classes"] == "10"
    assert facts["fewstep.artefact"] == student.artefact.digest
    assert facts["fewstep.version"]


@pytest.mark.parametrize(("steps", "guidance"), [(3, 2.0), (2, {"name": "apg", "scale": 2.0, "momentum": -0.5})])
def test_a_guided_teacher_exports_too(teacher, steps, guidance, tmp_path):
    graph = export_onnx(teacher, tmp_path / "teacher.onnx", steps=steps, guidance=guidance)
    report = check_parity(graph, teacher, steps=steps, guidance=guidance)
    assert report["evaluations"] == steps
    assert report["max_abs_error"] <= 1e-4


def test_a_form_that_asks_another_artefact_is_one_graph_with_it(teacher, teacher_folder, tmp_path):
    weak = load(teacher_folder)
    with torch.no_grad():
        for parameter in weak.denoiser.parameters():
            parameter.mul_(0.9)
    asked = {"steps": 1, "guidance": {"name": "autoguidance", "scale": 2.0}, "others": {"weak": weak}}
    graph = export_onnx(teacher, tmp_path / "teacher.onnx", **asked)
    assert check_parity(graph, teacher, **asked)["max_abs_error"] <= 1e-4
    assert json.loads(OnnxSampler(graph).metadata["fewstep.others"]) == {"weak": weak.artefact.digest}
    with pytest.raises(ParityError, match="differs from PyTorch"):
        check_parity(graph, teacher, **{**asked, "others": {"weak": teacher}})
    with pytest.raises(ParityError, match="other networks in its roles"):
        check_parity(graph, teacher, **{**asked, "others": {"weak": weak.denoiser}})


def test_networks_too_few_or_too_many_are_one_sentence(teacher, student, tmp_path):
    form, out = {"name": "autoguidance", "scale": 2.0}, tmp_path / "teacher.onnx"
    with pytest.raises(UserError, match="in the role 'weak' and got none"):
        export_onnx(teacher, out, steps=2, guidance=form)
    with pytest.raises(UserError, match="in the role 'weak' and got function"):
        export_onnx(teacher, out, steps=2, guidance=form, others={"weak": lambda x, t, cond: x})
    with pytest.raises(UserError, match="role 'head' and this plan asks for 'weak'"):
        export_onnx(teacher, out, steps=2, guidance=form, others={"head": student})
    with pytest.raises(UserError, match="role 'weak' and this plan asks no other network"):
        export_onnx(teacher, out, steps=2, others={"weak": student})


def test_a_network_that_cannot_be_traced_is_one_sentence(teacher, tmp_path):
    class Told(torch.nn.Module):
        def forward(self, x, t, cond=None):
            return x * float(x.mean())

    with pytest.raises(UserError, match="this sampler cannot be exported") as caught:
        export_onnx(
            teacher,
            tmp_path / "teacher.onnx",
            steps=2,
            guidance={"name": "autoguidance", "scale": 2.0},
            others={"weak": Told()},
        )
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_another_plan_or_artefact_is_refused(graph, student_folder, teacher_folder):
    with pytest.raises(ParityError, match="another plan"):
        check_parity(graph, student_folder, steps=2)
    with pytest.raises(ParityError, match="another"):
        check_parity(graph, teacher_folder)
    for seeds in (0, 1.5, True):
        with pytest.raises(UserError, match="whole number of seeds"):
            check_parity(graph, student_folder, steps=4, seeds=seeds)


def test_a_graph_with_one_changed_weight_fails_the_check(graph, student_folder, tmp_path):
    model = onnx.load(graph)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = onnx.numpy_helper.to_array(largest).copy()
    changed.flat[0] += 1.0
    largest.CopyFrom(onnx.numpy_helper.from_array(changed, largest.name))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(ParityError, match="differs from PyTorch"):
        check_parity(tmp_path / "changed.onnx", student_folder, steps=4)


def test_what_cannot_be_exported_is_one_sentence(student, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="steps is 3"):
        export_onnx(student, tmp_path / "student.onnx", steps=3)
    with pytest.raises(UserError, match="cannot write"):
        export_onnx(student, tmp_path / "file" / "student.onnx", steps=1)
    with pytest.raises(UserError, match="is a folder"):
        export_onnx(student, tmp_path, steps=1)
    with pytest.raises(UserError, match="no ONNX file"):
        OnnxSampler(tmp_path / "nothing.onnx")
    with pytest.raises(UserError, match="cannot load"):
        OnnxSampler(tmp_path / "file")
