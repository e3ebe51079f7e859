"""The interface carries methods of other kinds, and refuses what would be silently wrong."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fewstep import methods
from fewstep.diffusion import schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from fewstep.methods import Average, Batch, Method, NetworkSpec, OptimizerConfig, build
from fewstep.nets.mlp import MLP
from fewstep.nets.read_out import Jump
from tests.methods import toy_methods
from tests.methods.driver import train


def teacher(schedule="flow"):
    torch.manual_seed(0)
    net = MLP(2, width=16)
    nn.init.normal_(net.last.weight, std=0.2)
    return Denoiser(net, schedules.get(schedule), Prediction("x0"))


def data(index):
    """The same sample for the same global number, whatever the split."""
    rows = [torch.randn(2, generator=torch.Generator().manual_seed(int(i))) for i in index]
    x0 = torch.stack(rows)
    return Batch(index, x0, pair=(x0.flip(0), x0))


EXPECTED = {
    "CTM": {"student": 4, "disc": 4},
    "SCM": {"student": 4},
    "SiD": {"critic": 4, "student": 4},
    "Progressive": {"student": 9},
    "SFD": {"student": 16},
    "SDS": {"student": 4},
    "SFTPG": {"critic": 20, "student": 16, "baseline": 16},
    "KnowledgeDistillation": {"student": 4},
}


@pytest.mark.parametrize("method", toy_methods.ALL, ids=lambda method: method.__name__)
def test_methods_of_every_kind_run_on_one_trainer_without_leaking_into_each_other(method):
    run = train(method(), data, teacher())
    assert run.updates == EXPECTED[method.__name__]
    for name, network in run.networks.items():
        assert all(torch.isfinite(p).all() for p in network.module.parameters()), name
    assert all(torch.isfinite(torch.tensor(values)).all() for values in run.losses.values())


def test_a_loss_that_leaks_into_another_optimiser_is_seen():
    with pytest.raises(AssertionError, match="the loss of student leaked into critic"):
        train(toy_methods.Leaking(), data, teacher())


def test_unequal_yields_of_two_micro_batches_are_refused():
    with pytest.raises(RuntimeError, match="same_for_all"):
        train(toy_methods.Unequal(), data, teacher())
    train(toy_methods.Unequal(), data, teacher(), accumulate=1)


@pytest.mark.parametrize("name", ["consistency_distillation", "dmd2"])
def test_a_method_gives_the_same_losses_however_the_batch_is_accumulated(name):
    """One batch of 16, or two, or four of a part each: the global sample numbers are the same, so are the draws."""
    losses = []
    for accumulate in (1, 2, 4):
        run = train(
            methods.get(name)(),
            data,
            teacher("edm"),
            accumulate=accumulate,
            size=16 // accumulate,
            updates=3,
            optimizer=torch.optim.SGD,
            lr=1e-2,
        )
        losses.append(torch.tensor([loss for values in run.losses.values() for loss in values]))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=2e-4, atol=1e-6)  # float32 sums in another order


def test_progressive_copies_the_student_into_the_teacher_at_each_stage():
    method = toy_methods.Progressive()
    stages = list(method.stages())
    assert [stage.copies for stage in stages] == [{}, {"teacher": "student"}, {"teacher": "student"}]
    original = teacher()
    before = [p.clone() for p in original.parameters()]
    run = train(method, data, original)
    assert run.networks["teacher"].module is original
    assert any(not torch.equal(p, q) for p, q in zip(original.parameters(), before))


def test_an_average_follows_its_network_with_its_decay_and_is_not_trained():
    torch.manual_seed(0)
    method = methods.get("consistency_distillation")({"target_decay": 0.5, "nodes": 4})
    reference = teacher("edm")
    start = [p.clone() for p in reference.net.parameters()]
    run = train(method, data, reference, updates=1, accumulate=1)
    averages = run.networks["target"].module.net.parameters()
    for average, trained, began in zip(averages, run.networks["student"].module.net.parameters(), start):
        torch.testing.assert_close(average, 0.5 * began + 0.5 * trained)
        assert not average.requires_grad and average.grad is None
    assert run.updates == {"student": 1}


def build_with(networks, given=None, network=None):
    method = Method()
    method.networks = networks
    method.schedule, method.prediction = schedules.get("edm"), Prediction("edm")
    return build(method, given, network)


def test_networks_start_where_they_say():
    reference = teacher("edm")
    seen = {}

    def factory(built):
        seen.update(built)
        return nn.Linear(2, 1)

    built = build_with(
        {
            "student": NetworkSpec(),
            "fresh": NetworkSpec(start="random"),
            "copy": NetworkSpec(start="fresh", read_out="skip"),
            "mean": NetworkSpec(start="copy", average=Average(0.9)),
            "jump": NetworkSpec(read_out="jump"),
            "two times": NetworkSpec(read_out="jump", inputs=("x", "t", "s")),
            "plain": NetworkSpec(start=factory, read_out="plain"),
            "own": NetworkSpec(read_out=lambda net, schedule, prediction: nn.Sequential(net)),
        },
        reference,
    )
    same = [torch.equal(p, q) for p, q in zip(built["student"].net.parameters(), reference.net.parameters())]
    assert all(same) and built["student"].net is not reference.net and built["student"].prediction.kind == "edm"
    assert not torch.equal(built["fresh"].net.first.weight, reference.net.first.weight)
    assert torch.equal(built["copy"].net.first.weight, built["fresh"].net.first.weight)
    assert built["copy"].prediction.boundary == 0.002 and built["mean"].prediction.boundary == 0.002
    assert not any(p.requires_grad for p in built["mean"].parameters())
    assert isinstance(built["jump"], Jump) and not built["jump"].two_times
    assert built["two times"].two_times and built["two times"].net.config["inputs"] == ["s"]
    x, t = torch.randn(3, 2), torch.tensor([0.5, 3.0, 70.0])
    torch.testing.assert_close(built["two times"](x, t, t / 2), built["jump"](x, t, t / 2))  # until it is trained
    assert isinstance(built["plain"], nn.Linear) and {"teacher", "student", "jump"} <= set(seen)
    assert isinstance(built["own"], nn.Sequential)


@pytest.mark.parametrize(
    "networks,sentence",
    [
        ({"student": NetworkSpec()}, "starts from a teacher and the recipe names none"),
        ({"student": NetworkSpec(start="random")}, "give a `network:` section"),
        ({"student": NetworkSpec(start="techer")}, "start of network 'student' 'techer' is not known"),
        ({"mean": NetworkSpec(start="student", average=Average(0.9))}, "network that 'mean' averages"),
    ],
)
def test_a_network_that_cannot_start_is_one_sentence(networks, sentence):
    with pytest.raises(UserError, match=sentence):
        build_with(networks)


def test_an_unknown_read_out_names_the_choices():
    with pytest.raises(UserError, match=r"read-out 'skp' is not known \(did you mean 'skip'\?\)"):
        build_with({"student": NetworkSpec(read_out="skp")}, teacher("edm"))


def test_the_jump_is_the_identity_at_equal_times_and_ctms_form_where_alpha_is_one():
    net = MLP(2, inputs=("s",)).double()
    nn.init.normal_(net.last.weight)
    for name in ("edm", "vp", "flow", "trigflow"):
        jump = Jump(net, schedules.get(name), Prediction("x0"))
        x, t = torch.randn(5, 2, dtype=torch.float64), torch.linspace(0.2, 0.9, 5, dtype=torch.float64)
        torch.testing.assert_close(jump(x, t, t), x, rtol=1e-14, atol=1e-14)
        if name == "edm":
            ratio = 0.3 * torch.ones(5, 1, dtype=torch.float64)
            expected = ratio * x + (1 - ratio) * jump.clean(x, t, 0.3 * t)
            torch.testing.assert_close(jump(x, t, 0.3 * t), expected, rtol=1e-13, atol=1e-13)


def test_methods_are_found_by_name_and_an_unknown_one_names_the_choices():
    assert {"consistency_distillation", "denoising", "dmd2"} <= set(methods.names())
    assert methods.get("dmd2").name == "dmd2" and issubclass(methods.get("denoising"), Method)
    with pytest.raises(UserError, match=r"method 'dmd3' is not known \(did you mean 'dmd2'\?\).*denoising"):
        methods.get("dmd3")
    with pytest.raises(ValueError, match="two methods are called 'dmd2'"):
        methods.register("dmd2")(type("Other", (Method,), {}))


@pytest.mark.parametrize("name", methods.names())
def test_a_config_refuses_unknown_keys_describes_every_field_and_never_changes(name):
    config = methods.get(name).Config
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        config(gudance=3.0)
    for key, field in config.model_fields.items():
        assert field.description, f"{name}.{key} has no description"
    with pytest.raises(ValidationError, match="frozen"):
        first = next(iter(config.model_fields))
        setattr(config(), first, None)


def test_adam_takes_betas_written_as_whole_numbers():
    """torch 2.13's Adam refuses betas (0, 0.9)."""
    config = OptimizerConfig(betas=(0, 0.9))
    torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=config.lr, betas=config.betas)
    assert all(isinstance(beta, float) for beta in config.betas)


def test_a_batch_moves_and_splits_with_its_conditions():
    index = torch.arange(6)
    batch = Batch(index, torch.randn(6, 2), cond={"label": index, "text": (torch.randn(6, 3),)})
    moved = batch.to("cpu", torch.float64)
    assert moved.x0.dtype == torch.float64 and moved.cond["label"].dtype == torch.int64
    part = batch.part(2, 5)
    assert len(part) == 3 and part.cond["text"][0].shape == (3, 3) and part.index.tolist() == [2, 3, 4]
    assert part.null is None
