"""Solvers converge to the exact probability-flow map at their theoretical order (arXiv:2206.00927, theorem 3.2, for
DPM-Solver; arXiv:2302.04867, section 3, for UniPC; the others' as for linear multistep and exponential integrators).

The mixture's components overlap: where they do not, paths near the divide are not resolved by 64 steps of order 1.
"""

from __future__ import annotations

import functools
import itertools
import math
import re

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import schedules
from tests.solvers import test_laws

DATA = {
    "gaussian": Gaussian(torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35),
    "mixture": Mixture([0.4, 0.6], [[-0.5, 0.3], [0.4, -0.2]], [0.5, 0.35]),
}
STEPS = (64, 128, 256)
COLD = "log_snr"  # starts with one step of order 1: an error of the order of that step squared, small where D is flat


@functools.cache
def truth(data: str, name: str) -> tuple[schedules.Schedule, float, float, torch.Tensor, torch.Tensor]:
    """Schedule, first and last time (lambda -3 and 2.5), unit noise and where the path through sigma * noise ends."""
    schedule = schedules.get(name)
    first, last = schedule.time_of_half_log_snr(-3.0), schedule.time_of_half_log_snr(2.5)
    noise = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return schedule, first, last, noise, DATA[data].flow_map(schedule.sigma(first) * noise, schedule, first, last)


def graded(schedule: schedules.Schedule, first: float, last: float, steps: int) -> list[float]:
    """Times whose lambda rises with the square of the step's number: the first step of the warm-up, of size N^-2 and of
    order 1, costs N^-4 and the next ones less, which leaves any order measured here; and the steps are uneven.
    """
    at, to = schedule.half_log_snr(first), schedule.half_log_snr(last)
    return [first, *(schedule.time_of_half_log_snr(at + (to - at) * (i / steps) ** 2) for i in range(1, steps)), last]


