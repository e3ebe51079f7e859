"""A stage may read more than one network's one answer: heads, further networks, several conditions, or nobody."""

from __future__ import annotations

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import Denoiser, schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from fewstep.solvers import Plan
from fewstep.solvers.compiling import compiled
from fewstep.solvers.plans import Row

EDM = schedules.get("edm")
START = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).flatten(1)
COND = torch.tensor([0.1, -0.3, 0.2, 0.4], dtype=torch.float64)


def made(rows, guidance=None, kind="x0") -> Plan:
    plan = compiled("try", EDM, Prediction(kind), rows, guidance=guidance or [None] * 9, initial_scale=1.0, options={})
    assert Plan.from_json(plan.to_json()) == plan
    return plan


def net(x, t, cond=None):
    return torch.sin(x + (0.0 if cond is None else cond[:, None])) + t[:, None]


def heads(x, t, cond=None):
    """Two further answers, told apart from the prediction by sign and size."""
    value = net(x, t, cond)
    return value, 2.0 * value.cos(), -3.0 * value


HEADED = [
    Row(2.0, 1.0, {"x": {"x": 0.5, "D": 0.25, "k1": 0.5, "k2": 2.0}}, 0, answers=("k1", "k2")),
    Row(1.0, 0.5, {"x": {"x": 1.0, "k2": 1.0}}, 1, answers=("k1", "k2")),
]


@pytest.mark.parametrize("gradient", ["none", "all"])
@pytest.mark.parametrize("answer", [heads, lambda x, t, c=None: torch.cat(heads(x, t, c), 1)])
def test_a_network_may_answer_more_than_its_prediction(answer, gradient):
    plan = made(HEADED)
    assert [stage.columns for stage in plan.stages] == [("cond", "k1", "k2")] * 2 and plan.evaluations == 2
    first, second, third = heads(START, torch.full((4,), 2.0, dtype=torch.float64))
    x = 0.5 * START + 0.25 * first + 0.5 * second + 2.0 * third
    expected = x + heads(x, torch.ones(4, dtype=torch.float64))[2]
    found = solvers.execute(plan, answer, START, gradient=gradient).x
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_what_a_network_answers_beside_its_prediction_is_guided_as_that_is():
    plan = made(HEADED[:1], guidance=[3.0])
    given, null = heads(START, torch.full((4,), 2.0), COND), heads(START, torch.full((4,), 2.0), 0 * COND)
    first, second, third = (u + 3.0 * (c - u) for c, u in zip(given, null))
    expected = 0.5 * START + 0.25 * first + 0.5 * second + 2.0 * third
    found = solvers.sample(heads, plan, START, COND, uncond=0 * COND)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_a_further_network_is_asked_by_its_role():
    rows = [Row(2.0, 1.0, {"x": {"x": 0.5, "D": 0.25, "h1": 1.0, "h2": -1.0}}, 0, others={"head": ("h1", "h2")})]
    plan = made(rows, kind="edm")
    assert plan.roles == ("head",) and plan.evaluations == 2
    denoiser = Denoiser(torch.nn.Identity(), EDM, "edm")
    denoiser.net.forward = net
    scale = float(denoiser.prediction.input_scale(EDM, 2.0))
    told = torch.full((4,), float(denoiser.prediction.network_time(EDM, 2.0)), dtype=torch.float64)
    _, one, two = heads(scale * START, told)
    expected = 0.5 * START + 0.25 * denoiser(START, 2.0) + one - two
    found = solvers.execute(plan, denoiser, START, others={"head": lambda x, t: heads(x, t)[1:]}).x
    # the state is multiplied by 1 at the start of a plan and not by sigma
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    with pytest.raises(UserError, match="asks a network in the role 'head' and got none"):
        solvers.sample(denoiser, plan, START)


@pytest.mark.parametrize("kind", ["x0", "edm"])
def test_a_row_without_estimates_asks_nobody(kind):
    calls = []

    def counted(x, t):
        calls.append(x)
        return net(x, t)

    rows = [
        Row(3.0, 2.0, {"x": {"x": 0.7}, "base": {"x": 1.0}}, 0),
        Row(2.0, 1.0, {"x": {"x": 0.5, "D": 0.25, "base": 0.125}}, 1),
        Row(1.0, 0.5, {"x": {"x": 2.0}}, 2),
    ]
    plan = made(rows, kind=kind)
    assert plan.evaluations == 1 and [stage.conditions for stage in plan.stages] == [(), ("cond",), ()]
    of_x, of_output = (float(value) for value in plan.prediction.coefficients(EDM, 2.0))
    scale, told = float(plan.prediction.input_scale(EDM, 2.0)), float(plan.prediction.network_time(EDM, 2.0))
    x = 0.7 * START
    clean = of_x * x + of_output * net(scale * x, torch.full((4,), told, dtype=torch.float64))
    expected = 2.0 * (0.5 * x + 0.25 * clean + 0.125 * START)
    for gradient in ("none", "all"):
        run = solvers.execute(plan, counted, START, gradient=gradient, record=("denoised", "x"))
        torch.testing.assert_close(run.x, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(run.recorded["denoised"][1], clean, rtol=0, atol=1e-13)
        assert len(run.recorded["x"]) == 4
    assert len(calls) == 2


def test_an_answer_of_the_wrong_shape_is_said():
    with pytest.raises(UserError, match=r"give 3 of its channels, or 3 tensors like it"):
        solvers.sample(net, made(HEADED), START)
