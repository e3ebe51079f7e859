"""DPM-Solver-fast (arXiv:2206.00927), k-diffusion's "DPM fast": exactly as many evaluations as asked, in equally wide
blocks of orders 3, .., 3 that end on 2, 1 or 1 or 2.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from tests.solvers.test_orders import DATA, truth

FAST = {"order": 3, "inner": "fast"}


@pytest.mark.parametrize("name", ["edm", "vp", "flow"])  # flow's first step comes from pure noise and stands alone
@pytest.mark.parametrize(("solver", "options"), [
    ("dpm_solver", FAST),
    ("dpm_solver", {"order": 2, "inner": "fast"}),
    ("dpmpp_2s", {"inner": "fast"}),
    ("dpmpp_3s", {"inner": "fast"}),
])  # fmt: skip
def test_evaluations_are_as_many_as_asked(name, solver, options):
    schedule = schedules.get(name)
    for zero in ("append", "none"):
        for steps in range(1, 31):
            plan = solvers.plan(
                solver, schedule, steps, grid={"name": "log_snr", "zero": zero}, prediction="v", **options
            )
            assert plan.evaluations == steps == len(plan.stages)
            assert plan.times[0] == schedule.t_max
            assert plan.times[-1] == (schedule.t_min if zero == "none" else schedule.t_clean)


def kdiffusions(network, x: torch.Tensor, high: float, low: float, evaluations: int) -> torch.Tensor:
    """DPM fast in sigma (alpha = 1): blocks even in lambda = -log sigma, each by the paper's algorithms 1 and 2."""
    blocks = evaluations // 3 + 1
    rest = evaluations % 3
    orders = [3] * (blocks - 2) + [2, 1] if rest == 0 else [3] * (blocks - 1) + [rest]
    lambdas = [-math.log(high) + math.log(high / low) * i / blocks for i in range(blocks + 1)]

    def noise(x: torch.Tensor, at: float) -> torch.Tensor:
        sigma = math.exp(-at)
        return (x - network(x, torch.full(x.shape[:1], sigma, dtype=x.dtype))) / sigma

    for order, (at, to) in zip(orders, itertools.pairwise(lambdas)):
        h, eps, sigma = to - at, noise(x, at), math.exp(-to)
        if order == 1:
            x = x - sigma * math.expm1(h) * eps
            continue
        first = at + h / (3 if order == 3 else 2)
        one = noise(x - math.exp(-first) * math.expm1(first - at) * eps, first)
        if order == 2:
            x = x - sigma * math.expm1(h) * one
            continue
        second, part = at + 2 * h / 3, 2 * h / 3
        inside = math.expm1(part) * eps + 2 * (math.expm1(part) / part - 1) * (one - eps)
        two = noise(x - math.exp(-second) * inside, second)
        x = x - sigma * (math.expm1(h) * eps + 1.5 * (math.expm1(h) / h - 1) * (two - eps))
    return x


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 5, 6, 11, 12, 13])
def test_on_even_log_snr_it_is_kdiffusions(evaluations):
    schedule = schedules.get("edm")
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(x, t, cond=None):
        return torch.tanh(x @ mix + t.log()[:, None])

    noise = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan = solvers.plan(
        "dpm_solver", schedule, evaluations, grid={"name": "log_snr", "zero": "none"}, prediction="x0", **FAST
    )
    expected = kdiffusions(network, 80.0 * noise, 80.0, 0.002, evaluations)
    torch.testing.assert_close(solvers.sample(network, plan, noise), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("evaluations", "order"), [((62, 125, 251), 3), ((63, 126, 252), 2), ((64, 127, 253), 2)])
def test_the_order_is_three_but_for_a_last_block_of_order_one(evaluations, order):
    schedule, first, last, noise, exact = truth("mixture", "vp")
    laid = {"name": "log_snr", "start": first, "end": last, "zero": "none"}
    teacher = DATA["mixture"].teacher(schedule, "v")
    for solver, options in (("dpm_solver", FAST), ("dpmpp_3s", {"inner": "fast"})):
        found = []
        for steps in evaluations:
            plan = solvers.plan(solver, schedule, steps, grid=laid, prediction="v", **options)
            found.append(float((solvers.sample(teacher, plan, noise) - exact).abs().max()))
        for coarse, fine in itertools.pairwise(found):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)  # log2 is still settling at 63


def test_on_another_grid_blocks_end_at_its_times_or_between_them():
    schedule = schedules.get("edm")
    grid = [80.0, 20.0, 9.0, 3.0, 1.0, 0.4, 0.1]
    plan = solvers.plan("dpm_solver", schedule, 6, grid=grid, prediction="x0", **FAST)
    ends = [stage.target for stage in plan.stages]
    assert ends[2] == 9.0 and ends[4] == 1.0 and ends[5] == 0.1  # orders 3, 2, 1 over two steps of the grid each
    plan = solvers.plan("dpm_solver", schedule, 5, grid=grid[:-1], prediction="x0", **FAST)
    assert plan.stages[2].target == pytest.approx(math.sqrt(9.0 * 3.0))  # orders 3, 2 over two and a half
