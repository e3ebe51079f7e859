"""With the exact consistency function multistep sampling has exactly the data's law, whatever steps and grid."""

from __future__ import annotations

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction

STD = 0.35


def law(plan: solvers.Plan, student) -> tuple[float, float]:
    """(mean, variance) of the output, exactly: the sampler is affine in its 1 + S independent standard normals."""
    draws = 1 + plan.stochastic_stages
    probes = torch.cat([torch.zeros(1, draws, 1), torch.eye(draws)[:, :, None]]).double()  # [1 + draws, draws, 1]
    answers = solvers.sample(student, plan, probes)[:, 0]
    return float(answers[0]), float((answers[1:] - answers[0]).square().sum())


@pytest.mark.parametrize("boundary", [None, 0.05])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize(("name", "kind"), [("flow", "v"), ("edm", "edm"), ("vp", "eps"), ("trigflow", "edm")])
def test_the_law_is_exact(name, kind, steps, boundary):
    schedule = schedules.get(name, t_min=0.05)
    mean = 0.7 if name == "flow" else 0.0  # pure noise carries no mean; elsewhere the start must, so it is zero there
    data = Gaussian(torch.tensor([mean], dtype=torch.float64), STD)
    prediction = Prediction(kind, boundary=boundary)
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    plan = solvers.plan(
        "consistency", schedule, steps, prediction=prediction, initial_scale=(alpha**2 * STD**2 + sigma**2) ** 0.5
    )
    found = law(plan, data.student(schedule, prediction))
    end = schedule.t_clean if boundary is None else boundary
    alpha, sigma = schedule.alpha(end), schedule.sigma(end)
    assert found == pytest.approx((alpha * mean, alpha**2 * STD**2 + sigma**2), abs=1e-12)


def test_the_law_test_can_fail():
    schedule, kind = schedules.get("edm"), Prediction("edm", boundary=0.05)
    student = Gaussian(torch.zeros(1, dtype=torch.float64), STD).student(schedule, kind)
    plan = solvers.plan("consistency", schedule, 2, grid=[80.0, 0.2, 0.0], prediction=kind)
    row = list(plan.stages[0].matrix[0])
    row[plan.stages[0].inputs.index("noise")] = 0.2  # renoise by s in place of sqrt(s^2 - e^2)
    object.__setattr__(plan.stages[0], "matrix", (tuple(row), *plan.stages[0].matrix[1:]))
    assert abs(law(plan, student)[1] - (STD**2 + 0.05**2)) > 1e-4


def test_one_step_is_the_students_answer():
    schedule = schedules.get("edm")
    data = Gaussian(torch.tensor([0.4, -0.1], dtype=torch.float64), STD)
    student = data.student(schedule, "edm")
    noise = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = solvers.plan("consistency", schedule, 1, prediction="edm")
    torch.testing.assert_close(solvers.sample(student, plan, noise), student(80.0 * noise, 80.0), rtol=0, atol=1e-13)
