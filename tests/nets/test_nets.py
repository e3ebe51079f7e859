"""Networks by name, and what each of them promises."""

import pytest
import torch

from fewstep import nets
from fewstep.errors import UserError
from fewstep.nets.embeddings import TimeEmbedding, positional_features
from fewstep.nets.mlp import MLP


def test_a_net_is_rebuilt_from_its_config():
    net = MLP(8, width=16, depth=3, classes=5, inputs=("s",))
    again = nets.build(net.config)
    again.load_state_dict(net.state_dict())
    x, t, label = torch.randn(4, 2, 2, 2), torch.rand(4), torch.tensor([0, 4, 5, 2])
    assert torch.equal(net(x, t, label, s=t / 2), again(x, t, label, s=t / 2))
    assert again.config == net.config


@pytest.mark.parametrize(
    "config,sentence",
    [
        ({"name": "mpl", "dim": 2}, r"network name 'mpl' is not known \(did you mean 'mlp'\?\)"),
        ({"dim": 2}, "network name None is not known"),
        ({"name": "mlp", "dim": 2, "widht": 3}, r"'widht' is not known \(did you mean 'width'\?\)"),
        ({"name": "mlp"}, "network 'mlp' cannot be built"),
    ],
)
def test_a_wrong_description_is_one_sentence(config, sentence):
    with pytest.raises(UserError, match=sentence):
        nets.build(config)


def test_a_fresh_mlp_answers_zero_and_labels_and_times_matter_once_trained():
    net = MLP(2, classes=3, inputs=("s",))
    x, t = torch.randn(4, 2), torch.rand(4)
    label = torch.tensor([0, 1, 2, 3])
    assert not net(x, t, label, s=t).any()
    torch.nn.init.normal_(net.last.weight)
    for block in net.blocks:
        torch.nn.init.normal_(block.second.weight)
    for embedding in net.conditioning.scalars.values():
        torch.nn.init.normal_(embedding.perceptron[-1].weight)
    answers = [
        net(x, t, label, s=t),
        net(x, t, net.null(label), s=t),
        net(x, t, label, s=t / 2),
        net(x, t / 2, label, s=t),
    ]
    assert all(not torch.equal(answers[0], other) for other in answers[1:])
    assert torch.equal(answers[1], net(x, t, None, s=t))
    with pytest.raises(UserError, match="'w' is not known"):
        net(x, t, label, w=t)


def test_the_taps_name_real_submodules_and_their_widths():
    net = MLP(2, width=24, depth=2)
    for name, width in net.taps.items():
        assert net.get_submodule(name).second.out_features == width


def test_time_features_are_smooth_and_tell_times_apart():
    t = torch.tensor([-1.55, 0.0, 1.1], dtype=torch.float64)
    features, change = torch.func.jvp(lambda u: positional_features(u, 32), (t,), (torch.ones_like(t),))
    assert features.shape == (3, 32) and change.abs().max() <= 32.0  # the highest frequency
    assert (features[0] - features[1]).norm() > 0.5
    assert TimeEmbedding(16).double()(t).shape == (3, 16)
