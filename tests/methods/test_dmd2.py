"""DMD2 on the Gaussian kit: its gradient is the KL's, its fixed point the teacher's law, its simulation exact."""

import math

import pytest
import torch

from fewstep.diffusion import schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.methods import Batch, Rng, build, get
from fewstep.methods.critic import Critic, matching_direction, pseudo_target_loss
from fewstep.methods.times import TimeLaw
from fewstep.nets import Network
from fewstep.nets.mlp import MLP
from fewstep.solvers import execute
from tests.methods.driver import attach, train
from tests.methods.exact import MEAN, STD, Affine, GaussianDenoiser, Moments, design_batch, gradients, root_of_gradient

ORDER = ("start", "matching noise", "fake noise")


def kit(schedule_name, slope, intercept, quantile=0.5, **config):
    """A student a z + b of a standard normal start, the exact critic of its law, and the teacher N(MEAN, STD^2)."""
    schedule = schedules.get(schedule_name)
    law = TimeLaw(name="uniform" if schedule_name == "flow" else "karras", low=quantile, high=quantile)
    method = get("dmd2")({"steps": (1,), "gan_weight": 0.0, "times": law, "critic_times": law, **config})
    method.schedule, method.prediction = schedule, Prediction("x0")
    student = Affine(slope, intercept, schedule, method.prediction, scale=schedule.sigma(schedule.t_max))
    method.student = Network(student)
    method.teacher = Network(GaussianDenoiser(lambda cond: (MEAN, STD), schedule))
    live = GaussianDenoiser(
        lambda cond: (student.intercept.detach(), student.slope.detach()), schedule, method.prediction
    )
    method.critic = Network(live)
    t = float(law(schedule, torch.tensor([quantile], dtype=torch.float64)))
    return method, student, float(schedule.alpha(t)), float(schedule.sigma(t))


def student_gradient(method, student, batch=None):
    update = next(method.iteration(batch or design_batch(), Moments(order=ORDER)))
    assert update.network == "student"
    return gradients(update.loss, student)


@pytest.mark.parametrize("name,quantile", [("edm", 0.3), ("edm", 0.7), ("vp", 0.5), ("trigflow", 0.4), ("flow", 0.6)])
def test_the_students_gradient_is_the_gradient_of_the_kl_divergence(name, quantile):
    """E[(D_fake - D) dg] = sigma^2/alpha^2 d KL(q_t || p_t) with the critic exact, no normaliser and no adversary."""
    a, b = 1.3, -0.2
    method, student, alpha, sigma = kit(name, a, b, quantile, normalise=False)
    v_q, v_p = alpha**2 * a**2 + sigma**2, alpha**2 * STD**2 + sigma**2
    kl = torch.tensor([alpha**2 * a * (1 / v_p - 1 / v_q), alpha**2 * (b - MEAN) / v_p], dtype=torch.float64)
    found = student_gradient(method, student)
    torch.testing.assert_close(found, sigma**2 / alpha**2 * kl, rtol=1e-10, atol=1e-13)  # moments are exact: rounding


def test_the_teachers_law_is_the_fixed_point_whatever_the_sign_of_the_noise():
    for slope in (STD, -STD):
        for normalise in (True, False):
            method, student, *_ = kit("edm", slope, MEAN, normalise=normalise)
            assert student_gradient(method, student).abs().max() < 1e-14
    method, student, *_ = kit("edm", STD * 1.05, MEAN)
    assert student_gradient(method, student).abs().max() > 1e-3


@pytest.mark.parametrize("normalise", [True, False])
def test_descent_reaches_the_teachers_law(normalise):
    method, student, *_ = kit("edm", 2.0, -1.0, quantile=0.45, normalise=normalise)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        next(method.iteration(design_batch(), Moments(order=ORDER))).loss.backward()
        optimizer.step()
    assert float(student.slope.detach()) == pytest.approx(STD, abs=1e-6)
    assert float(student.intercept.detach()) == pytest.approx(MEAN, abs=1e-6)


