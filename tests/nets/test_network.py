"""The four ways to call a network, and which gradients each lets through."""

import pytest
import torch
from torch import nn

from fewstep.diffusion import schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.nets import Network, same_masks
from fewstep.nets.mlp import MLP


def denoiser(schedule="trigflow", prediction="edm", **options):
    torch.manual_seed(0)
    net = MLP(6, width=32, **options).double()
    for parameter in net.parameters():  # the last layer starts at zero: give every derivative something to see
        nn.init.normal_(parameter, std=0.3)
    return Denoiser(net, schedules.get(schedule), prediction)


def inputs(n=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, dtype=torch.float64, generator=generator)
    t = torch.rand(n, dtype=torch.float64, generator=generator) * 0.8 + 0.1
    return x, t


def test_a_call_reaches_parameters_and_inputs_through_the_engine():
    module, calls = denoiser(), []

    def engine(*given, **named):
        calls.append(len(given))
        return module(*given, **named)

    network = Network(module, engine)
    x, t = inputs()
    x.requires_grad_(True)
    network(x, t).sum().backward()
    assert calls == [2]
    assert x.grad is not None and all(p.grad is not None for p in module.parameters())


def test_value_and_fixed_and_tangent_do_not_go_through_the_engine():
    def engine(*_given, **_named):
        raise AssertionError("through the engine this is silently wrong under ZeRO")

    network = Network(denoiser(), engine)
    x, t = inputs()
    network.value(x, t), network.fixed(x, t), network.tangent((x, t), (x, t))


def test_fixed_gives_exact_input_gradients_and_none_to_parameters():
    network = Network(denoiser())
    x, t = inputs()
    ours, plain = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    before = [p.requires_grad for p in network.module.parameters()]
    answer = network.fixed(ours, t)
    assert [p.requires_grad for p in network.module.parameters()] == before
    answer.square().sum().backward()
    assert all(p.grad is None for p in network.module.parameters())
    network(plain, t).square().sum().backward()
    assert torch.equal(ours.grad, plain.grad)


