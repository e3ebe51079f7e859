"""diffusers' schedulers on EDM's and flow matching's own levels: every grid, end and prediction type, 1 to 50 steps."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.diffusion import schedules
from tests.solvers.diffusers_runs import DRAWN, NAMES, START, STEPS, apart, diffusers, ours, planned, theirs, times_of

LOWER = {"lower_order_final": True}
ELUCIDATED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("EDMEulerScheduler", {}, "euler", {}),
    *(
        (
            "EDMDPMSolverMultistepScheduler",
            {"solver_order": order, "algorithm_type": name},
            solver,
            {**LOWER, **options},
        )
        for order, name, solver, options in (
            (1, "dpmsolver++", "dpmpp_2m", {"order": 1}),
            (2, "dpmsolver++", "dpmpp_2m", {}),
            (3, "dpmsolver++", "dpmpp_3m", {"curvature": "half_weight"}),
            (1, "sde-dpmsolver++", "dpmpp_2m_sde", {"order": 1}),
            (2, "sde-dpmsolver++", "dpmpp_2m_sde", {}),
        )
    ),
]


@pytest.mark.parametrize(("scheduler", "made", "solver", "options"), ELUCIDATED)
@pytest.mark.parametrize("grid", ["karras", "exponential"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_on_edms_levels(kind, end, grid, scheduler, made, solver, options, monkeypatch):
    """Its "epsilon" is EDM's F, its "v_prediction" that of the other sign."""
    schedule = schedules.get("edm")
    kinds = {"prediction_type": NAMES[kind], "sigma_schedule": grid, "final_sigmas_type": end}
    its = getattr(diffusers, scheduler)(**made, **kinds)
    for steps in STEPS:
        its.set_timesteps(steps)
        its.sigmas = its.sigmas.double().clamp(max=80.0)
        if end == "sigma_min":
            its.sigmas[-1] = its.sigmas[-2]  # but for float32
        levels, given = times_of(schedule, its.sigmas), dict(options)
        if len(levels) == 1:
            continue  # a single repeated level: the scheduler goes nowhere
        if end == "sigma_min" and given:
            given["lower_order_final"] = 2  # its last step goes nowhere
        plan = planned(solver, len(levels) - 1, levels, "edm", schedule, **given)
        sign = 1.0 if kind == "eps" else -1.0
        expected, told = theirs(its, START, monkeypatch, convert=lambda out, x, sign=sign: sign * out)
        found, ours_told = ours(plan)
        if end == "sigma_min" and made.get("solver_order") == 3 and steps >= 15:
            assert expected.isnan().all() and found.isfinite().all()  # their third order there: 0/0
            continue
        assert apart(found, expected) < 1e-5, steps
        assert ours_told == pytest.approx(told[: len(ours_told)], abs=1e-6)


FLOWS: list[tuple[str, dict[str, Any], str]] = [
    ("FlowMatchEulerDiscreteScheduler", {}, "euler"),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "consistency"),
    ("FlowMatchHeunDiscreteScheduler", {}, "heun"),
    ("FlowMatchLCMScheduler", {}, "consistency"),
    ("FlowMapEulerDiscreteScheduler", {}, "euler"),  # a flow map's mean velocity moves x as a velocity would
]
LAID = {
    "own": {},
    "shifted": {"shift": 3.0},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "terminal": {"shift_terminal": 0.1},
    "inverted": {"invert_sigmas": True},
}


@pytest.mark.parametrize(("scheduler", "made", "solver", "grid"), [
    (scheduler, made, solver, grid)
    for scheduler, made, solver in FLOWS
    for grid in (LAID if scheduler.startswith(("FlowMatchEuler", "FlowMatchLCM")) else ("own", "shifted"))
    if grid != "inverted" or (scheduler, made) == FLOWS[0][:2]
])  # fmt: skip
def test_on_flow_matchings_levels(scheduler, made, solver, grid, monkeypatch):
    """Inverted levels (Mochi's) are 1 - sigma, of a velocity towards the data."""
    schedule, turned = schedules.get("flow"), grid == "inverted"
    its = getattr(diffusers, scheduler)(**made, **LAID[grid])
    for steps in STEPS:
        if grid == "terminal" and steps == 1:
            continue  # it stretches the last of several levels
        its.set_timesteps(steps)
        its.sigmas = its.sigmas.double()
        levels = times_of(schedule, 1.0 - its.sigmas if turned else its.sigmas)
        plan = planned(solver, len(levels) - 1, levels, "flow", schedule)
        expected, told = theirs(its, START, monkeypatch, convert=lambda out, x: -out if turned else out)
        found, ours_told = ours(plan)
        assert apart(found, expected) < 1e-5, steps
        assert ours_told == pytest.approx([1.0 - t / 1000.0 if turned else t / 1000.0 for t in told], abs=1e-6)


@pytest.mark.parametrize(("scheduler", "made"), [
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("FlowMatchLCMScheduler", {}),
])  # fmt: skip
def test_noise_on_inverted_levels_ends_in_noise(scheduler, made, monkeypatch):
    """Why they are not above: they put back noise by 1 - sigma, and the last step returns what it drew."""
    its = getattr(diffusers, scheduler)(**made, invert_sigmas=True)
    its.set_timesteps(4)
    its.sigmas = its.sigmas.double()
    assert apart(theirs(its, START, monkeypatch)[0], DRAWN[:, 3]) < 1e-6