def test_guidance_moves_the_real_score_only():
    """With labels of one width the guided teacher is the Gaussian of mean m_u + w (m_c - m_u)."""
    a, b, w = 0.9, 0.4, 3.0
    means = torch.tensor([-0.4, 0.8, 0.1], dtype=torch.float64)
    cond = torch.ones(4, dtype=torch.int64)
    method, student, alpha, sigma = kit("edm", a, b, normalise=False, guidance=w)
    method.teacher = Network(GaussianDenoiser(lambda c: (means[c][:, None], STD), method.schedule))
    guided_mean = float(means[2] + w * (means[1] - means[2]))
    found = student_gradient(method, student, design_batch(cond=cond))
    expected = sigma**2 * (b - guided_mean) / (alpha**2 * STD**2 + sigma**2)
    assert float(found[1]) == pytest.approx(expected, rel=1e-12)
    plain, student, *_ = kit("edm", a, b, normalise=False, guidance=1.0)
    plain.teacher = Network(GaussianDenoiser(lambda c: (means[c][:, None], STD), plain.schedule))
    expected = sigma**2 * (b - 0.8) / (alpha**2 * STD**2 + sigma**2)
    assert float(student_gradient(plain, student, design_batch(cond=cond))[1]) == pytest.approx(expected, rel=1e-12)


def test_the_pseudo_target_gives_the_direction_as_gradient():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    h = torch.randn_like(x)
    (found,) = torch.autograd.grad(pseudo_target_loss(x, h), x)
    torch.testing.assert_close(found, h / x.numel(), rtol=1e-15, atol=1e-16)


def test_the_normaliser_makes_the_direction_independent_of_the_scale():
    generator = torch.Generator().manual_seed(0)
    x, u, v = (torch.randn(4, 3, 2, dtype=torch.float64, generator=generator) for _ in range(3))
    scale = torch.tensor([1e-3, 1.0, 7.0, 1e4], dtype=torch.float64)[:, None, None]
    reference = matching_direction(x, x + v, x + u)
    found = matching_direction(x, x + scale * v, x + scale * u)
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=0)
    expected = (v - u) / u.abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(reference, expected)
    torch.testing.assert_close(matching_direction(x, x + v, x + u, normalise=False), v - u)
    assert not matching_direction(x, x, x).any() and torch.isfinite(matching_direction(x, x + v, x)).all()


@pytest.mark.parametrize("name", ["edm", "vp", "flow"])
def test_the_critics_optimum_is_the_denoiser_of_the_students_law(name):
    """Denoising score matching on a z + b, over denoisers affine in x_t at one time."""
    a, b = 1.3, -0.2
    method, _, alpha, sigma = kit(name, a, b)
    critic = Affine(0.0, 0.0, method.schedule, Prediction("eps"))
    method.critic = Network(critic)
    rng = Moments(step=1, order=ORDER)

    def loss():
        update = next(method.iteration(design_batch(), rng))
        assert update.network == "critic"
        return update.loss

    root_of_gradient(loss, critic)
    gain = alpha * a**2 / (alpha**2 * a**2 + sigma**2)
    assert float(critic.slope.detach()) == pytest.approx(gain, rel=1e-9)
    assert float(critic.intercept.detach()) == pytest.approx(b - gain * alpha * b, rel=1e-9)


def test_critic_times_and_the_students_times_follow_their_laws():
    schedule = schedules.get("edm")
    x0 = torch.zeros(4000, 1, dtype=torch.float64)
    judge = Critic(Network(Affine(1.0, 0.0, schedule, Prediction("edm"))), TimeLaw())
    _, all_levels = judge.diffused(x0, Rng(0, 0, torch.arange(4000)), "a")
    _, inner = judge.diffused(x0, Rng(0, 0, torch.arange(4000)), "a", TimeLaw(low=0.02, high=0.98))

    def quantile(t):
        ends = 0.002 ** (1 / 7), 80 ** (1 / 7)
        return (t ** (1 / 7) - ends[0]) / (ends[1] - ends[0])

    assert quantile(all_levels).min() < 0.01 and quantile(all_levels).max() > 0.99
    assert quantile(inner).min() >= 0.02 - 1e-12 and quantile(inner).max() <= 0.98 + 1e-12
    assert abs(float(quantile(inner).mean()) - 0.5) < 5 * math.sqrt(0.96**2 / 12 / 4000)  # five standard errors


def toy(**config):
    torch.manual_seed(0)
    teacher = Denoiser(MLP(2, classes=3), schedules.get("edm"), Prediction("edm"))
    torch.nn.init.normal_(teacher.net.last.weight, std=0.1)
    return get("dmd2")(config), teacher


def labelled(index):
    generator = torch.Generator().manual_seed(int(index[0]))
    return Batch(index, 0.5 * torch.randn(len(index), 2, generator=generator), index % 3, torch.full_like(index, 3))