def jagged(schedule: schedules.Schedule, first: float, last: float, steps: int) -> list[float]:
    """Steps in lambda that are alternately h and 2 h, after a graded warm-up in the first eighth of the way."""
    at, to = schedule.half_log_snr(first), schedule.half_log_snr(last)
    share, quarter = 0.125, steps // 4
    places = [share * (i / quarter) ** 3 for i in range(quarter)]
    rest = (1.0 - share) / (1.5 * (steps - quarter))
    places += [share + rest * (i + i // 2) for i in range(steps - quarter)]
    return [first, *(schedule.time_of_half_log_snr(at + (to - at) * u) for u in places[1:]), last]


def errors(data: str, name: str, solver: str, grid: str, prediction: str = "v", **options) -> list[float]:
    schedule, first, last, noise, exact = truth(data, name)
    teacher = DATA[data].teacher(schedule, prediction)
    found = []
    for steps in STEPS:
        laid = {"name": grid, "start": first, "end": last, "zero": "none"}
        if grid in ("graded", "jagged"):
            laid = (graded if grid == "graded" else jagged)(schedule, first, last, steps)
        plan = solvers.plan(solver, schedule, steps, grid=laid, prediction=prediction, **options)
        found.append(float((solvers.sample(teacher, plan, noise) - exact).abs().max()))
    return found


CASES = [
    # solver, order by theory, grid, options
    ("ddim", 1, COLD, {}),
    ("euler", 1, COLD, {}),
    ("heun", 2, COLD, {}),
    ("heun", 2, COLD, {"coordinate": "flow"}),
    ("dpmpp_2m", 2, COLD, {}),
    ("dpmpp_2m", 2, COLD, {"variant": "exact"}),
    ("dpmpp_2m", 1, COLD, {"order": 1}),
    ("dpmpp_3m", 2, COLD, {"order": 2}),
    ("dpmpp_3m", 3, "graded", {}),
    ("dpmpp_3m", 2, "graded", {"curvature": "half_weight"}),  # as published: half the second difference is missing
    ("exponential", 2, COLD, {"order": 2, "slope": "midpoint"}),
    ("exponential", 4, "graded", {"order": 4}),
    ("exponential", 2, COLD, {"order": 2, "form": "eps"}),
    ("exponential", 3, "graded", {"order": 3, "form": "eps"}),
    ("exponential", 4, "graded", {"order": 4, "form": "eps"}),
    ("dpm_solver", 1, COLD, {"order": 1}),
    ("dpm_solver", 2, COLD, {"order": 2}),
    ("dpm_solver", 2, COLD, {"order": 2, "variant": "taylor", "ratio": 0.7}),
    ("dpm_solver", 3, COLD, {"order": 3}),
    ("dpmpp_2s", 2, COLD, {}),
    ("dpmpp_2s", 2, COLD, {"variant": "taylor"}),
    ("dpmpp_3s", 3, COLD, {}),
    ("dpmpp_3s", 3, "graded", {"variant": "taylor"}),
    # the corrector adds one order to the predictor's; a lowered last step of order 1 leaves 2
    ("unipc", 2, COLD, {"order": 1}),
    ("unipc", 3, "graded", {"order": 2}),
    ("unipc", 3, "graded", {"order": 2, "variant": "bh1"}),
    ("unipc", 4, "graded", {"order": 3}),
    ("unipc", 2, COLD, {"order": 3, "lower_order_final": True}),
    ("unipc", 3, "graded", {"order": 2, "form": "eps"}),
    ("deis", 2, "graded", {"order": 2}),
    ("deis", 3, "graded", {}),
    ("deis", 2, "graded", {"order": 2, "coordinate": "rho"}),
    ("deis", 3, "graded", {"order": 3, "coordinate": "rho"}),
    ("deis", 4, "graded", {"order": 4, "coordinate": "log_rho"}),
    ("ipndm_v", 4, "graded", {}),
    ("ipndm_v", 4, "jagged", {}),
    ("ipndm_v", 3, "jagged", {"order": 3}),
    ("ipndm_v", 2, "jagged", {"order": 3, "third": "misplaced_parenthesis"}),
    ("ipndm_v", 2, "graded", {"third": "misplaced_parenthesis", "fourth": "unbalanced"}),
    # equal-step weights: order 2 at best, 1 where neighbouring steps differ
    ("ipndm", 1, COLD, {"order": 1}),
    ("ipndm", 2, COLD, {}),
    ("ipndm", 2, "karras", {"order": 3}),
    ("ipndm", 1, "jagged", {}),
    ("plms", 2, COLD, {}),
    ("plms", 1, COLD, {"mixed": "output"}),  # of a network that predicts v
    ("pndm", 2, COLD, {}),
    ("dpm2", 2, COLD, {}),
    ("sa", 1, COLD, {"predictor": 1, "corrector": 0, "strength": 0.0}),
    ("sa", 2, COLD, {"predictor": 2, "corrector": 2, "strength": 0.0}),
    ("sa", 1, COLD, {"predictor": 2, "corrector": 1, "strength": 0.0}),
    ("sa", 3, "graded", {"predictor": 3, "corrector": 3, "strength": 0.0}),
    ("sa", 4, "graded", {"predictor": 3, "corrector": 4, "strength": 0.0}),
    ("sa", 2, COLD, {"strength": 0.0, "lower_order_final": True}),
    ("trigflow", 1, COLD, {}),
    ("trigflow", 2, COLD, {"order": 2}),
    ("rho_rk", 2, COLD, {"order": 2, "place": 2 / 3}),
    ("rho_rk", 3, COLD, {"order": 3}),
    ("rho_rk", 4, COLD, {}),
    ("tcd", 1, COLD, {"eta": 0.0}),
    ("ctm", 1, COLD, {"gamma": 0.0}),
]


ELSEWHERE = {  # solvers with no row above or in test_laws.py: what is proven of them instead, and where
    "consistency": "exact in law with the exact consistency function (test_properties.py)",
    "genie": "order 2 with the right derivative head (test_genie.py)",
    "lcm": "exact in law with the exact consistency function (test_laws.py)",
    "ltsp": "order 1 with guidance, ipndm without (test_nonlinear.py)",
    "piflow": "ddim for one answer; for several, the rollout of its policy (test_piflow.py)",
    "scm": "consistency on TrigFlow's own grid (test_angle.py)",
    "stsp": "order 1 with guidance, ipndm without (test_nonlinear.py)",
}
SLOW = ("ipndm_v",)  # Adams' weights in sigma/alpha reach their fourth order from above 128 steps


@functools.cache
def measured(data: str, number: int) -> tuple[float, float]:
    """log2 of the error's fall from 64 to 128 steps and from 128 to 256, of CASES[number]."""
    solver, _, grid, options = CASES[number]
    first, second = (math.log2(a / b) for a, b in itertools.pairwise(errors(data, "vp", solver, grid, **options)))
    return first, second


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: " ".join(map(str, CASES[number])))
@pytest.mark.parametrize("data", DATA)
def test_order_of_convergence_is_the_theorys(data, number):
    solver, order, *_ = CASES[number]
    early, late = measured(data, number)
    assert late >= order - 0.15
    assert 0.5 * (early + late) >= order - (0.25 if solver in SLOW else 0.15)  # from 64 to 256 steps
    # above the second order the leading term may cancel on data this smooth
    assert order > 2 or late <= order + 0.15


def test_every_solver_has_its_order_measured():
    known = {case[0] for case in CASES} | {case[0] for case in test_laws.CASES}
    assert not known & ELSEWHERE.keys()
    assert set(solvers.names()) == known | ELSEWHERE.keys()


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize(("name", "grid"), [("edm", "karras"), ("flow", "uniform"), ("vp", "quadratic")])
def test_order_holds_on_uneven_grids_and_other_schedules(name, grid, solver, order):
    found = errors("mixture", name, solver, grid)
    for coarse, fine in itertools.pairwise(found):
        assert math.log2(coarse / fine) >= order - 0.15


@pytest.mark.parametrize(("pattern", "order"), [((1,), 3), ((1, 2, 3), 2)])
def test_singlestep_on_the_grids_own_times_keeps_order_three_only_where_lambda_is_even(pattern, order):
    schedule, first, last, noise, exact = truth("mixture", "vp")
    teacher = DATA["mixture"].teacher(schedule, "v")
    at, to = schedule.half_log_snr(first), schedule.half_log_snr(last)
    found = []
    for steps in (96, 192):
        ways = list(itertools.accumulate(pattern[i % len(pattern)] for i in range(steps)))
        inside = [schedule.time_of_half_log_snr(at + (to - at) * way / ways[-1]) for way in ways[:-1]]
        plan = solvers.plan("dpmpp_3s", schedule, steps, grid=[first, *inside, last], prediction="v", inner="grid")
        found.append(float((solvers.sample(teacher, plan, noise) - exact).abs().max()))
    assert math.log2(found[0] / found[1]) == pytest.approx(order, abs=0.15)


def test_the_page_shows_the_orders_measured_here():
    """docs/solvers.md; where it does not: python -m tests.solvers.orders_page."""
    from tests.solvers import orders_page

    number = re.compile(r"-?\d+\.\d\d(?= \|)")
    for name, made in orders_page.REGIONS.items():
        for here, there in zip(orders_page.written(name), made(), strict=True):
            assert number.sub("", here) == number.sub("", there)
            orders = [[float(value) for value in number.findall(row)] for row in (here, there)]
            assert orders[0] == pytest.approx(orders[1], abs=0.021), here  # libraries round differently
