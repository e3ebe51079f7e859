"""Consistency distillation against the Gaussian's exact flow map and consistency function, in float64."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fewstep.diffusion import schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from fewstep.methods import Batch, Rng, build, get
from fewstep.methods.distances import Distance
from fewstep.methods.times import node_times
from fewstep.nets import Network
from fewstep.nets.mlp import MLP
from tests.methods.exact import MEAN, STD, GaussianDenoiser, gradients, root_of_gradient, time_column

SCHEDULES = ("edm", "vp", "flow", "trigflow")


def spread(schedule, t):
    """sqrt(q_t), the standard deviation of x_t."""
    return torch.sqrt(schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2)


class ExactConsistency(nn.Module):
    """f*(x, t), the exact flow to t_min, with a gain of 1 and a shift of 0 that can be trained away from t_min."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, cond=None):
        away = time_column((t - self.schedule.t_min) / (self.schedule.t_max - self.schedule.t_min), x)
        exact = flow(self.schedule, x, t, torch.full_like(t, self.schedule.t_min))
        return (1 + away * (self.gain - 1)) * exact + away * self.shift


def flow(schedule, x, t, s):
    """The exact probability-flow map of N(MEAN, STD^2) from t to s: it keeps (x - alpha MEAN) / spread."""
    t, s = time_column(t, x), time_column(s, x)
    return schedule.alpha(s) * MEAN + spread(schedule, s) / spread(schedule, t) * (x - schedule.alpha(t) * MEAN)


def method_on(schedule, student, **config):
    schedule = schedules.get(schedule) if isinstance(schedule, str) else schedule
    method = get("consistency_distillation")({"target_decay": 0.0, **config})
    method.schedule, method.prediction = schedule, Prediction("x0")
    method.teacher = Network(GaussianDenoiser(lambda cond: (MEAN, STD), schedule))
    method.student = Network(student)
    return method


def batch_of(n, seed=0, shape=(3,), **more):
    x0 = MEAN + STD * torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Batch(index=torch.arange(n), x0=x0, **more)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("distance", ["l2", "l1", "pseudo_huber"])
def test_the_exact_consistency_function_has_loss_and_gradient_zero(name, distance, monkeypatch):
    schedule = schedules.get(name)
    student = ExactConsistency(schedule)
    method = method_on(schedule, student, distance=distance, nodes=9)
    monkeypatch.setattr(method, "teacher_step", lambda x, t, s, cond=None: flow(schedule, x, t, s))
    loss = method.loss(batch_of(256), Rng(0, 0, torch.arange(256)))
    assert 0 <= float(loss.detach()) < 1e-12  # rounding of float64, through l1 at worst
    if distance != "l1":  # |.| has no gradient at 0 and rounding decides its sign
        assert gradients(loss, student).abs().max() < 1e-11
    with torch.no_grad():
        student.gain.mul_(1.1)
    assert gradients(method.loss(batch_of(256), Rng(0, 0, torch.arange(256))), student).abs().max() > 1e-4


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_euler_step_leaves_the_known_residual(name):
    """f*(x_s) - f*(x_t) = f* slope r (1 - cos dpsi): an Euler step turns r = x - alpha MEAN by cos dpsi, tan psi being
    sigma / (alpha STD), times the ratio of spreads that the exact map has alone.
    """
    schedule = schedules.get(name)
    method = method_on(schedule, ExactConsistency(schedule), solver="euler", distance="l1", nodes=9)
    batch = batch_of(64)
    t, s = method.neighbouring_times(batch, Rng(0, 0, batch.index))
    x_t, _ = method.noised(batch.x0, t, Rng(0, 0, batch.index))
    psi_t, psi_s = (torch.atan2(schedule.sigma(u), schedule.alpha(u) * STD) for u in (t, s))
    end = torch.full_like(t, schedule.t_min)
    slope = (spread(schedule, end) / spread(schedule, t))[:, None]
    residual = slope * (x_t - schedule.alpha(t)[:, None] * MEAN) * (1 - torch.cos(psi_t - psi_s))[:, None]
    loss = method.loss(batch, Rng(0, 0, batch.index))
    torch.testing.assert_close(loss.detach(), residual.abs().mean(), rtol=1e-9, atol=1e-13)


