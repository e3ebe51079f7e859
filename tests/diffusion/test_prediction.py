"""Every prediction type reads out the same picture."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.diffusion import prediction, schedules
from fewstep.diffusion.prediction import KINDS, Prediction
from fewstep.errors import UserError

ALL = schedules.names()


def true_output(kind: str, x0: float, eps: float, alpha: float, sigma: float) -> float:
    """What a perfect network of each kind answers, from its definition."""
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "v":
        return alpha * eps - sigma * x0
    if kind == "flow":
        return eps - x0
    # EDM, in x/alpha: D = c_skip x + c_out F (2206.00364, table 1)
    tau, data = sigma / alpha, 0.5
    c_skip = data**2 / (tau**2 + data**2)
    c_out = tau * data / math.sqrt(tau**2 + data**2)
    return (x0 - c_skip * (x0 + tau * eps)) / c_out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_the_true_output_reads_out_the_true_picture_and_noise(name, kind):
    schedule, x0, eps = schedules.get(name), 0.37, -1.21
    for u in (0.05, 0.4, 0.9):
        t = schedule.t_min + u * (schedule.t_max - schedule.t_min)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x, output = alpha * x0 + sigma * eps, true_output(kind, x0, eps, alpha, sigma)
        of_x, of_output = Prediction(kind).coefficients(schedule, t)
        # eps divides by alpha, which cancels |x| against x0 by up to 80
        assert of_x * x + of_output * output == pytest.approx(x0, abs=1e-12)
        of_x, of_output = Prediction(kind).noise_coefficients(schedule, t)
        assert of_x * x + of_output * output == pytest.approx(eps, abs=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_the_boundary_read_out_is_the_identity_at_the_boundary(name, kind):
    schedule = schedules.get(name)
    e = schedule.t_min + 0.1 * (schedule.t_max - schedule.t_min)
    of_x, of_output = Prediction(kind, boundary=e).coefficients(schedule, e)
    assert of_x == pytest.approx(1.0, abs=1e-15) and of_output == pytest.approx(0.0, abs=1e-15)


def test_the_edm_boundary_read_out_is_the_consistency_papers():
    t, e, data = 1.3, 0.002, 0.5
    of_x, of_output = Prediction("edm", sigma_data=data, boundary=e).coefficients(schedules.get("edm"), t)
    assert of_x == pytest.approx(data**2 / ((t - e) ** 2 + data**2), rel=1e-14)
    assert of_output == pytest.approx(data * (t - e) / math.sqrt(t**2 + data**2), rel=1e-14)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_the_other_boundary_read_outs_are_ddims_jump(kind):
    schedule, x0, eps, t, e = schedules.get("vp"), 0.37, -1.21, 0.7, 0.05
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    of_x, of_output = Prediction(kind, boundary=e).coefficients(schedule, t)
    answer = of_x * (alpha * x0 + sigma * eps) + of_output * true_output(kind, x0, eps, alpha, sigma)
    assert answer == pytest.approx(schedule.alpha(e) * x0 + schedule.sigma(e) * eps, abs=1e-14)


def test_edm_scales_its_input_to_unit_variance_and_is_told_a_quarter_of_log_sigma():
    kind, schedule = Prediction("edm", sigma_data=0.5), schedules.get("edm")
    assert kind.input_scale(schedule, 3.0) == pytest.approx(1 / math.sqrt(9.25))
    assert kind.network_time(schedule, 3.0) == pytest.approx(math.log(3.0) / 4)
    # the same network serves a VP schedule: the same x/alpha at the same sigma/alpha asks it the same question
    other = schedules.get("vp")
    t = other.time_of_ratio(3.0)
    assert kind.network_time(other, t) == pytest.approx(math.log(3.0) / 4)
    assert kind.input_scale(other, t) * other.alpha(t) == pytest.approx(1 / math.sqrt(9.25))


def test_edm_prediction_on_trigflow_is_trigflows_own():
    schedule, t = schedules.get("trigflow", sigma_data=0.5), 0.9
    kind = Prediction("edm", sigma_data=0.5)
    assert kind.coefficients(schedule, t) == pytest.approx((math.cos(t), 0.5 * math.sin(t)))
    assert kind.input_scale(schedule, t) == pytest.approx(1 / 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boundary", [None, 0.01])
def test_coefficients_of_tensors_are_those_of_floats(kind, boundary):
    schedule, chosen = schedules.get("cosine"), Prediction(kind, boundary=boundary)
    times = [0.02, 0.4, 0.8]
    t = torch.tensor(times, dtype=torch.float64)
    for name in ("coefficients", "noise_coefficients"):
        floats = torch.tensor([getattr(chosen, name)(schedule, time) for time in times], dtype=torch.float64)
        torch.testing.assert_close(torch.stack(getattr(chosen, name)(schedule, t), -1), floats, rtol=1e-12, atol=1e-12)


def test_a_prediction_survives_its_description():
    chosen = Prediction("edm", sigma_data=0.7, boundary=0.002)
    assert prediction.from_dict(chosen.to_dict()) == chosen
    assert prediction.get("edm", sigma_data=0.7, boundary=0.002) == chosen


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: Prediction("epsilon"),
            "prediction 'epsilon' is not known (did you mean 'eps'?); choose one of: edm, eps",
        ),
        (lambda: Prediction("edm", sigma_data=0.0), "sigma_data=0.0; give a number above 0"),
        (lambda: prediction.get("edm", sigma=1.0), "option of prediction 'edm', 'sigma' is not known"),
        (lambda: prediction.from_dict({}), "a prediction needs a kind"),
        (lambda: Prediction("eps").coefficients(schedules.get("flow"), 1.0), "where alpha is zero (t=1.0"),
        (lambda: Prediction("edm").network_time(schedules.get("flow"), 1.0), "infinite at t=1.0"),
    ],
)
def test_a_mistake_is_one_sentence(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value)
