"""A network with its plan is one exportable graph, of plain operators and any batch."""

from __future__ import annotations

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import Denoiser, schedules
from fewstep.diffusion.prediction import Prediction

EDM = schedules.get("edm")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)
        self.embed = torch.nn.Embedding(4, 2)

    def forward(self, x, t, cond=None):
        shift = self.embed(cond)[:, :, None, None] + t[:, None, None, None]
        return torch.tanh(self.conv(x) + shift)

    def null(self, cond):
        return torch.full_like(cond, 3)


class Sampler(torch.nn.Module):
    """Carried noise [B, 1 + S, C, H, W] and labels in, picture out."""

    def __init__(self, denoiser: Denoiser, plan: solvers.Plan) -> None:
        super().__init__()
        self.denoiser, self.plan = denoiser, plan

    def forward(self, noise, cond):
        return solvers.sample(self.denoiser, self.plan, noise, cond)


def build(solver: str, guidance: float | None, steps: int = 3) -> Sampler:
    kind = Prediction("edm", boundary=0.002 if solver == "consistency" else None)
    plan = solvers.plan(solver, EDM, steps, prediction=kind, guidance=guidance)
    return Sampler(Denoiser(Net(), EDM, kind), plan)


def inputs(sampler: Sampler, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 1 + sampler.plan.stochastic_stages, 2, 4, 4)
    return torch.randn(shape, generator=generator), torch.arange(batch) % 3


@pytest.mark.parametrize(("solver", "guidance"), [("consistency", None), ("dpmpp_2m", 2.0), ("heun", 2.0)])
def test_the_exported_graph_gives_the_executors_numbers_at_any_batch(solver, guidance):
    sampler = build(solver, guidance)
    dynamic = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(sampler, inputs(sampler, 3), dynamic_shapes=(dynamic, dynamic))
    ours = [node for node in exported.graph.nodes if "fewstep" in str(node.target)]
    assert not ours  # plain operators only
    for batch in (1, 3, 7):
        found = exported.module()(*inputs(sampler, batch))
        # fp32, and tau up to 80 at the start
        torch.testing.assert_close(found, sampler(*inputs(sampler, batch)), rtol=1e-5, atol=1e-5)


def test_the_whole_sampler_is_one_graph_to_the_compiler():
    sampler = build("dpmpp_2m", 2.0)
    compiled = torch.compile(sampler, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs(sampler, 3)), sampler(*inputs(sampler, 3)), rtol=1e-5, atol=1e-5)
