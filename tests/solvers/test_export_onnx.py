"""Every solver's plan, network and guidance included, is one ONNX graph that paints PyTorch's pictures."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import Denoiser, schedules
from fewstep.errors import UserError
from fewstep.runtime.onnx import OnnxSampler, convert

pytest.importorskip("onnxscript", reason="ONNX export needs: pip install onnx onnxscript")
pytest.importorskip("onnxruntime", reason="running an ONNX graph needs: pip install onnxruntime")


class Net(torch.nn.Module):
    """tanh(x + b_label + t) on [B, 2, 3, 3]: few operators, for an exporter's time goes with their number."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(4, 2, 1, 1, generator=generator))

    def forward(self, x, t, cond=None):
        return torch.tanh(x + self.table[cond] + t.reshape(-1, 1, 1, 1))

    def null(self, cond):
        return torch.full_like(cond, 3)


NUMBERS = ("time", "target", "network_time", "input_scale", "guidance", "matrix")


def graphs() -> dict[str, list[str]]:
    """Solvers by the graph they become: plans whose stages differ in numbers alone differ in its constants alone."""
    same: dict[str, list[str]] = {}
    for solver in solvers.names(alone=True):
        plan = solvers.plan(solver, schedules.get("edm"), 2, prediction="edm")
        fields = [field.name for field in dataclasses.fields(solvers.Stage) if field.name not in NUMBERS]
        shape = repr([[getattr(stage, name) for name in fields] for stage in plan.stages])
        same.setdefault(shape, []).append(solver)
    return same


CASES = [pytest.param(alike[0], {}, "edm", "edm", 2, None, id="=".join(alike)) for alike in graphs().values()]
CASES += [
    pytest.param("ddim", {"eta": 0.7}, "sd", "v", 2, 2.0, id="guided and stochastic"),
    pytest.param("dpmpp_3m", {}, "flow", "flow", 3, None, id="two past estimates"),
    pytest.param("exponential", {"form": "eps"}, "vp", "eps", 3, [2.0, None, 3.0], id="guided in some steps"),
]


class Other(torch.nn.Module):
    """What a further network answers: something bent of what it reads, of `columns` times the channels."""

    def __init__(self, columns: int = 1) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.linspace(0.3, 0.9, columns))

    def forward(self, x, t, cond=None):
        return torch.cat([torch.sin(slope * x + 0.1 * t.reshape(-1, 1, 1, 1)) for slope in self.slope], 1)


ROLES = [
    pytest.param("dpmpp_2m", {}, {"name": "autoguidance", "scale": 2.0}, {"weak": 1}, id="autoguidance"),
    pytest.param("ddim", {}, {"name": "perp_neg", "scale": 2.0, "weights_of": [1.0, 0.5]}, {}, id="negatives"),
    pytest.param("ltsp", {}, {"name": "classifier", "scale": 0.5}, {"gradient": 1}, id="a split gradient"),
    pytest.param("genie", {"head": "mixed"}, 2.0, {"head": 3}, id="a head of three columns, guided"),
]


@pytest.mark.parametrize(("solver", "options", "guidance", "columns"), ROLES)
def test_further_networks_and_negatives_are_in_the_graph(solver, options, guidance, columns, tmp_path):
    schedule, denoiser = schedules.get("vp"), Denoiser(Net(), schedules.get("vp"), "eps")
    plan = solvers.plan(solver, schedule, 2, guidance=guidance, **options)
    assert {*plan.roles} == {*columns}
    others = {role: Other(count) for role, count in columns.items()}
    sampler = types.SimpleNamespace(denoiser=denoiser, classes=3, image_shape=(2, 3, 3), device=torch.device("cpu"))
    convert(sampler, plan, others).save(tmp_path / "sampler.onnx")
    graph = OnnxSampler(tmp_path / "sampler.onnx", threads=1)
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(5, 1 + plan.stochastic_stages, 2, 3, 3, generator=generator), torch.arange(5) % 3
    away = [(labels + 1 + k) % 3 for k in range(plan.negatives)]
    expected = solvers.sample(denoiser, plan, noise, labels, others=others, negatives=away)
    assert expected.std() > 0.05
    largest = expected.abs().max()  # two steps of an untaught network end far out
    torch.testing.assert_close(graph(noise, labels, away) / largest, expected / largest, rtol=0, atol=1e-5)
    assert graph.inputs == ["noise", "condition", *(f"negative_{k}" for k in range(plan.negatives))]
    if away:
        with pytest.raises(UserError, match="takes 2 negatives and got 1"):
            graph(noise, labels, away[:1])
        with pytest.raises(UserError, match="1 classes for 5 images"):
            graph(noise, labels, [away[0], [1]])
        assert (graph(noise, labels, away[::-1]) - expected).abs().max() > 1e-3 * largest
    for other in others.values():  # their weights are really there
        with torch.no_grad():
            other.slope.mul_(1.5)
        changed = solvers.sample(denoiser, plan, noise, labels, others=others)
        assert (changed - expected).abs().max() > 1e-3 * largest


@pytest.mark.parametrize(("solver", "options", "name", "kind", "steps", "guidance"), CASES)
def test_onnx_runtime_paints_pytorchs_pictures_at_any_batch(solver, options, name, kind, steps, guidance, tmp_path):
    schedule = schedules.get(name)
    denoiser = Denoiser(Net(), schedule, kind)
    plan = solvers.plan(solver, schedule, steps, prediction=kind, guidance=guidance, **options)
    sampler = types.SimpleNamespace(
        denoiser=denoiser, classes=3, image_shape=(2, 3, 3), device=torch.device("cpu"), plan=plan
    )
    convert(sampler, plan).save(tmp_path / "sampler.onnx")
    graph = OnnxSampler(tmp_path / "sampler.onnx", threads=1)
    for batch in (1, 5):
        generator = torch.Generator().manual_seed(batch)
        noise = torch.randn(batch, 1 + plan.stochastic_stages, 2, 3, 3, generator=generator)
        labels = torch.arange(batch) % 3
        expected = solvers.sample(denoiser, plan, noise, labels)
        assert expected.std() > 0.05
        torch.testing.assert_close(graph(noise, labels), expected, rtol=0, atol=1e-4)