def test_the_critic_is_updated_every_iteration_and_the_student_every_fifth():
    method, teacher = toy(guidance=2.0)
    run = train(method, labelled, teacher, updates=6)
    assert run.order == ["student", "critic", *["critic"] * 4, "student", "critic"]
    assert run.updates == {"student": 2, "critic": 6}
    before = {name: [p.clone() for p in network.module.parameters()] for name, network in attach(*toy()).items()}
    for name in ("student", "critic", "head"):
        moved = [not torch.equal(p, q) for p, q in zip(run.networks[name].module.parameters(), before[name])]
        assert any(moved) if name != "head" else moved  # the head starts at random: only that it exists
    assert all(torch.equal(p, q) for p, q in zip(run.networks["teacher"].module.parameters(), before["teacher"]))


def test_the_critic_trains_on_the_samples_made_before_the_students_update():
    losses = []
    for disturb in (False, True):
        method, teacher = toy()
        attach(method, teacher)
        batch = labelled(torch.arange(8))
        generator = method.iteration(batch, Rng(0, 0, batch.index))
        next(generator)
        if disturb:
            with torch.no_grad():
                for parameter in method.student.module.parameters():
                    parameter.add_(1.0)
        torch.manual_seed(1)
        losses.append(float(next(generator).loss.detach()))
    assert losses[0] == losses[1]


def test_without_adversary_there_is_no_head_and_with_one_it_shares_the_critics_engine():
    assert set(get("dmd2")({"gan_weight": 0.0}).networks) == {"student", "critic"}
    networks = get("dmd2")().networks
    assert networks["head"].engine == "critic" and networks["head"].read_out == "plain"
    method, teacher = toy()
    built = build(method_with(method, teacher), teacher)
    assert built["head"].last.in_features == 64 and "teacher" not in built


def method_with(method, teacher):
    method.schedule, method.prediction = teacher.schedule, teacher.prediction
    return method


def test_the_adversarial_losses_are_added_with_their_weights():
    def run(**config):
        method, teacher = toy(**config)
        attach(method, teacher)
        batch = labelled(torch.arange(8))
        return [(u.loss.detach(), u.log) for u in method.iteration(batch, Rng(0, 0, batch.index))]

    (student, log), (critic, critic_log) = run(gan_weight=0.2, discriminator_weight=0.3)
    torch.testing.assert_close(student, log["matching"] + 0.2 * log["adversarial"])
    torch.testing.assert_close(critic, critic_log["denoising"] + 0.3 * critic_log["telling"])
    (student, plain), (critic, plain_critic) = run(gan_weight=0.0)
    assert torch.equal(student, plain["matching"]) and "adversarial" not in plain
    torch.testing.assert_close(plain["matching"], log["matching"])
    torch.testing.assert_close(plain_critic["denoising"], critic_log["denoising"])
    assert torch.equal(critic, plain_critic["denoising"])


def test_the_adversarys_gradient_reaches_the_student_and_the_critics_reaches_critic_and_head():
    method, teacher = toy(gan_weight=1.0)
    networks = attach(method, teacher)
    batch = labelled(torch.arange(8))
    updates = method.iteration(batch, Rng(0, 0, batch.index))
    reached = []
    for update in updates:
        update.loss.backward()
        moved = {
            n for n, w in networks.items() if any(p.grad is not None and p.grad.any() for p in w.module.parameters())
        }
        reached.append((update.network, moved))
        for network in networks.values():
            network.module.zero_grad(set_to_none=True)
    assert reached == [("student", {"student"}), ("critic", {"critic", "head"})]