class AffinePerNode(nn.Module):
    """A slope and an intercept at every node but the last, where the student is the identity."""

    def __init__(self, schedule, nodes):
        super().__init__()
        self.register_buffer("nodes", torch.tensor(nodes, dtype=torch.float64))
        self.slope = nn.Parameter(torch.zeros(len(nodes) - 1, dtype=torch.float64))
        self.intercept = nn.Parameter(torch.zeros(len(nodes) - 1, dtype=torch.float64))

    def forward(self, x, t, cond=None):
        node = (t[:, None] - self.nodes).abs().argmin(1)
        slope = torch.cat([self.slope, torch.ones(1, dtype=torch.float64)])[node]
        intercept = torch.cat([self.intercept, torch.zeros(1, dtype=torch.float64)])[node]
        return slope[:, None] * x + intercept[:, None]


@pytest.mark.parametrize("solver,ratio", [("euler", 0.846086), ("heun", 1.055278)])
def test_the_best_affine_student_is_the_composite_of_the_solvers_steps(solver, ratio):
    """On EDM's 18 nodes (arXiv:2206.00364, equation 5) and std 0.5 the composite of the steps from t to t + h is 0.846
    (Euler: product of 1 + h k_t, k_t = t / (STD^2 + t^2)), 1.055 (Heun: 1 + h/2 (k_t + k_s (1 + h k_t))) of the exact.
    """
    schedule = schedules.get("edm")
    nodes = node_times(schedule, 18)
    student = AffinePerNode(schedule, nodes)
    method = method_on(schedule, student, solver=solver, distance="l2", nodes=18)
    batch = batch_of(512, shape=(2,))
    assert len(set(Rng(0, 0, batch.index).integers(batch, 0, 17, "node").tolist())) == 17
    root_of_gradient(lambda: method.loss(batch, Rng(0, 0, batch.index)), student)
    exact = math.sqrt((STD**2 + nodes[-1] ** 2) / (STD**2 + nodes[0] ** 2))
    assert float(student.slope[0].detach()) / exact == pytest.approx(ratio, abs=5e-7)  # the digits given
    start = torch.full((1, 1), nodes[0], dtype=torch.float64)
    answer = start
    for t, s in pairwise(nodes):
        answer = method.teacher_step(answer, torch.tensor([t]).double(), torch.tensor([s]).double())
    torch.testing.assert_close(student(start, start[0]).detach(), answer, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow", "edm"])
def test_the_skip_read_out_is_the_identity_at_t_min_bit_for_bit(name, kind):
    schedule = schedules.get(name, t_max=0.9) if name == "flow" else schedules.get(name)
    net = MLP(4).double()
    nn.init.normal_(net.last.weight)
    teacher = Denoiser(net, schedule, Prediction(kind))
    method = get("consistency_distillation")()
    method.schedule, method.prediction = schedule, teacher.prediction
    student = build(method, teacher)["student"]
    x = torch.randn(7, 4, dtype=torch.float64)
    end = torch.full((7,), schedule.t_min, dtype=torch.float64)
    assert tuple(student.prediction.coefficients(schedule, schedule.t_min)) == (1.0, 0.0)
    assert torch.equal(student(x, end), x)
    assert not torch.equal(student(x, 2 * end), x)
    assert teacher.prediction.boundary is None


def test_guidance_one_is_no_guidance_bit_for_bit_and_other_values_shift_the_mean():
    """Two Gaussians of one width, guided by w, are the Gaussian of mean m_u + w (m_c - m_u)."""
    schedule = schedules.get("edm")
    means = torch.tensor([-0.4, 0.9, 0.1], dtype=torch.float64)  # label 2 is the null condition

    def method_with(guidance):
        method = method_on(schedule, ExactConsistency(schedule), solver="heun", guidance=guidance)
        method.teacher = Network(GaussianDenoiser(lambda cond: (means[cond][:, None], STD), schedule))
        return method

    n = 8
    cond = torch.arange(n) % 2
    x_t = 3 * torch.randn(n, 2, dtype=torch.float64)
    t, s = torch.full((n,), 3.0, dtype=torch.float64), torch.full((n,), 1.0, dtype=torch.float64)
    plain = method_with(None).teacher_step(x_t, t, s, cond)
    assert torch.equal(method_with(1.0).teacher_step(x_t, t, s, cond), plain)
    w = 2.5
    shifted = means[2] + w * (means[cond] - means[2])
    expected = method_with(None)
    expected.teacher = Network(GaussianDenoiser(lambda _: (shifted[:, None], STD), schedule))
    guided = method_with(w).teacher_step(x_t, t, s, cond)
    torch.testing.assert_close(guided, expected.teacher_step(x_t, t, s, cond), rtol=1e-12, atol=1e-12)
    assert not guided.requires_grad


def test_both_answers_of_the_student_use_the_same_dropout_masks(monkeypatch):
    schedule = schedules.get("edm")
    net = MLP(3, width=64, dropout=0.5).double()
    nn.init.normal_(net.last.weight)
    nn.init.normal_(net.blocks[0].second.weight)
    student = Denoiser(net, schedule, Prediction("edm"))
    method = method_on(schedule, student, distance="l2")
    monkeypatch.setattr(method, "teacher_step", lambda x, t, s, cond=None: x)
    monkeypatch.setattr(method, "neighbouring_times", lambda batch, rng: (torch.full((16,), 2.0).double(),) * 2)
    torch.manual_seed(0)
    batch = batch_of(16)
    assert float(method.loss(batch, Rng(0, 0, batch.index)).detach()) == 0.0
    x = batch.x0
    assert not torch.equal(
        method.student.value(x, torch.ones(16).double()), method.student.value(x, torch.ones(16).double())
    )


def test_the_target_is_the_average_and_gets_no_gradient():
    schedule = schedules.get("edm")
    method = method_on(schedule, ExactConsistency(schedule), target_decay=0.9, distance="l2", nodes=5)
    assert method.networks["target"].average.decay == 0.9
    method.target = Network(ExactConsistency(schedule))
    batch = batch_of(32)
    loss = method.loss(batch, Rng(0, 0, batch.index))
    assert not gradients(loss, method.target.module).any() and gradients(loss, method.student.module).any()
    with torch.no_grad():
        method.target.module.shift.add_(1.0)
    assert not torch.equal(loss, method.loss(batch, Rng(0, 0, batch.index)))
    assert "target" not in get("consistency_distillation")({"target_decay": 0.0}).networks


def test_the_last_pair_of_nodes_ends_at_t_min_and_every_pair_is_drawn():
    schedule = schedules.get("edm")
    method = method_on(schedule, ExactConsistency(schedule), nodes=6)
    batch = batch_of(400)
    t, s = method.neighbouring_times(batch, Rng(0, 0, batch.index))
    nodes = node_times(schedule, 6)
    assert nodes[0] == 80.0 and nodes[-1] == 0.002
    assert {(round(a, 9), round(b, 9)) for a, b in zip(t.tolist(), s.tolist())} == {
        (round(a, 9), round(b, 9)) for a, b in pairwise(nodes)
    }


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_asks_as_often_as_it_says_and_levels_can_be_given(steps):
    schedule = schedules.get("edm")
    student = Denoiser(MLP(4), schedule, Prediction("edm", boundary=schedule.t_min))
    method = method_on(schedule, student)
    plan = method.sampling(steps)
    assert plan.evaluations == steps and plan.stages[0].time == 80.0
    given = {2: (80.0, 0.8)}
    chosen = method_on(schedule, student, levels=given).sampling(2)
    assert [stage.time for stage in chosen.stages] == [80.0, 0.8]
    with pytest.raises(UserError, match=r"method\.levels\.2"):
        method_on(schedule, student, levels={2: (0.8, 80.0)}).sampling(2)


def test_distances_are_their_formulas():
    a, b = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    norm = (a - b).flatten(1).norm(dim=1)
    torch.testing.assert_close(Distance(name="l2")(a, b), norm**2 / 8)
    torch.testing.assert_close(Distance(name="l1")(a, b), (a - b).abs().flatten(1).mean(1))
    huber = Distance(name="pseudo_huber", c=0.7)
    torch.testing.assert_close(huber(a, b), torch.sqrt(norm**2 + 0.49) - 0.7)
    assert Distance.model_validate("l1") == Distance(name="l1")
    small = huber(a, a + 1e-5)
    torch.testing.assert_close(small, torch.full_like(small, 8e-10 / 1.4), rtol=1e-9, atol=0)  # |d|^2 / 2c


@pytest.mark.parametrize("name", ["l1", "l2", "pseudo_huber"])
def test_distances_of_low_precision_answers_are_taken_in_float32(name):
    a, b = torch.randn(3, 500).bfloat16(), torch.randn(3, 500).bfloat16()
    found, exact = Distance(name=name)(a, b), Distance(name=name)(a.double(), b.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)  # some roundings of a float32 sum
