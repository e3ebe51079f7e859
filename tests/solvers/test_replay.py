"""A plain plan run again costs one network call and one native call a stage, and has the executor's bits."""

from __future__ import annotations

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import Denoiser, schedules
from fewstep.errors import UserError
from fewstep.solvers import executor, replay
from fewstep_kernels import backend, backends

EDM = schedules.get("edm")
ALONE = [name for name in solvers.names() if not solvers.plan(name, EDM, 3, prediction="edm").roles]
PLAIN = ("ddim", "euler", "heun", "dpmpp_2m", "consistency", "unipc")
needs_cpu = pytest.mark.skipif(backend("lincomb", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")


class Net(torch.nn.Module):
    """answer(x, t, cond) made of x by `shape_of`: whatever layout a network may answer in."""

    def __init__(self, laid=lambda y: y):
        super().__init__()
        self.laid = laid
        self.reads: list[int] = []

    def forward(self, x, t, cond=None, **told):
        self.reads.append(x.data_ptr())
        shift = 0.0 if cond is None else 0.1 * cond.view(-1, 1, 1, 1)
        return self.laid(torch.tanh(x * 0.5 + shift) + 0.01 * t.view(-1, 1, 1, 1))

    def null(self, cond):
        return torch.zeros_like(cond)


def noise(batch=3, dtype=torch.float32):
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def both(monkeypatch, denoiser, plan, start, cond=None, seeds=None):
    """(replayed twice, by the executor): equal bits; how often the replay gave a map away."""
    given_away = []
    monkeypatch.setattr(replay, "lincomb", lambda *a, **o: (given_away.append(1), executor.lincomb(*a, **o))[1])
    with torch.inference_mode():
        found = [solvers.sample(denoiser, plan, start, cond, seeds=seeds).clone() for _ in range(2)]
        count = len(given_away)
        with monkeypatch.context() as patch:
            patch.setattr(executor, "replay_of", lambda *given: None)
            expected = solvers.sample(denoiser, plan, start, cond, seeds=seeds)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    return count


@pytest.mark.parametrize("guidance", (None, 2.0))
@pytest.mark.parametrize("name", ALONE)
def test_every_solver_gives_the_executors_bits(monkeypatch, name, guidance):
    plan = solvers.plan(name, EDM, 4, prediction="edm", guidance=guidance)
    cond, seeds = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([3, -1, 4])
    assert both(monkeypatch, Denoiser(Net(), EDM, "edm"), plan, noise(), cond, seeds) == 0
    if plan.stochastic_stages:
        carried = torch.randn(3, 1 + plan.stochastic_stages, 2, 4, 4)
        assert both(monkeypatch, Denoiser(Net(), EDM, "edm"), plan, carried, cond) == 0


@needs_cpu
@pytest.mark.parametrize("guidance", (None, 2.0))
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_plan_is_replayed_and_makes_nothing_but_its_result(monkeypatch, name, guidance):
    net = Net()
    denoiser, plan = Denoiser(net, EDM, "edm"), solvers.plan(name, EDM, 4, prediction="edm", guidance=guidance)
    start, cond, seeds = noise(), torch.ones(3), torch.arange(3)
    solvers.sample(denoiser, plan, start, cond, seeds=seeds)
    first, net.reads = net.reads, []
    makes = []
    for function in ("empty", "empty_like", "full", "zeros", "tensor"):
        whole = getattr(torch, function)
        monkeypatch.setattr(torch, function, lambda *a, f=function, w=whole, **o: (makes.append(f), w(*a, **o))[1])
    monkeypatch.setattr(executor, "lincomb", None)  # neither may be called
    monkeypatch.setattr(replay, "lincomb", None)
    solvers.sample(denoiser, plan, start, cond, seeds=seeds)
    assert makes == ["empty"]
    assert net.reads == first


LAYOUTS = {
    "channels last": lambda y: y.to(memory_format=torch.channels_last),
    "a column": lambda y: torch.stack([y, -y], 1)[:, 0],
    "bfloat16": lambda y: y.bfloat16(),
    "float64": lambda y: y.double(),
    "one of a list": lambda y: [y],
    "a parameter": lambda y: torch.nn.Parameter(y, requires_grad=False),
    "strided": lambda y: torch.stack([y, y], -1)[..., 0],
}


@needs_cpu
@pytest.mark.parametrize("guidance", (None, 2.0))
@pytest.mark.parametrize("laid", LAYOUTS.values(), ids=LAYOUTS)
def test_answers_of_any_layout(monkeypatch, laid, guidance):
    plan = solvers.plan("dpmpp_2m", EDM, 3, prediction="edm", guidance=guidance)
    both(monkeypatch, Denoiser(Net(laid), EDM, "edm"), plan, noise(), torch.ones(3))


@pytest.mark.parametrize("guidance", (None, 2.0))
def test_a_network_that_answers_what_it_read(monkeypatch, guidance):
    class Echo(Net):
        def forward(self, x, t, cond=None):
            return x

    for name in ("ddim", "heun", "dpmpp_2m"):
        plan = solvers.plan(name, EDM, 3, prediction="edm", guidance=guidance)
        both(monkeypatch, Denoiser(Echo(), EDM, "edm"), plan, noise(), torch.ones(3))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_noise_of_any_layout_and_dtype(monkeypatch, dtype):
    plan = solvers.plan("dpmpp_2m", EDM, 3, prediction="edm")
    start = noise(dtype=dtype)
    last = start.to(memory_format=torch.channels_last)
    for given in (start, last, start[:1].expand(3, -1, -1, -1), torch.nn.Parameter(start), start[:0]):
        both(monkeypatch, Denoiser(Net(lambda y, d=dtype: y.to(d)), EDM, "edm"), plan, given)


def test_another_backend_later_is_taken(monkeypatch):
    plan, denoiser = solvers.plan("ddim", EDM, 3, prediction="edm"), Denoiser(Net(), EDM, "edm")
    found = solvers.sample(denoiser, plan, noise())
    with backends.asking("reference"):
        other = solvers.sample(denoiser, plan, noise())
    assert torch.equal(found, other)


def test_autograd_notices_that_a_buffer_it_saved_was_overwritten():
    kept = []
    weight = torch.ones((), requires_grad=True)

    def network(x, t):
        with torch.enable_grad():
            kept.append((weight * x).sum())
        return torch.tanh(x)

    solvers.sample(network, solvers.plan("ddim", EDM, 3, prediction="edm"), noise())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept[0].backward()


def test_wrong_answers_are_said_on_a_later_run_too():
    plan, net = solvers.plan("ddim", EDM, 3, prediction="edm"), Net()
    denoiser = Denoiser(net, EDM, "edm")
    solvers.sample(denoiser, plan, noise())
    net.laid = lambda y: y[:, :1]
    with pytest.raises(UserError, match=r"the network answered \[3, 1, 4, 4\]"):
        solvers.sample(denoiser, plan, noise())
    net.laid = lambda y: None
    with pytest.raises(UserError, match="the network answered NoneType"):
        solvers.sample(denoiser, plan, noise())
