"""A compiled network in an uncompiled sampler: the way to compile. Every form of it gives the sampler's own bits."""

from __future__ import annotations

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import Denoiser, schedules
from fewstep.solvers import executor, replay
from fewstep_kernels import backend

EDM = schedules.get("edm")
NOISE, COND = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.ones(3)


class Net(torch.nn.Module):
    def forward(self, x, t, cond=None):
        shift = 0.0 if cond is None else 0.1 * cond.view(-1, 1, 1, 1)
        return torch.tanh(x * 0.5 + shift) + 0.01 * t.view(-1, 1, 1, 1)

    def null(self, cond):
        return torch.zeros_like(cond)


class Backend:
    """Compiles to the traced graph as it is; counts compilations and says where each call's largest input lay."""

    def __init__(self) -> None:
        self.compilations = 0
        self.reads: list[int] = []

    def __call__(self, graph, inputs):
        self.compilations += 1

        def call(*given):
            self.reads.append(max((x for x in given if isinstance(x, torch.Tensor)), key=torch.numel).data_ptr())
            return graph(*given)

        return call


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_in_place(module, part, backend):
    part(module).compile(backend=backend)
    return module


FORMS = {
    "a compiled network alone": lambda net, backend: torch.compile(net, backend=backend),
    "a denoiser of a compiled network": lambda net, backend: Denoiser(torch.compile(net, backend=backend), EDM, "edm"),
    "a compiled denoiser": lambda net, backend: torch.compile(Denoiser(net, EDM, "edm"), backend=backend),
    "a denoiser compiled in place": lambda net, backend: compiled_in_place(
        Denoiser(net, EDM, "edm"), lambda denoiser: denoiser, backend
    ),
    "its network compiled in place": lambda net, backend: compiled_in_place(
        Denoiser(net, EDM, "edm"), lambda denoiser: denoiser.net, backend
    ),
}


@pytest.mark.parametrize("guidance", (None, 2.0))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_compiled_network_is_called_as_the_network_is(form, guidance):
    plan = solvers.plan("dpmpp_2m", EDM, 4, prediction="edm", guidance=guidance)
    watched = Backend()
    network = FORMS[form](Net(), watched)
    expected = solvers.sample(Denoiser(Net(), EDM, "edm"), plan, NOISE, COND)
    assert torch.equal(solvers.sample(network, plan, NOISE, COND), expected)
    assert watched.compilations == 1 and len(watched.reads) == 4  # once for all stages


@pytest.mark.skipif(backend("lincomb", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")
@pytest.mark.parametrize("guidance", (None, 2.0))
@pytest.mark.parametrize("name", ("ddim", "heun", "unipc"))
def test_around_a_compiled_network_nothing_is_made_but_the_result(monkeypatch, name, guidance):
    watched = Backend()
    denoiser = Denoiser(Net(), EDM, "edm")
    denoiser.net.compile(backend=watched)
    plan = solvers.plan(name, EDM, 4, prediction="edm", guidance=guidance)
    expected = solvers.sample(denoiser, plan, NOISE, COND)
    first, watched.reads = watched.reads, []
    monkeypatch.setattr(executor, "lincomb", None)  # neither may be called: the maps are the replay's
    monkeypatch.setattr(replay, "lincomb", None)
    makes, empty = [], torch.empty
    monkeypatch.setattr(replay.torch, "empty", lambda *a, **o: (makes.append(a), empty(*a, **o))[1])
    assert torch.equal(solvers.sample(denoiser, plan, NOISE, COND), expected)
    assert len(makes) == 1 and watched.compilations == 1
    assert watched.reads == first
