"""The transformer's fused attention is its written one, in value and in every derivative."""

import pytest
import torch

from fewstep import nets
from fewstep.nets import Network, dit


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    net = nets.build({"name": "dit", "channels": 1, "image_size": 8, "width": 24, "depth": 2, "heads": 2, "classes": 3})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    net = net.double()
    x = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    return net, x, torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([1, 3])


def both(monkeypatch, call):
    monkeypatch.setattr(dit, "FUSED_FROM", 1 << 30)
    written = call()
    monkeypatch.setattr(dit, "FUSED_FROM", 1)
    calls = []
    honest = dit.attention
    monkeypatch.setattr(dit, "attention", lambda *a: (calls.append(1), honest(*a))[1])
    fused = call()
    assert calls
    torch.testing.assert_close(fused, written, rtol=1e-10, atol=1e-12)  # float64, sums of 16 in another order


def test_values_and_gradients(case, monkeypatch):
    net, x, t, cond = case

    def call():
        answer = net(x, t, cond)
        return answer, torch.autograd.grad(answer.square().sum(), list(net.parameters()))

    both(monkeypatch, call)


def test_tangents_and_gradients_beside_them(case, monkeypatch):
    net, x, t, cond = case

    def call():
        value, tangent = torch.func.jvp(lambda x, t: net(x, t, cond), (x, t), (x.cos(), torch.ones_like(t)))
        gradients = torch.autograd.grad((value - tangent.detach()).square().sum(), list(net.parameters()))
        return value, tangent, Network(net).tangent((x, t), (x.cos(), torch.ones_like(t)), cond=cond), gradients

    both(monkeypatch, call)


def test_gradients_of_gradients(case, monkeypatch):
    net, x, t, cond = case

    def call():
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(net(leaf, t, cond).sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(net.parameters()), allow_unused=True)

    both(monkeypatch, call)


def test_exported_values(case, monkeypatch):
    net, x, t, cond = case

    def call():
        program = torch.export.export(net, (x, t, cond), strict=False)
        return program.module()(x.flip(0), t, cond)

    both(monkeypatch, call)