def test_fixed_restores_what_was_trained_also_after_an_exception_and_leaves_frozen_parts_frozen():
    network = Network(denoiser())
    network.net.first.requires_grad_(False)
    before = {n: p.requires_grad for n, p in network.module.named_parameters()}
    with pytest.raises((ValueError, RuntimeError)):
        network.fixed(torch.zeros(2, 5, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    assert {n: p.requires_grad for n, p in network.module.named_parameters()} == before
    assert len(set(before.values())) == 2


def test_a_fixed_graph_stays_exact_when_the_parameters_train_before_backward():
    """Its backward may run after another update's backward has filled and freed gradients of the same parameters."""
    network = Network(denoiser())
    x, t = inputs()
    ours = x.clone().requires_grad_(True)
    loss = network.fixed(ours, t).square().sum()
    network(x, t).square().sum().backward()
    theirs = [p.grad.clone() for p in network.module.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(network.module.parameters(), theirs))
    del loss
    again = x.clone().requires_grad_(True)
    network(again, t).square().sum().backward()
    assert torch.equal(ours.grad, again.grad)


def test_fixed_nested_in_a_call_trains_the_outer_network_only():
    outer, inner = Network(denoiser()), Network(denoiser())
    x, t = inputs()
    inner.fixed(outer(x, t), t).sum().backward()
    assert all(p.grad is not None for p in outer.module.parameters())
    assert all(p.grad is None for p in inner.module.parameters())


def test_value_has_no_graph():
    network = Network(denoiser())
    x, t = inputs()
    answer = network.value(x.requires_grad_(True), t)
    assert not answer.requires_grad and torch.equal(answer, network(x, t).detach())


@pytest.mark.parametrize("schedule,prediction", [("trigflow", "edm"), ("flow", "flow"), ("vp", "v"), ("edm", "edm")])
def test_a_tangent_is_the_total_derivative_with_the_coefficients_own_part(schedule, prediction):
    """Coefficients depend on t: treating them as constants is 68% wrong for TrigFlow; a lost tangent is 0."""
    network = Network(denoiser(schedule, prediction))
    x, t = inputs()
    dx, dt = torch.cos(x), torch.full_like(t, 0.7)
    f, df = network.tangent((x, t), (dx, dt))
    h = 1e-6
    central = (network.value(x + h * dx, t + h * dt) - network.value(x - h * dx, t - h * dt)) / (2 * h)
    torch.testing.assert_close(f, network.value(x, t), rtol=1e-12, atol=1e-13)  # the norm's sums in another order
    assert not f.requires_grad and not df.requires_grad
    torch.testing.assert_close(df, central, rtol=1e-6, atol=1e-8)  # central differences in float64: h^2 + eps/h
    _, without_time = network.tangent((x, t), (dx, torch.zeros_like(t)))
    assert (df - without_time).abs().max() > 1e-2


class NoForwardRule(torch.autograd.Function):
    """cos, with a backward that can be differentiated and no jvp."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        return -gradient * ctx.saved_tensors[0].sin()


class Operator(nn.Module):
    def __init__(self, apply):
        super().__init__()
        self.apply_operator = apply
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, x, t):
        return self.apply_operator(x * self.scale * t[:, None])


def test_a_network_without_forward_mode_falls_back_to_reverse_mode_twice():
    network = Network(Operator(NoForwardRule.apply))
    exact = Network(Operator(torch.cos))
    x, t = inputs()
    for ours, plain in zip(network.tangent((x, t), (x, t)), exact.tangent((x, t), (x, t))):
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)
    assert network.module.scale.requires_grad and network.module.scale.grad is None


def test_a_network_with_neither_mode_is_an_error_and_differences_are_the_way_out():
    class NoRule(NoForwardRule):
        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("this operator has no backward")

    x, t = inputs()
    with pytest.raises(UserError, match="tangents='difference'"):
        Network(Operator(NoRule.apply)).tangent((x, t), (x, t))
    _, df = Network(Operator(NoRule.apply), tangents="difference").tangent((x, t), (x, t))
    _, exact = Network(Operator(torch.cos)).tangent((x, t), (x, t))
    torch.testing.assert_close(df, exact, rtol=1e-7, atol=1e-8)  # eps^(2/3) of float64 is 4e-11, times derivatives


def test_attention_has_a_tangent():
    class Attention(nn.Module):
        def forward(self, x, t):
            q = x[:, None, :, None] * t[:, None, None, None]
            return nn.functional.scaled_dot_product_attention(q, q, q).flatten(1)

    network = Network(Attention())
    x, t = inputs()
    _, df = network.tangent((x, t), (x, t))
    h = 1e-6
    central = (network.value(x + h * x, t + h * t) - network.value(x - h * x, t - h * t)) / (2 * h)
    torch.testing.assert_close(df, central, rtol=1e-6, atol=1e-8)


def test_same_masks_repeats_dropout_in_one_context_and_nowhere_else():
    network = Network(denoiser(dropout=0.5))
    network.module.train()
    x, t = inputs()
    with same_masks():
        first, second, third = network(x, t), network.value(x, t), network.fixed(x, t)
    assert torch.equal(first, second) and torch.equal(first, third)
    after = network.value(x, t)
    assert not torch.equal(first, after)
    with same_masks():
        assert not torch.equal(network.value(x, t), first)
    module = denoiser(dropout=0.5).eval()
    with same_masks():
        assert torch.equal(Network(module).value(x, t), Network(module).value(x, t))


@pytest.mark.parametrize("way,reaches", [("call", True), ("fixed", False), ("value", False)])
def test_features_tap_the_layer_in_the_same_call(way, reaches):
    network = Network(denoiser(depth=3))
    x, t = inputs()
    x.requires_grad_(True)
    answer, taps = network.features(x, t, at=("blocks.0", "blocks.2"), way=way)
    assert torch.equal(answer, network(x, t)) and {n: v.shape for n, v in taps.items()} == {
        "blocks.0": (5, 32),
        "blocks.2": (5, 32),
    }
    if way == "value":
        assert not taps["blocks.0"].requires_grad
        return
    taps["blocks.0"].sum().backward()
    assert x.grad is not None
    reached = {n for n, p in network.net.named_parameters() if p.grad is not None}
    assert any(n.startswith("blocks.0") for n in reached) == reaches
    assert not any(n.startswith(("blocks.1", "blocks.2", "last")) for n in reached)
    assert not network.net.blocks[0]._forward_hooks


def test_features_of_an_unknown_layer_name_the_choices():
    x, t = inputs()
    with pytest.raises(UserError, match=r"'blocks\.9'.*blocks\.0"):
        Network(denoiser()).features(x, t, at="blocks.9")


def test_gradient_norm_is_the_norm_of_the_layers_gradient_and_keeps_the_graph():
    network = Network(denoiser())
    x, t = inputs()
    loss = network(x, t).square().mean()
    norm = network.gradient_norm(loss, "last")
    loss.backward()
    expected = sum(p.grad.square().sum() for p in network.net.last.parameters()).sqrt()
    torch.testing.assert_close(norm, expected)
    with pytest.raises(UserError, match="layer with trained parameters"):
        network.gradient_norm(loss, "nowhere")


def test_null_is_the_networks_null_condition():
    network = Network(denoiser(classes=10))
    assert network.null(torch.tensor([3, 4])).tolist() == [10, 10]
    assert network.null(None) is None
