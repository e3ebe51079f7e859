"""Solvers converge to the exact probability-flow map at their theoretical order (solvers card, section 3.2).

The mixture's components overlap: where they do not, paths near the divide are not resolved by 64 steps of order 1.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import schedules

DATA = {
    "gaussian": Gaussian(torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35),
    "mixture": Mixture([0.4, 0.6], [[-0.5, 0.3], [0.4, -0.2]], [0.5, 0.35]),
}
STEPS = (64, 128, 256)


@functools.cache
def truth(data: str, name: str) -> tuple[schedules.Schedule, float, float, torch.Tensor, torch.Tensor]:
    """Schedule, first and last time (lambda -3 and 2.5), unit noise and where the path through sigma * noise ends."""
    schedule = schedules.get(name)
    first, last = schedule.time_of_half_log_snr(-3.0), schedule.time_of_half_log_snr(2.5)
    noise = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return schedule, first, last, noise, DATA[data].flow_map(schedule.sigma(first) * noise, schedule, first, last)


def errors(data: str, name: str, solver: str, grid: str, prediction: str = "v", **options) -> list[float]:
    schedule, first, last, noise, exact = truth(data, name)
    teacher = DATA[data].teacher(schedule, prediction)
    found = []
    for steps in STEPS:
        laid = {"name": grid, "start": first, "end": last, "zero": "none"}
        plan = solvers.plan(solver, schedule, steps, grid=laid, prediction=prediction, **options)
        found.append(float((solvers.sample(teacher, plan, noise) - exact).abs().max()))
    return found


CASES = [
    ("ddim", 1, {}),
    ("euler", 1, {}),
    ("heun", 2, {}),
    ("heun", 2, {"coordinate": "flow"}),
    ("dpmpp_2m", 2, {}),
    ("dpmpp_2m", 2, {"variant": "exact"}),
    ("dpmpp_2m", 1, {"order": 1}),
]


@pytest.mark.parametrize(("solver", "order", "options"), CASES)
@pytest.mark.parametrize("data", DATA)
def test_order_of_convergence_is_the_theorys(data, solver, order, options):
    found = errors(data, "vp", solver, "log_snr", **options)
    for coarse, fine in itertools.pairwise(found):
        assert order - 0.15 <= math.log2(coarse / fine) <= order + 0.15


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize(("name", "grid"), [("edm", "karras"), ("flow", "uniform"), ("vp", "quadratic")])
def test_order_holds_on_uneven_grids_and_other_schedules(name, grid, solver, order):
    found = errors("mixture", name, solver, grid)
    for coarse, fine in itertools.pairwise(found):
        assert math.log2(coarse / fine) >= order - 0.15
