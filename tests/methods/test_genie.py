"""GENIE's head learns the teacher's derivative along its path, and second-order steps with it cost one call each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewstep
from fewstep import artefact, methods, nets, solvers
from fewstep.analytic import Gaussian
from fewstep.cli import main
from fewstep.diffusion import Denoiser, schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from fewstep.methods import Batch, Rng, get
from fewstep.methods.genie import Change
from fewstep.nets import Network
from fewstep.nets.genie import Genie
from fewstep.nets.lora import Lora
from tests.methods.driver import train

MEAN, STD = torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35
DATA = Gaussian(MEAN, STD)
RECIPE = Path(__file__).parents[2] / "recipes" / "digits_genie.yaml"
KINDS = [("vp", "eps"), ("edm", "edm"), ("flow", "flow"), ("trigflow", "v"), ("cosine", "x0")]


def exact(schedule, x, t):
    """gamma d eps/d gamma along the path on N(m, s^2): gamma s^2 (x/alpha - m)/(s^2 + gamma^2)^2."""
    alpha, gamma = schedule.alpha(t)[:, None], schedule.ratio(t)[:, None]
    return gamma * STD**2 * (x / alpha - MEAN) / (STD**2 + gamma**2) ** 2


def drawn(schedule, count=64):
    """Times with signal left, and states at them."""
    generator = torch.Generator().manual_seed(0)
    t = schedule.time_of_ratio(torch.logspace(-2, 1, count, dtype=torch.float64))
    noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    return schedule.add_noise(DATA.sample(count, generator), noise, t), t


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_target_is_the_closed_form_on_gaussian_data(name, kind):
    schedule = schedules.get(name)
    method = get("genie")()
    method.schedule, method.teacher = schedule, Network(DATA.teacher(schedule, kind))
    x, t = drawn(schedule)
    torch.testing.assert_close(method.change(x, t), exact(schedule, x, t), rtol=1e-8, atol=1e-10)


class Parts(torch.nn.Module):
    """A network whose k1, k2 and k3 share the exact derivative equally."""

    def __init__(self, schedule, kind):
        super().__init__()
        self.teacher, self.base = DATA.teacher(schedule, kind), torch.nn.Identity()

    def forward(self, x, told, cond=None):
        schedule, prediction = self.teacher.schedule, self.teacher.prediction
        t = prediction.time_of_network_time(schedule, told)
        state = x / torch.as_tensor(prediction.input_scale(schedule, t), dtype=x.dtype).reshape(-1, 1)
        gamma, share = schedule.ratio(t)[:, None], exact(schedule, state, t) / 3.0
        whole = 1.0 + gamma**2
        return torch.cat([self.teacher.raw(state, t), -share, whole / gamma**2 * share, whole * share], 1)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_loss_is_zero_for_the_exact_head_and_the_mean_square_of_what_a_silent_one_misses(name, kind):
    schedule = schedules.get(name)
    method = get("genie")({"times": {"name": "karras" if name != "flow" else "uniform", "low": 0.1, "high": 0.6}})
    method.schedule, method.teacher = schedule, Network(DATA.teacher(schedule, kind))
    index = torch.arange(64)
    batch = Batch(index, DATA.sample(64, torch.Generator().manual_seed(0)))
    method.student = Network(Change(Parts(schedule, kind), schedule, Prediction(kind)))
    assert float(method.loss(batch, Rng(0, 0, index))) < 1e-14

    class Silent(Parts):
        def forward(self, x, told, cond=None):
            return torch.cat([x, 0 * x, 0 * x, 0 * x], 1)

    method.student = Network(Change(Silent(schedule, kind), schedule, Prediction(kind)))
    rng = Rng(0, 0, index)
    t = method.config.times(schedule, rng.uniform(batch, "time")).double()
    x = schedule.add_noise(batch.x0, rng.normal(batch.x0, "noise"), t)
    expected = float(exact(schedule, x, t).square().mean())
    assert float(method.loss(batch, Rng(0, 0, index))) == pytest.approx(expected, rel=1e-6)


def test_at_pure_noise_the_derivative_is_finite():
    schedule = schedules.get("flow")
    method = get("genie")()
    method.schedule, method.teacher = schedule, Network(DATA.teacher(schedule, "flow"))
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    # D = m there, and moves by s^2 (x - m)/gamma^2: not at all
    torch.testing.assert_close(method.change(x, t), torch.zeros_like(x), rtol=0, atol=1e-12)
    student = Change(Genie(nets.build({"name": "mlp", "dim": 2}).double()).double(), schedule, "flow")
    assert student(x, t).isfinite().all()


class Teacher(torch.nn.Module):
    """The exact noise estimate, offering it and the state as what a last layer reads."""

    config = {"name": "mlp", "dim": 2, "width": 4}

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.weight = schedule, torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def hidden(self, x, t, cond=None):
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        return torch.cat([x, sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) * self.weight], 1)

    def answer(self, hidden):
        return hidden[:, 2:]

    def forward(self, x, t, cond=None):
        return self.answer(self.hidden(x, t))


def test_a_trained_head_nears_the_closed_form_and_its_steps_beat_ddims():
    schedule = schedules.get("vp")
    teacher = Denoiser(Teacher(schedule), schedule, "eps")
    method = get("genie")({"width": 32, "times": {"name": "uniform"}})

    def data(index):
        return Batch(index, DATA.sample(len(index), torch.Generator().manual_seed(int(index[0]))))

    run = train(method, data, teacher, updates=200, accumulate=1, size=128, lr=5e-3)
    student = run.networks["student"].module
    x, t = drawn(schedule, 256)
    wanted = exact(schedule, x, t)
    with torch.no_grad():
        missed = (student(x, t) - wanted).square().mean() / wanted.square().mean()
    assert float(missed) < 0.05
    assert float(student.net.base.weight) == 1.0 and student.net.base.weight.grad is None

    noise = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    last = schedule.time_of_half_log_snr(2.0)
    end = DATA.flow_map(schedule.sigma(schedule.t_max) * noise, schedule, schedule.t_max, last)
    for steps in (5, 10):
        grid = {"name": "log_snr", "end": last, "zero": "none"}
        plan = method.sampling(steps, grid=grid)
        assert plan.evaluations == steps
        plain = solvers.plan("ddim", schedule, steps, grid=grid, prediction="eps")
        ours = (solvers.sample(student, plan, noise) - end).norm(dim=1).mean()
        ddim = (solvers.sample(teacher, plain, noise) - end).norm(dim=1).mean()
        assert float(ours) < 0.7 * float(ddim)


def picture_teacher():
    net = nets.build({"name": "unet", "widths": [8, 16], "embedding": 16, "classes": 10})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return Denoiser(net, schedules.get("edm"), "edm")


def test_a_fresh_head_leaves_ddim():
    teacher = picture_teacher()
    method = get("genie")()
    method.schedule = teacher.schedule
    student = Change(Genie(teacher.net, width=16), teacher.schedule, teacher.prediction)
    method.student = Network(student)
    noise, cond = torch.randn(3, 1, 8, 8), torch.tensor([1, 4, 10])
    plain = solvers.plan("ddim", teacher.schedule, 4, prediction=teacher.prediction)
    expected = solvers.sample(teacher, plain, noise, cond)
    torch.testing.assert_close(solvers.sample(student, method.sampling(4), noise, cond), expected, rtol=1e-5, atol=1e-5)


def test_the_recipe_makes_an_artefact_that_samples(tmp_path, capsys):
    teacher = picture_teacher()
    plan = solvers.plan("euler", teacher.schedule, 4, prediction=teacher.prediction)
    folder = artefact.save(
        tmp_path / "teacher",
        denoiser=teacher,
        plans={4: plan},
        image_shape=(1, 8, 8),
        classes=10,
        provenance={},
        kind="teacher",
    )
    out = tmp_path / "genie"
    small = ["method.width=8", "method.steps=[2, 3]", "data.batch_size=16", "train.updates=3"]
    assert main(["distill", str(RECIPE), f"teacher={folder}", f"output={out}", *small]) == 0
    student = fewstep.load(out)
    assert student.steps_offered == (2, 3) and student.plan(3).evaluations == 3
    assert all(torch.equal(a, b) for a, b in zip(student.denoiser.net.base.parameters(), teacher.net.parameters()))
    assert student.denoiser.net.last.weight.abs().max() > 0  # it moved
    assert student.sample(2, cond=3, steps=3, seeds=0).isfinite().all()


def test_a_network_without_a_last_layer_to_read_is_one_sentence():
    with pytest.raises(UserError, match="DiT does not give it"):
        Genie({"name": "dit", "channels": 1, "image_size": 8, "width": 32, "depth": 1, "heads": 2})


@pytest.mark.parametrize("config", [{"name": "unet", "widths": [8, 16], "classes": 10}, {"name": "mlp", "dim": 64}])
def test_it_exports_for_any_batch(config):
    net = Genie(config, width=16).eval()
    with torch.no_grad():
        torch.nn.init.normal_(net.last.weight)
    batch = torch.export.Dim("batch", min=2, max=64)
    given = (torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 2, 3]))
    program = torch.export.export(net, given, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    other = (torch.randn(5, 1, 8, 8), torch.rand(5), torch.arange(5))
    torch.testing.assert_close(program.module()(*other), net(*other))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 50}, "width=50 and blocks=1; give a multiple of 16"),
        ({"width": 0}, "width=0"),
        ({"blocks": -1}, "blocks=-1"),
        ({"base": "unet"}, "got 'unet'; give a mapping"),
    ],
)
def test_a_head_that_cannot_be_is_one_sentence(options, words):
    """As a recipe's method.width, and in an artefact."""
    with pytest.raises(UserError, match=words):
        nets.build({"name": "genie", "base": {"name": "unet"}, **options})


def test_a_head_takes_no_adapter():
    teacher = Denoiser(nets.build({"name": "mlp", "dim": 4}), schedules.get("flow"), "flow")
    method = get("genie")({})
    method.schedule, method.prediction = teacher.schedule, teacher.prediction
    with pytest.raises(UserError, match="'student' starts from what its method makes"):
        methods.build(method, teacher, None, {"student": Lora()})
