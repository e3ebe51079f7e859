"""Options of diffusers' samplers, quirks included, are options of our plans: same final state on a random network.

Levels are taken from the scheduler, so that these tests are about solvers. What has no such options is held in
test_diffusers_matrix.py and test_diffusers_levels.py, over every grid, prediction type and number of steps; grids
themselves are compared in test_diffusers_grids.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction
from tests.solvers.diffusers_runs import GUIDANCE, NAMES, SD, START, apart, diffusers, ours, planned, theirs, times_of

STEPS = (1, 2, 3, 10, 50)


@dataclasses.dataclass(frozen=True)
class Case:
    scheduler: str
    solver: str
    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "eps"
    exploding: bool = False  # whether the scheduler's state is x/alpha
    tolerance: float = 1e-5
    steps: tuple[int, ...] = STEPS
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        made = " ".join(f"{key}={value}" for key, value in self.made.items())
        return f"{self.scheduler} {made} {self.kind} {self.keywords or ''}"


def multistep(algorithm: str, order: int, solver: str, kind: str = "eps", options=None, **made) -> Case:
    made = {"algorithm_type": algorithm, "solver_order": order, **made}
    options = {"lower_order_final": True, **(options or {})}
    return Case("DPMSolverMultistepScheduler", solver, made, options, kind, tolerance=2e-5 if order == 3 else 1e-5)


def constant(tau: float) -> Callable:
    return lambda t: torch.tensor(tau)


SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
KARRAS = {"use_karras_sigmas": True}
HALF = {"curvature": "half_weight"}
CASES = [
    Case(
        "EulerDiscreteScheduler",
        "euler",
        KARRAS,
        {"churn": 4.0, "churn_low": 0.05, "churn_high": 10.0, "churn_noise": 1.003, "late_churn": True},
        exploding=True,
        keywords={"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 10.0, "s_noise": 1.003},
    ),
    # DPM-Solver++ multistep
    multistep("dpmsolver++", 2, "dpmpp_2m", options={"variant": "exact"}, solver_type="heun"),
    multistep("dpmsolver++", 2, "dpmpp_2m", use_lu_lambdas=True),
    multistep("dpmsolver++", 3, "dpmpp_3m", options={**HALF, "slope": "exact"}, solver_type="heun"),
    multistep("dpmsolver++", 3, "dpmpp_3m", options={**HALF, "lower_order_final": False}, lower_order_final=False),
    multistep("dpmsolver++", 2, "dpmpp_2m", options={"euler_at_final": True}, euler_at_final=True, **SIGMA_MIN),
    # the SDE
    multistep("sde-dpmsolver++", 2, "dpmpp_2m_sde", options={"slope": "exact"}, solver_type="heun"),
    multistep(
        "sde-dpmsolver",
        2,
        "dpmpp_2m_sde",
        options={"slope": "exact", "form": "eps"},
        solver_type="heun",
        **SIGMA_MIN,
    ),
    # singlestep: the grid's times are the inner nodes
    *(
        Case(
            "DPMSolverSinglestepScheduler",
            solver,
            {
                "solver_order": order,
                "solver_type": kind,
                "algorithm_type": algorithm,
                "lower_order_final": lower,
                **final,
            },
            {
                "inner": "grid",
                "lower_order_final": lower,
                "variant": {"midpoint": "midpoint", "heun": "taylor"}[kind],
                **extra,
                **({"curvature": "wrong_sign"} if order == 3 and kind == "heun" and "strength" in extra else {}),
            },
            steps=(1, 2, 3, 10, 11, 12, 24) if lower else (12, 24),
            # noise with the wrong sign drives the state away, and float32 with it
            tolerance=5e-4 if order == 3 and "strength" in extra else 5e-5 if order == 3 else 1e-5,
        )
        for order, solver, algorithm, lower, final, extra in (
            (2, "dpmpp_2s", "dpmsolver++", True, {}, {}),
            (3, "dpmpp_3s", "dpmsolver++", True, {}, {}),
            (2, "dpmpp_2s", "dpmsolver++", True, SIGMA_MIN, {}),
            (3, "dpmpp_3s", "dpmsolver++", True, SIGMA_MIN, {}),
            (2, "dpmpp_2s", "dpmsolver++", False, SIGMA_MIN, {}),
            (3, "dpmpp_3s", "dpmsolver++", False, SIGMA_MIN, {}),
            (2, "dpm_solver", "dpmsolver", True, SIGMA_MIN, {"order": 2}),
            (3, "dpm_solver", "dpmsolver", True, SIGMA_MIN, {"order": 3}),
            (2, "dpmpp_2s", "sde-dpmsolver++", True, SIGMA_MIN, {"strength": 1.0}),
            (3, "dpmpp_3s", "sde-dpmsolver++", True, SIGMA_MIN, {"strength": 1.0}),
            (3, "dpmpp_3s", "sde-dpmsolver++", True, {}, {"strength": 1.0}),
        )
        for kind in ("midpoint", "heun")
    ),
    # UniPC
    Case(
        "UniPCMultistepScheduler",
        "unipc",
        {"solver_order": 2, "disable_corrector": [0, 2]},
        {"order": 2, "disable_corrector": [0, 2], "lower_order_final": True},
        steps=(10, 24),
    ),
    Case(
        "UniPCMultistepScheduler",
        "unipc",
        {"solver_order": 3, "lower_order_final": False, **SIGMA_MIN},
        {"order": 3},
        tolerance=5e-5,
    ),
    Case(
        "UniPCMultistepScheduler",
        "unipc",
        {"solver_order": 2, "predict_x0": False, **SIGMA_MIN},
        {"order": 2, "form": "eps", "lower_order_final": True},
    ),
    # DEIS ends at sigma_min
    *(
        Case(
            "DEISMultistepScheduler",
            "deis",
            {"solver_order": order, "lower_order_final": False},
            {"order": order, "coordinate": "log_rho"},
            kind,
            tolerance=5e-5 if order == 3 else 1e-5,
        )
        for order in (1, 2, 3)
        for kind in ("eps", "v", "x0")
    ),
    # SA-Solver: integrals in absolute lambda in float32
    *(
        Case(
            "SASolverScheduler",
            "sa",
            {"predictor_order": p, "corrector_order": c, "tau_func": constant(tau)},
            {"predictor": p, "corrector": c, "strength": tau, "lower_order_final": True},
            kind,
            tolerance=2e-4 if p == 3 else 1e-5,
            steps=(2, 3, 10, 24),
        )
        for p, c in ((1, 1), (2, 1), (2, 2), (3, 3), (3, 4))
        for tau, kind in ((0.0, "eps"), (1.0, "eps"), (0.5, "v"))
    ),
    # EDM's own; test_diffusers_levels.py has the rest
    Case(
        "EDMEulerScheduler",
        "euler",
        {},
        {"churn": 4.0, "churn_low": 0.05, "churn_high": 50.0, "churn_noise": 1.003, "late_churn": True},
        "edm",
        keywords={"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_final_state_is_diffusers(case, monkeypatch):
    on_flow = case.kind == "flow"
    schedule = schedules.get("edm" if case.kind == "edm" else "flow" if on_flow else "sd")
    made = dict(case.made)
    if case.kind != "edm" and not case.scheduler.startswith("FlowMatch"):
        made = {**SD, "prediction_type": NAMES[case.kind], **made}
    scheduler = getattr(diffusers, case.scheduler)(**made)
    for steps in case.steps:
        if case.options.get("order") and case.options["order"] > steps:
            continue
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()
        grid = times_of(schedule, scheduler.sigmas)
        evaluations = len(scheduler.timesteps)
        order = {"order": 1} if made.get("solver_order") == 1 and case.solver.startswith("dpmpp") else {}
        if case.solver == "exponential":
            order = {"order": min(made["solver_order"], len(grid) - 1)}
        plan = solvers.plan(
            case.solver,
            schedule,
            len(grid) - 1,
            grid=grid,
            prediction=Prediction(case.kind),
            guidance=GUIDANCE,
            initial_scale=1.0,
            **{**case.options, **order},
        )
        assert plan.evaluations == evaluations
        first, last = (schedule.alpha(t) if case.exploding else 1.0 for t in (grid[0], grid[-1]))
        expected, told = theirs(scheduler, START / first, monkeypatch, **case.keywords)
        found, ours_told = ours(plan)
        error = apart(found, expected * last)
        assert error < case.tolerance, (steps, error)
        if schedule.name == "sd":
            # diffusers rounds or truncates the times of grids laid in sigma to whole indices
            assert all(abs(a - b) < 1.0 + 1e-3 for a, b in zip(told, ours_told))


def test_the_published_third_order_rows_are_not_the_right_ones(monkeypatch):
    """What the options are for: the defaults differ from diffusers by far more than any tolerance here."""
    for made, solver, least in (
        ({"algorithm_type": "dpmsolver++"}, "dpmpp_3m", 1e-3),
        ({"algorithm_type": "sde-dpmsolver++"}, "dpmpp_3m_sde", 0.1),
    ):
        scheduler = diffusers.DPMSolverMultistepScheduler(**SD, solver_order=3, **made)
        scheduler.set_timesteps(10)
        grid = times_of(schedules.get("sd"), scheduler.sigmas)
        plan = planned(solver, 10, grid, "eps", lower_order_final=True)
        assert apart(ours(plan)[0], theirs(scheduler, START, monkeypatch)[0]) > least


def test_bh1_to_sigma_zero_is_a_number_here(monkeypatch):
    scheduler = diffusers.UniPCMultistepScheduler(**SD, solver_type="bh1")
    scheduler.set_timesteps(6)
    grid = times_of(schedules.get("sd"), scheduler.sigmas)
    assert not torch.isfinite(theirs(scheduler, START, monkeypatch)[0]).all()
    assert torch.isfinite(ours(planned("unipc", 6, grid, "eps", variant="bh1"))[0]).all()
