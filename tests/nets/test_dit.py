"""The picture networks: shapes, conditions, tangents and export."""

from __future__ import annotations

import pytest
import torch

from fewstep import nets
from fewstep.errors import UserError
from fewstep.nets.network import Network

CONFIGS = {
    "dit": {
        "name": "dit",
        "channels": 2,
        "image_size": 8,
        "patch": 4,
        "width": 32,
        "depth": 2,
        "heads": 2,
        "classes": 10,
    },
    "unet": {"name": "unet", "channels": 2, "image_size": 8, "widths": [16, 32], "embedding": 32, "classes": 10},
}


def scattered(name: str, **options: object) -> torch.nn.Module:
    """A network none of whose weights is zero (a fresh one answers zero)."""
    net = nets.build({**CONFIGS[name], **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return net.eval()


def inputs(batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 8, generator=generator, dtype=dtype)
    return x, torch.linspace(-1.5, 1.1, batch, dtype=dtype), torch.arange(batch) * 5


pytestmark = pytest.mark.parametrize("name", CONFIGS)


def test_the_answer_has_the_picture_s_shape_and_a_fresh_net_answers_zero(name):
    x, t, label = inputs()
    assert not nets.build(CONFIGS[name])(x, t, label).any()
    assert scattered(name)(x, t, label).shape == x.shape


def test_time_and_label_matter_and_no_label_is_the_null_label(name):
    net = scattered(name)
    x, t, label = inputs()
    answer = net(x, t, label)
    assert torch.equal(net.null(label), torch.full_like(label, 10))
    assert torch.equal(net(x, t), net(x, t, net.null(label)))
    assert not torch.allclose(answer, net(x, t, (label + 1) % 10), atol=1e-3)
    assert not torch.allclose(answer, net(x, t + 0.3, label), atol=1e-3)


def test_a_sample_does_not_depend_on_its_batch(name):
    net = scattered(name)
    x, t, label = inputs()
    # other matrix sizes take other summation orders
    torch.testing.assert_close(net(x[1:2], t[1:2], label[1:2]), net(x, t, label)[1:2], rtol=1e-5, atol=1e-5)


def test_a_net_is_rebuilt_from_its_config(name):
    net = scattered(name, inputs=["s"])
    again = nets.build(net.config)
    again.load_state_dict(net.state_dict())
    x, t, label = inputs()
    assert again.config == net.config
    assert torch.equal(again(x, t, label, s=t - 0.1), net(x, t, label, s=t - 0.1))


def test_a_net_that_gains_inputs_answers_as_before_until_it_is_trained(name):
    net = scattered(name)
    grown = net.with_inputs("s", "w")
    x, t, label = inputs()
    w = torch.tensor([1.0, 2.0, 7.5])
    assert torch.equal(grown(x, t, label, s=t - 0.1, w=w), net(x, t, label))
    for embedding in grown.conditioning.scalars.values():
        torch.nn.init.normal_(embedding.perceptron[-1].weight)
    assert not torch.allclose(grown(x, t, label, s=t - 0.1), grown(x, t, label, w=w), atol=1e-3)
    with pytest.raises(UserError, match="'s' is not known"):
        net(x, t, label, s=t)


def test_the_tangent_is_the_derivative(name):
    net = scattered(name).double()
    x, t, label = inputs(dtype=torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rate = torch.full_like(t, 0.7)
    _, change = torch.func.jvp(lambda a, b: net(a, b, label), (x, t), (direction, rate))
    h = 1e-5  # central difference: error h^2 ~ 1e-10 times the third derivative, rounding 1e-16 / h
    difference = (net(x + h * direction, t + h * rate, label) - net(x - h * direction, t - h * rate, label)) / (2 * h)
    torch.testing.assert_close(change, difference, rtol=1e-6, atol=1e-7)


def test_taps_are_submodules_of_the_named_width(name):
    net = scattered(name)
    for path, width in net.taps.items():
        _, seen = Network(net).features(*inputs(), at=path)
        tap = seen[path]
        assert width == (tap.shape[1] if tap.dim() == 4 else tap.shape[2])


def test_it_exports_with_any_batch(name):
    net = scattered(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, inputs(4), dynamic_shapes=({0: batch}, {0: batch}, {0: batch})).module()
    given = inputs(3)
    torch.testing.assert_close(program(*given), net(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"inputs": ["z"]}, "'z' is not known"),
        ({"image_size": 7}, "image_size 7"),
        ({"widht": 3}, "'widht' is not known"),
    ],
)
def test_an_impossible_network_is_one_sentence(name, change, sentence):
    with pytest.raises(UserError, match=sentence):
        nets.build({**CONFIGS[name], **change})
