"""Teacher training: its optimum is the exact denoiser, its weight makes the error plain in the network's own output."""

import pytest
import torch

from fewstep.diffusion import schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.methods import Batch, Rng, get
from fewstep.methods.distances import output_weight
from fewstep.methods.times import TimeLaw
from fewstep.nets import Network
from fewstep.nets.mlp import MLP
from tests.methods.driver import train
from tests.methods.exact import MEAN, STD, Affine, GaussianDenoiser, Moments, design_batch, root_of_gradient


class SecondPattern(Moments):
    """Noise uncorrelated with the data of `design_batch`, which takes the first pattern."""

    def normal(self, like, purpose):
        return torch.tensor(self.patterns[1], dtype=torch.float64)[:, None].expand(like.shape).clone()


def method_on(schedule, kind, student, quantile):
    law = TimeLaw(name="uniform", low=quantile, high=quantile)
    method = get("denoising")({"times": law, "condition_dropout": 0.0})
    method.schedule, method.prediction = schedule, Prediction(kind)
    method.student = Network(student)
    return method, float(law(schedule, torch.tensor([0.5], dtype=torch.float64)))


@pytest.mark.parametrize(
    "name,kind", [("edm", "edm"), ("vp", "eps"), ("cosine", "v"), ("flow", "flow"), ("trigflow", "x0")]
)
@pytest.mark.parametrize("quantile", [0.02, 0.5, 0.9])
def test_the_best_affine_teacher_is_the_exact_denoiser(name, kind, quantile):
    schedule = schedules.get(name)
    student = Affine(0.0, 0.0, schedule)
    method, t = method_on(schedule, kind, student, quantile)
    root_of_gradient(lambda: method.loss(design_batch(), SecondPattern()), student)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)  # of the posterior mean
    assert float(student.slope.detach()) == pytest.approx(gain, rel=1e-8)
    assert float(student.intercept.detach()) == pytest.approx(MEAN - gain * alpha * MEAN, rel=1e-8)


@pytest.mark.parametrize("quantile", [1e-4, 0.01, 0.3, 1.0])
def test_with_data_of_edms_own_width_the_exact_denoisers_loss_is_one_at_every_level(quantile):
    """lambda(sigma) E|D - x0|^2 = 1 for N(0, sigma_data^2), lambda as in arXiv:2206.00364, equation 8 and table 1."""
    schedule = schedules.get("edm")
    exact = GaussianDenoiser(lambda cond: (0.0, 0.5), schedule)
    method, _ = method_on(schedule, "edm", exact, quantile)
    loss = method.loss(design_batch(mean=0.0, std=0.5), SecondPattern())
    assert float(loss.detach()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", ["edm", "vp", "flow", "cosine", "trigflow"])
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow", "edm"])
def test_the_weighted_error_is_the_plain_error_of_the_networks_own_output(name, kind):
    schedule, prediction = schedules.get(name), Prediction(kind)
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.linspace(0.05, 0.9, 8, dtype=torch.float64)
    c_x, c_out = (torch.as_tensor(c, dtype=t.dtype).expand(8) for c in prediction.coefficients(schedule, t))
    x_t, output, x0 = torch.randn(3, 8, dtype=torch.float64)
    wanted = (x0 - c_x * x_t) / c_out  # the output that gives x0
    weighted = output_weight(schedule, prediction, t) * (c_x * x_t + c_out * output - x0) ** 2
    torch.testing.assert_close(weighted, (output - wanted) ** 2, rtol=1e-7, atol=1e-12)


def test_the_weight_ignores_the_students_boundary():
    schedule = schedules.get("edm")
    t = torch.tensor([0.5, 3.0], dtype=torch.float64)
    plain, skip = Prediction("edm"), Prediction("edm", boundary=0.002)
    assert torch.equal(output_weight(schedule, plain, t), output_weight(schedule, skip, t))
    torch.testing.assert_close(output_weight(schedule, plain, t), (t**2 + 0.25) / (t * 0.5) ** 2)


def test_log_sigma_is_normal_for_edm_and_within_the_schedules_times():
    method, _ = method_on(schedules.get("edm"), "edm", MLP(1), 0.5)
    method.config = method.Config()
    n = 20_000
    t = method.time_law()(method.schedule, Rng(0, 0, torch.arange(n)).uniform(None, "time"))
    inside = t[(t > 0.002) & (t < 80.0)].log()
    assert (
        abs(float(inside.mean()) + 1.2) < 5 * 1.2 / n**0.5 and abs(float(inside.std()) / 1.2 - 1) < 5 / (2 * n) ** 0.5
    )
    assert t.min() >= 0.002 and t.max() <= 80.0
    method.prediction, method.schedule = Prediction("flow"), schedules.get("flow")
    assert method.time_law().name == "uniform"
    method.prediction, method.schedule = Prediction("eps"), schedules.get("vp")
    assert method.time_law().name == "karras"


def test_condition_dropout_puts_the_null_condition_in_its_share_of_the_samples_and_nothing_else():
    method, _ = method_on(schedules.get("edm"), "edm", Denoiser(MLP(1, classes=10), schedules.get("edm"), "edm"), 0.5)
    n = 10_000
    cond = torch.arange(n) % 10
    dropped = method.condition_dropout(cond, 0.1, Rng(0, 0, torch.arange(n)), method.student)
    null = dropped == 10
    assert torch.equal(dropped[~null], cond[~null])
    assert abs(float(null.float().mean()) - 0.1) < 5 * (0.1 * 0.9 / n) ** 0.5  # five standard errors
    assert method.condition_dropout(cond, 0.0, Rng(0, 0, torch.arange(n)), method.student) is cond
    both = method.condition_dropout(
        (cond, cond.float()[:, None]), 0.5, Rng(0, 1, torch.arange(n)), Network(TwoConditions())
    )
    assert torch.equal(both[0] < 0, both[1][:, 0] < 0) and 0.4 < (both[0] < 0).float().mean() < 0.6


class TwoConditions(torch.nn.Module):
    def null(self, cond):
        return tuple(torch.full_like(value, -1) for value in cond)


def test_training_a_small_network_lowers_the_loss_to_the_exact_denoisers():
    """A whole training run, 600 updates: the gap to the analytic optimum must close to a tenth of what it was."""
    method = get("denoising")({"condition_dropout": 0.0, "times": {"name": "karras", "low": 0.2, "high": 0.8}})
    schedule = schedules.get("edm")
    method.schedule, method.prediction = schedule, Prediction("edm")

    def data(index):
        generator = torch.Generator().manual_seed(int(index[0]))
        return Batch(index, MEAN + 0.1 * torch.randn(len(index), 2, generator=generator))

    run = train(method, data, None, network=lambda: MLP(2, width=32), updates=400, accumulate=1, size=128, lr=3e-3)
    exact = get("denoising")(method.config)
    exact.schedule, exact.prediction = schedule, method.prediction
    exact.student = Network(GaussianDenoiser(lambda cond: (MEAN, 0.1), schedule))
    index = torch.arange(4096) + 10**6
    floor, start = float(exact.loss(data(index), Rng(1, 0, index)).detach()), run.losses["student"][0]
    end = float(method.loss(data(index), Rng(1, 0, index)).detach())
    assert floor < end < floor + 0.1 * (start - floor)
