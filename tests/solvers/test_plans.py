"""A plan is data: it survives writing, prints, counts itself, and refuses what it cannot be."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from fewstep.solvers import Plan
from fewstep.solvers.compiling import compiled
from fewstep.solvers.plans import Row

SOLVERS = [("ddim", {"eta": 0.3}), ("euler", {}), ("heun", {}), ("dpmpp_2m", {"variant": "exact"}), ("consistency", {})]
SOLVERS += [(name, {}) for name in solvers.names() if name not in {listed for listed, _ in SOLVERS}]
GRIDS = [None, "karras", {"name": "exponential", "rho": 1.3, "end": 0.013}]


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
@pytest.mark.parametrize("name", schedules.names())
def test_a_plan_survives_json_bit_for_bit(name, solver, options):
    for grid in GRIDS:
        written_and_read(
            solvers.plan(solver, schedules.get(name), 7, grid=grid, prediction="v", guidance=1.3, **options)
        )


def written_and_read(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    for stage, other in zip(plan.stages, again.stages):
        assert [value.hex() for row in stage.matrix for value in row] == [v.hex() for row in other.matrix for v in row]
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_a_plan_says_how_to_build_itself_again(solver, options):
    schedule = schedules.get("edm")
    plan = solvers.plan(
        solver, schedule, 5, grid="karras", prediction="edm", guidance=2.0, initial_scale=81.0, **options
    )
    again = solvers.plan(solver, schedule, 5, prediction=plan.prediction, guidance=plan.guidance, **plan.options)
    assert again == plan


def test_a_plan_counts_its_evaluations_and_its_noise():
    schedule = schedules.get("edm")
    assert solvers.plan("euler", schedule, 6, prediction="edm").evaluations == 6
    assert solvers.plan("heun", schedule, 6, prediction="edm").evaluations == 11
    guided = solvers.plan("heun", schedule, 6, prediction="edm", guidance=3.0)
    assert guided.evaluations == 11 and guided.guidance == 3.0
    ancestral = solvers.plan("ddim", schedule, 6, prediction="edm", eta=1.0)
    assert ancestral.stochastic_stages == 5  # the step to sigma = 0 draws none
    assert [stage.noise for stage in ancestral.stages] == [1, 2, 3, 4, 5, 0]
    assert solvers.plan("consistency", schedule, 4, prediction="edm").stochastic_stages == 3


def test_a_plan_prints_one_line_a_stage():
    plan = solvers.plan("dpmpp_2m", schedules.get("edm"), 4, prediction="edm", guidance=2.0)
    lines = str(plan).splitlines()
    assert len(lines) == 2 + 4
    assert "dpmpp_2m on edm" in lines[0] and "4 evaluations" in lines[0]
    assert lines[2].split()[1] == "80" and "uncond" in lines[2] and "d0" in lines[3]


def test_guidance_of_one_compiles_to_no_guidance():
    schedule = schedules.get("vp")
    one, none = (solvers.plan("dpmpp_2m", schedule, 5, prediction="v", guidance=w) for w in (1.0, None))
    assert one.stages == none.stages


def test_guidance_may_differ_per_step_and_heuns_second_stage_keeps_its_steps():
    weights = [None, 3.0, 1.0]
    plan = solvers.plan("heun", schedules.get("edm"), 3, prediction="edm", guidance=weights)
    assert [stage.guidance for stage in plan.stages] == [None, None, 3.0, 3.0, None]
    assert [stage.guided for stage in plan.stages] == [False, False, True, True, False]


def test_nothing_is_kept_that_nothing_reads():
    plan = solvers.plan("dpmpp_2m", schedules.get("vp"), 3, prediction="v")
    # the clean last step is of order 1, so the middle stage's estimate is never read
    assert [stage.outputs for stage in plan.stages] == [("x", "d0"), ("x",), ("x",)]
    assert all(stage.outputs == ("x",) for stage in solvers.plan("ddim", schedules.get("vp"), 3).stages)


def test_a_lowered_final_step_is_ddims_and_only_below_fifteen_steps():
    schedule, grid = schedules.get("vp"), {"name": "log_snr", "zero": "none"}

    def last(solver: str, steps: int, **options) -> solvers.Stage:
        return solvers.plan(solver, schedule, steps, grid=grid, prediction="v", **options).stages[-1]

    assert last("dpmpp_2m", 14, lower_order_final=True) == last("ddim", 14)
    assert last("dpmpp_2m", 15, lower_order_final=True) == last("dpmpp_2m", 15) != last("ddim", 15)


def test_the_boundary_ends_a_consistency_plan_and_is_kept_by_its_noise():
    schedule, kind = schedules.get("edm"), Prediction("edm", boundary=0.002)
    plan = solvers.plan("consistency", schedule, 2, grid=[80.0, 1.5, 0.0], prediction=kind)
    assert plan.times == (80.0, 1.5, 0.002)
    assert plan.stages[0].row("x")["noise"] == pytest.approx((1.5**2 - 0.002**2) ** 0.5, rel=1e-14)
    free = solvers.plan("consistency", schedule, 2, grid=[80.0, 1.5, 0.0], prediction="edm")
    assert free.stages[0].row("x")["noise"] == 1.5 and free.times[-1] == 0.0


def test_copies_of_a_plan_leave_its_buffers_behind():
    plan = solvers.plan("ddim", schedules.get("vp"), 2, prediction="x0")
    solvers.sample(lambda x, t: x, plan, torch.randn(2, 3))
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan and not other._device_cache


EDM, FLOW = schedules.get("edm"), schedules.get("flow")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: solvers.plan("dpmpp2m", EDM, 4),
            "solver 'dpmpp2m' is not known (did you mean 'dpmpp_2m'?); choose one of: ",
        ),
        (lambda: solvers.plan("ddim", EDM, 0), "steps is 0; give a whole number of at least 1"),
        (lambda: solvers.plan("ddim", EDM, 4, grid="linear"), "grid 'linear' is not known"),
        (lambda: solvers.plan("ddim", EDM, 4, prediction="sample"), "prediction 'sample' is not known"),
        (lambda: solvers.plan("ddim", EDM, 4, prediction=3), "prediction 3 is not known"),
        (lambda: solvers.plan("ddim", "edm", 4), "the schedule is 'edm'; give one made by fewstep.schedules.get"),
        (
            lambda: solvers.plan("ddim", EDM, 4, etha=1.0),
            "option of solver 'ddim', 'etha' is not known (did you mean 'eta'?)",
        ),
        (lambda: solvers.plan("euler", EDM, 4, eta=1.0), "option of solver 'euler', 'eta' is not known"),
        (lambda: solvers.plan("ddim", EDM, 4, eta=1.5), "eta=1.5; give a number from 0 (deterministic) to 1"),
        (lambda: solvers.plan("dpmpp_2m", EDM, 1, order=2), "order 2 needs 2 steps and got 1"),
        (lambda: solvers.plan("dpmpp_2m", EDM, 9, order=3), "order=3; choose one of: 1, 2"),
        (lambda: solvers.plan("dpmpp_3m", EDM, 2, order=3), "'dpmpp_3m' of order 3 needs 3 steps and got 2"),
        (lambda: solvers.plan("unipc", EDM, 5, order=4), "solver 'unipc' got order=4; choose one of: 1, 2, 3"),
        (lambda: solvers.plan("unipc", EDM, 5, disable_corrector=[5]), "disable_corrector=[5]; name steps 0 to 4"),
        (lambda: solvers.plan("dpmpp_2s", EDM, 5, ratio=0.0), "ratio=0.0; give a number above 0 and at most 1"),
        (lambda: solvers.plan("dpm_solver", EDM, 5, inner="own"), "inner of solver 'dpm_solver', 'own' is not known"),
        (lambda: solvers.plan("dpmpp_2m_sde", EDM, 5, eta=-1.0), "eta=-1.0; give a number of at least 0"),
        (
            lambda: solvers.plan("dpmpp_2m_sde", EDM, 2, grid=[0.1, 0.5, 1.0]),
            "solver 'dpmpp_2m_sde' got a rising grid; inversion is deterministic",
        ),
        (lambda: solvers.plan("scm", EDM, 4, order=2), "solver 'scm' takes no option 'order'; it has none"),
        (lambda: solvers.plan("deis", EDM, 4, coordinate="tau"), "coordinate of solver 'deis', 'tau' is not known"),
        (lambda: solvers.plan("ddpm", EDM, 4, variance="large"), "variance of solver 'ddpm', 'large' is not known"),
        (lambda: solvers.plan("ddpm", EDM, 4, variance="analytic"), "takes noise_moments with variance='analytic'"),
        (
            lambda: solvers.plan("ddpm", EDM, 4, variance="analytic", noise_moments=[0.5, 2.0, 0.5, 0.5]),
            "give 4 numbers from 0 to 1, one per evaluation",
        ),
        (lambda: solvers.plan("sa", EDM, 4, predictor=4), "predictor=4 and corrector=4; give 1 to 3, and 0 to 4"),
        (lambda: solvers.plan("sa", EDM, 4, strength=[1.0]), "give a number of at least 0, or 4 of them"),
        (lambda: solvers.plan("euler", EDM, 4, churn=-1.0), "churn=-1.0; give a number of at least 0"),
        (lambda: solvers.plan("restart", EDM, 4, intervals=[[1, 1, 0.1, 1.0]]), "give [points >= 2, repeats >= 1"),
        (lambda: solvers.plan("tcd", EDM, 4, eta=2.0), "eta=2.0; give a number from 0 (deterministic) to 1"),
        (lambda: solvers.plan("ctm", EDM, 4, gamma=2.0), "gamma=2.0; give a number from 0 (deterministic) to 1"),
        (lambda: solvers.plan("lcm", EDM, 2, grid=[0.1, 0.5, 1.0]), "solver 'lcm' got a rising grid"),
        (lambda: solvers.plan("heun", EDM, 4, coordinate="time"), "coordinate of solver 'heun', 'time' is not known"),
        (lambda: solvers.plan("heun", FLOW, 4, coordinate="ratio", prediction="v"), "alpha is zero at t=1.0"),
        (lambda: solvers.plan("ddim", FLOW, 4, prediction="eps"), "prediction 'eps' says nothing about the picture"),
        (lambda: solvers.plan("ddim", FLOW, 4, prediction="edm"), "prediction 'edm' tells its network"),
        (lambda: solvers.plan("ddim", EDM, 4, guidance=[1.0, 2.0]), "guidance has 2 entries for 4 steps"),
        (lambda: solvers.plan("ddim", EDM, 4, guidance="high"), "guidance is 'high'; give a number"),
        (
            lambda: solvers.plan("ddim", EDM, 2, grid=[0.0, 0.5, 1.0]),
            "a rising grid starts at t=0.0, where sigma is zero",
        ),
        (lambda: solvers.plan("consistency", EDM, 2, grid=[0.1, 0.5, 1.0]), "solver 'consistency' got a rising grid"),
        (lambda: solvers.plan("ddim", EDM, 2, grid=[0.1, 0.5, 1.0], eta=1.0), "inversion is deterministic"),
        (lambda: Plan.from_json("{"), "this is not a plan"),
        (lambda: Plan.from_json("[]"), "this is not a plan"),
        (lambda: Plan.from_json('{"format": "fewstep.plan/9"}'), "a plan of format 'fewstep.plan/9' cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value)


def test_a_damaged_plan_is_refused():
    data = json.loads(solvers.plan("ddim", EDM, 2, prediction="edm").to_json())
    for damage in (
        lambda stage: stage["matrix"][0].pop(),
        lambda stage: stage.update(surprise=1),
        lambda stage: stage.update(inputs=["x", "weights"]),
    ):
        broken = copy.deepcopy(data)
        damage(broken["stages"][0])
        with pytest.raises(UserError):
            Plan.from_json(json.dumps(broken))


def test_a_slot_read_two_stages_later_is_kept_until_then():
    rows = [
        Row(3.0, 2.0, {"x": {"D": 1.0}, "d0": {"D": 1.0}}, 0),
        Row(2.0, 1.0, {"x": {"x": 1.0}, "d1": {"D": 1.0}}, 1),
        Row(1.0, 0.5, {"x": {"d0": 0.25, "d1": 0.75}, "d0": {"D": 1.0}}, 2),
    ]
    plan = compiled("try", EDM, Prediction("x0"), rows, guidance=[None] * 3, initial_scale=1.0, options={})
    assert [stage.outputs for stage in plan.stages] == [("x", "d0"), ("x", "d1"), ("x",)]
    start = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = solvers.sample(lambda x, t: x.sin(), plan, start)
    torch.testing.assert_close(found, 0.25 * start.sin() + 0.75 * start.sin().sin(), rtol=0, atol=1e-15)
