"""TensorRT-RTX really builds engines from the exported graph, on a machine without a GPU."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import pytest

from fewstep.errors import UserError
from fewstep.export import tensorrt_backend
from fewstep.export.tensorrt import ARCHITECTURES, build_engine

installed = any(importlib.util.find_spec(name) for name in tensorrt_backend.NAMES.values())
needs_tensorrt = pytest.mark.skipif(not installed, reason="neither TensorRT nor TensorRT-RTX is installed")


def one_node_graph(path, operator: str, domain: str = "") -> None:
    """A valid file with one node that no runtime here has a kernel for."""
    value = onnx.helper.make_tensor_value_info("noise", onnx.TensorProto.FLOAT, ["batch", 4])
    result = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 4])
    node = onnx.helper.make_node(operator, ["noise"], ["image"], name="the_culprit", domain=domain)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nowhere", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [result]), opset_imports=opsets)
    onnx.save(model, path)


@needs_tensorrt
def test_an_engine_is_built_for_several_architectures_with_a_free_batch(graph, tmp_path, capfd):
    engine = build_engine(graph, tmp_path / "student.engine", batches=(1, 4, 16))
    assert engine.path.stat().st_size == engine.bytes > 10_000
    assert engine.architectures == (ARCHITECTURES if engine.backend == "tensorrt_rtx" else engine.architectures)
    assert engine.batches == (1, 4, 16)
    assert engine.backend in tensorrt_backend.NAMES and engine.version
    assert [file.name for file in tmp_path.iterdir()] == ["student.engine"]
    assert capfd.readouterr() == ("", "")


@needs_tensorrt
def test_an_engine_holds_this_students_weights(graph, tmp_path):
    """Zeroing the weights changes the engine: it was built from the graph and not from nothing."""
    model = onnx.load(graph)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    zeros = np.zeros_like(onnx.numpy_helper.to_array(largest))
    largest.CopyFrom(onnx.numpy_helper.from_array(zeros, largest.name))
    onnx.save(model, tmp_path / "zeros.onnx")
    one = build_engine(graph, tmp_path / "one.engine", architectures=("SM89",))
    other = build_engine(tmp_path / "zeros.onnx", tmp_path / "other.engine", architectures=("SM89",))
    assert one.path.read_bytes() != other.path.read_bytes()


@needs_tensorrt
def test_a_node_that_does_not_parse_is_named(tmp_path):
    one_node_graph(tmp_path / "strange.onnx", "Frobnicate", domain="nowhere")
    with pytest.raises(UserError) as caught:
        build_engine(tmp_path / "strange.onnx", tmp_path / "strange.engine")
    assert "the_culprit" in str(caught.value) and "Frobnicate" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "strange.engine").exists()


@needs_tensorrt
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batches": (0, 1, 2)}, "batches are"),
        ({"batches": (4, 2, 8)}, "that rise"),
        ({"batches": (1, 2)}, "batches are (1, 2)"),
        ({"batches": (1, 2.5, 4)}, "whole numbers"),
        ({"batches": 4}, "batches are 4"),
        ({"architectures": "SM80"}, "list of architectures 'SM80'"),
        ({"architectures": ("SM81",)}, "'SM81' is not known"),
        ({"architectures": ()}, "architecture"),
    ],
)
def test_a_wrong_request_is_one_sentence(graph, tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        build_engine(graph, tmp_path / "student.engine", **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@needs_tensorrt
def test_files_that_cannot_be_read_or_written_are_named(graph, tmp_path):
    (tmp_path / "file").write_text("not a graph")
    with pytest.raises(UserError, match="no ONNX file"):
        build_engine(tmp_path / "nothing.onnx", tmp_path / "student.engine")
    with pytest.raises(UserError, match="cannot parse 'file'"):
        build_engine(tmp_path / "file", tmp_path / "student.engine")
    with pytest.raises(UserError, match="cannot write"):
        build_engine(graph, tmp_path / "file" / "student.engine", architectures=("SM89",))


def test_without_tensorrt_the_sentence_says_what_to_install(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tensorrt_backend, "NAMES", {"tensorrt": "no_such_module", "tensorrt_rtx": "no_such_module_either"}
    )
    tensorrt_backend.load.cache_clear()
    try:
        with pytest.raises(UserError, match="pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"):
            build_engine(graph, tmp_path / "student.engine")
    finally:
        tensorrt_backend.load.cache_clear()
