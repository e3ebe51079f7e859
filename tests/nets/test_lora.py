"""Low-rank adapters: the start, the merge, what is shared and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.func import jvp

from fewstep import nets
from fewstep.diffusion import prediction, schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.methods import Method, NetworkSpec
from fewstep.methods.build import build
from fewstep.nets import Network
from fewstep.nets.lora import Adapted, Lora

CONFIGS = {
    "mlp": {"name": "mlp", "dim": 64, "width": 16, "depth": 2, "classes": 10},
    "dit": {"name": "dit", "channels": 1, "image_size": 8, "width": 32, "depth": 2, "heads": 2, "classes": 10},
    "unet": {"name": "unet", "channels": 1, "image_size": 8, "widths": [8, 16], "classes": 10},
}


def base(name="unet"):
    """A float64 network whose weights are all random (a fresh net's last layer is zero)."""
    torch.manual_seed(3)
    net = nets.build(CONFIGS[name]).double().requires_grad_(False).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def trained(net, lora):
    """As if trained: no correction is zero."""
    adapted = Adapted(net, lora)
    for parameter in adapted.parameters():
        nn.init.normal_(parameter, std=0.2)
    return adapted


def inputs():
    return torch.randn(3, 1, 8, 8).double(), torch.rand(3).double() + 0.5, torch.tensor([1, 9, 10])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_adapter_answers_as_its_base(name):
    net = base(name)
    given = inputs()
    assert torch.equal(Adapted(net, Lora(rank=4))(*given), net(*given))


@pytest.mark.parametrize("targets", ((), ("middle",)), ids=("all", "some"))
@pytest.mark.parametrize("name", CONFIGS)
def test_the_merged_network_answers_as_the_adapted_one(name, targets):
    net = base(name)
    if targets:
        linear = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        targets = (linear[len(linear) // 2],)
    adapted = trained(net, Lora(rank=3, alpha=6.0, targets=targets))
    assert len(adapted.corrections) == 1 if targets else len(adapted.corrections) > 5
    plain = nets.build(CONFIGS[name]).double().eval()
    plain.load_state_dict(adapted.merged(net.state_dict(), adapted.state_dict()))
    given = inputs()
    torch.testing.assert_close(plain(*given), adapted(*given), rtol=1e-11, atol=1e-11)  # two orders of sums in float64
    assert (adapted(*given) - net(*given)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "layer",
    (
        nn.Conv1d(3, 5, 3, stride=2, padding=1),
        nn.Conv2d(3, 5, (3, 1), padding=(1, 0), dilation=(2, 1), padding_mode="reflect"),
        nn.Conv3d(2, 4, 2),
        nn.Linear(6, 4, bias=False),
    ),
    ids=str,
)
def test_every_kind_of_layer_merges(layer):
    net = nn.Sequential(layer).double()
    adapted = trained(net, Lora(rank=2))
    x = torch.randn(2, 6).double() if isinstance(layer, nn.Linear) else None
    if x is None:
        x = torch.randn(2, layer.in_channels, *[8] * len(layer.kernel_size)).double()
    expected = adapted(x)
    net.load_state_dict(adapted.merged(net.state_dict(), adapted.state_dict()))
    torch.testing.assert_close(net(x), expected, rtol=1e-11, atol=1e-11)


def test_two_adapters_share_one_base_and_leave_it_as_it_was():
    net = base()
    first, second = trained(net, Lora(rank=2)), trained(net, Lora(rank=4))
    before, own, given = copy.deepcopy(net.state_dict()), net(*inputs()), inputs()
    answers = first(*given), second(*given)
    first(*given).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in first.parameters())
    assert all(p.grad is None for p in (*second.parameters(), *net.parameters()))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(second(*given), answers[1])
    assert not torch.equal(first(*given), answers[0])
    assert torch.equal(first(*given), net(*given)) and own.shape == net(*given).shape
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_copy_has_corrections_of_its_own_over_the_same_base():
    adapted = trained(base(), Lora(rank=2))
    twin = copy.deepcopy(adapted)
    assert twin.base is adapted.base
    given, mine = inputs(), next(adapted.parameters())
    assert torch.equal(twin(*given), adapted(*given))
    with torch.no_grad():
        mine.add_(1.0)
    assert not torch.equal(twin(*given), adapted(*given))


def test_nothing_of_the_adapter_stays_on_the_base_after_an_error():
    net = base()
    given = inputs()
    expected = net(*given)
    with pytest.raises(RuntimeError):
        trained(net, Lora(rank=2))(given[0][:, :, :3], given[1], given[2])
    assert torch.equal(net(*given), expected)


def test_tangents_go_through_the_corrections():
    net = base()
    adapted = trained(net, Lora(rank=2))
    x, t, cond = inputs()
    direction = torch.randn_like(x)
    _, found = jvp(lambda z: adapted(z, t, cond), (x,), (direction,))
    plain = nets.build(CONFIGS["unet"]).double().eval()
    plain.load_state_dict(adapted.merged(net.state_dict(), adapted.state_dict()))
    _, expected = jvp(lambda z: plain(z, t, cond), (x,), (direction,))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_taps_are_those_of_the_base():
    net = base()
    tap = next(reversed(net.taps))
    x, t, cond = inputs()
    denoiser = Denoiser(trained(net, Lora(rank=2)), schedules.get("edm"), prediction.get("edm"))
    _, taps = Network(denoiser).features(x, t, cond, at=tap, way="value")
    assert taps[tap].shape[1] == net.taps[tap]


class Two(Method):
    """A student and a critic over the teacher; a network that starts from the student; one with a further input."""

    networks = {
        "student": NetworkSpec(adapter=Lora(rank=2)),
        "critic": NetworkSpec(),
        "after": NetworkSpec("student"),
        "told": NetworkSpec(inputs=("x", "t", "s")),
    }


def built(**adapters):
    method = Two()
    method.schedule, method.prediction = schedules.get("edm"), prediction.get("edm")
    teacher = Denoiser(base(), method.schedule, method.prediction)
    return teacher, build(method, teacher, adapters=adapters)


def test_a_recipes_adapters_come_before_the_declared_ones():
    teacher, modules = built(student=Lora(rank=5), critic=Lora(rank=3))
    assert {name: getattr(m.net, "lora", None) for name, m in modules.items()} == {
        "student": Lora(rank=5),
        "critic": Lora(rank=3),
        "after": Lora(rank=5),  # a copy of an adapted network is one
        "told": None,
    }
    assert modules["student"].net.base is modules["critic"].net.base is modules["after"].net.base is teacher.net


@pytest.mark.parametrize(
    ("adapters", "sentence"),
    (
        ({"studnet": Lora()}, "student"),
        ({"after": Lora()}, "starts from 'student'"),
        ({"told": Lora()}, "which the teacher does not"),
        ({"critic": Lora(targets=("to_q",))}, "layer to adapt"),
    ),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_adapted_is_one_sentence(adapters, sentence):
    with pytest.raises(UserError, match=sentence):
        built(**adapters)


def test_a_grouped_convolution_is_left_out_and_refused_by_name():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    assert list(Adapted(net, Lora()).corrections) == ["1"]
    with pytest.raises(UserError, match="grouped"):
        Adapted(net, Lora(targets=("0",)))