class Sampler(torch.nn.Module):
    """A perfect student: from any level its answer has the data's law, by the exact flow to the clean end."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.met = schedule, []

    def forward(self, x, t, cond=None):
        # for prediction "x0" on the edm schedule the network's own time and input are t and x
        self.met.append((float(t[0]), x.clone()))
        return MEAN + STD / torch.sqrt(STD**2 + t[:, None] ** 2) * (x - MEAN)


def test_backward_simulation_meets_the_levels_of_the_sampler_with_the_law_of_noised_data():
    schedule = schedules.get("edm")
    method = get("dmd2")({"steps": (1, 2, 4)})
    method.schedule, method.prediction = schedule, Prediction("x0")
    sampler = Sampler(schedule)
    method.student = Network(Denoiser(sampler, schedule, Prediction("x0")))
    n, index = 4000, torch.arange(4000)
    answers = [method.generated(Batch(index, torch.zeros(n, 1)), Rng(0, step, index), "none")[0] for step in range(60)]
    for answer in answers:  # whatever the branch, the answer has the data's law
        assert float(answer.mean()) == pytest.approx(MEAN, abs=5 * STD / math.sqrt(n))
    met = dict(sampler.met)
    levels = {t for steps in (1, 2, 4) for t in method.sampling(steps).times[:-1]}
    assert sorted(met) == pytest.approx(sorted(levels), rel=1e-6)
    for t, x_t in met.items():
        if t == 80.0:
            assert float(x_t.std()) == pytest.approx(80.0, rel=5 / math.sqrt(2 * n))  # the start is noise alone
            continue
        spread = math.sqrt(STD**2 + t**2)
        assert float(x_t.mean()) == pytest.approx(MEAN, abs=5 * spread / math.sqrt(n))  # five standard errors
        assert float(x_t.std()) == pytest.approx(spread, rel=5 / math.sqrt(2 * n))


def test_only_the_last_call_of_the_simulation_has_a_gradient_and_it_goes_through_the_engine():
    method, teacher = toy(steps=(4,), gan_weight=0.0)
    attach(method, teacher)
    module, through_engine = method.student.module, []

    def engine(*given, **named):
        through_engine.append(torch.is_grad_enabled())
        return module(*given, **named)

    method.student = Network(module, engine)
    batch = labelled(torch.arange(8))
    lengths = set()
    for step in range(0, 40, 5):
        through_engine.clear()
        x, _ = method.generated(batch, Rng(0, step, batch.index), "last")
        assert x.requires_grad and through_engine == [True]
        lengths.add(Rng(0, step, batch.index).same_for_all(0, 4))
    assert len(lengths) > 1
    through_engine.clear()
    assert not method.generated(batch, Rng(0, 1, batch.index), "none")[0].requires_grad and not through_engine


def test_a_student_that_serves_four_steps_is_asked_exactly_where_the_simulation_trained_it():
    method, teacher = toy(steps=(1, 2, 4))
    attach(method, teacher)
    plans = {steps: method.sampling(steps) for steps in (1, 2, 4)}
    assert {steps: plan.evaluations for steps, plan in plans.items()} == {1: 1, 2: 2, 4: 4}
    assert all(plan.times[0] == 80.0 and plan.stages[-1].target == 0.0 for plan in plans.values())
    batch = labelled(torch.arange(16))
    branches = [(k, i) for k in (1, 2, 4) for i in range(k)]
    met = set()
    for step in range(24):
        rng, keys = Rng(0, step, batch.index), Rng(0, step, batch.index)
        steps, n = branches[keys.same_for_all(0, 7)]
        noise, seeds = keys.normal(batch.x0, "start"), keys.seeds("renoise")
        whole = execute(plans[steps], method.student, noise, cond=batch.cond, seeds=seeds, record=("denoised",))
        torch.testing.assert_close(method.generated(batch, rng, "none")[0], whole.recorded["denoised"][n])
        met.add((steps, n))
    assert met == set(branches)


@pytest.mark.parametrize("gan_weight", [0.0, 0.1])
def test_a_critic_that_sees_the_level_is_told_where_the_student_answered_in_every_call(gan_weight):
    method, teacher = toy(steps=(1, 2, 4), gan_weight=gan_weight, critic_sees_level=True, critic_updates=2)
    attach(method, teacher)
    heard = []
    method.critic.module.register_forward_pre_hook(
        lambda _module, _given, named: heard.append(named["s"]), with_kwargs=True
    )
    batch = labelled(torch.arange(8))
    branches = [(k, i) for k in (1, 2, 4) for i in range(k)]
    for step in range(12):
        heard.clear()
        rng, keys = Rng(0, step, batch.index), Rng(0, step, batch.index)
        steps, n = branches[keys.same_for_all(0, 7)]
        updates = [update.network for update in method.iteration(batch, rng)]
        level = method.sampling(steps).stages[n].network_time
        calls = (step % 2 == 0) + (2 if gan_weight else 1)  # the student's turn; fakes; reals
        assert updates == (["student", "critic"] if step % 2 == 0 else ["critic"]) and len(heard) == calls
        assert all(torch.equal(s, torch.full((8,), level)) for s in heard)


def test_a_critic_that_sees_the_level_starts_as_the_teacher_and_learns_to_use_it():
    method, teacher = toy(steps=(1, 2), gan_weight=0.0, critic_sees_level=True)
    for block in teacher.net.blocks:
        torch.nn.init.normal_(block.second.weight, std=0.1)  # a teacher that listens to its conditioning
    attach(method, teacher)
    x, t, s = torch.randn(8, 2), torch.full((8,), 1.0), torch.full((8,), 0.5)
    cond = torch.arange(8) % 3
    torch.testing.assert_close(method.critic(x, t, cond, s=s), method.teacher(x, t, cond))
    method.critic(x, t, cond, s=s).square().sum().backward()
    assert any(p.grad.abs().sum() > 0 for n, p in method.critic.module.named_parameters() if "scalars" in n)
