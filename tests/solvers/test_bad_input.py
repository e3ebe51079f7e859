"""Whatever a user gives to the solvers' public functions, the answer is a sound plan or picture, or one sentence that
names what was given and what to give instead.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import schedules
from fewstep.errors import UserError
from fewstep.solvers import grids, registry

SCHEDULES = {name: schedules.get(name) for name in schedules.names()}
EDM, SD, FLOW = SCHEDULES["edm"], SCHEDULES["sd"], SCHEDULES["flow"]
WRONG = ["x", "1", None, -1, -0.5, 0, 2.5, 1e9, math.nan, math.inf, True, [], {}, [1, 2], [[1]], object()]
ON = {"flow_shift": FLOW, "linear_quadratic": FLOW}  # and these on sd, the rest on edm
ON |= dict.fromkeys(("leading", "trailing", "linspace", "lcm", "align_your_steps"), SD)


def sentence(error: UserError) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and "object at" not in text.replace("<object object at", "")


def refused_or_sound(*given: Any, **options: Any) -> bool:
    """Whether a plan of these was refused, in one sentence; otherwise it holds finite numbers."""
    try:
        plan = solvers.plan(*given, **options)
    except UserError as error:
        assert sentence(error), str(error)
        return True
    numbers = [plan.initial_scale, *plan.times]
    for stage in plan.stages:
        numbers += [stage.network_time, stage.input_scale, *(value for row in stage.matrix for value in row)]
    assert all(map(math.isfinite, numbers))
    assert solvers.Plan.from_json(plan.to_json()) == plan
    return False


def options_of(function) -> list[str]:
    return [name for name in list(inspect.signature(function).parameters)[2:] if name != "prediction"]


@pytest.mark.parametrize("solver", solvers.names())
def test_options_of_solvers(solver):
    for option in options_of(registry._SOLVERS[solver].family):
        taken: list[dict[str, Any]] = [{option: value} for value in WRONG]
        refused = [refused_or_sound(solver, EDM, 4, prediction="v", **given) for given in taken]
        assert refused[0] and refused[-1], option  # neither a strange name nor an object is anything
    assert refused_or_sound(solver, EDM, 4, prediction="v", colour=1)


@pytest.mark.parametrize("grid", grids.names())
def test_options_of_grids(grid):
    for option in options_of(grids._GRIDS[grid]):
        for value in WRONG:
            given = {"name": grid, option: value}
            refused_or_sound("ddim", ON.get(grid, EDM), 4, prediction="v", grid=given)
    given = {"name": grid, "colour": 1}
    assert refused_or_sound("ddim", ON.get(grid, EDM), 4, prediction="v", grid=given)


@pytest.mark.parametrize(
    "option", ["steps", "grid", "prediction", "guidance", "initial_scale", "threshold", "clip", "told"]
)
def test_keywords_of_plan(option):
    for value in WRONG:
        given = {"steps": 4, "prediction": "v", option: value}
        refused_or_sound("ddim", EDM, **given)
    assert refused_or_sound("ddim", EDM, **{"steps": 4, "prediction": "v", option: object()})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: solvers.plan("ddim", EDM, 0), "steps is 0; give a whole number of at least 1."),
        (lambda: solvers.plan("ddim", EDM, -3), "steps is -3"),
        (lambda: solvers.plan("ddim", EDM, 2.0), "steps is 2.0"),
        (lambda: solvers.plan("ddim", EDM, True), "steps is True"),
        (
            lambda: solvers.plan("dpmpp2m", EDM, 4),
            "solver 'dpmpp2m' is not known (did you mean 'dpmpp_2m'?); choose one",
        ),
        (lambda: solvers.plan(None, EDM, 4), "solver None is not known; choose one of: consistency, ctm, ddim"),
        (lambda: solvers.plan("ddim", "edm", 4), "the schedule is 'edm'; give one made by fewstep.schedules.get(name)"),
        (lambda: solvers.plan("ddim", EDM, 4, grid="karas"), "grid 'karas' is not known (did you mean 'karras'?)"),
        (lambda: solvers.plan("ddim", EDM, 4, grid=7), "the grid is 7; give a name"),
        (lambda: solvers.plan("ddim", EDM, 4, prediction="epsilon"), "prediction 'epsilon' is not known"),
        (lambda: solvers.plan("ddim", FLOW, 4, prediction="eps"), "prediction 'eps' says nothing about the picture"),
        (lambda: solvers.plan("ddim", FLOW, 4, prediction="edm"), "prediction 'edm' tells its network"),
        (lambda: solvers.plan("dpmpp_3m", EDM, 2, order=3), "of order 3 needs 3 steps and got 2; lower one or raise"),
        (lambda: solvers.plan("unipc", EDM, 1, order=2), "of order 2 needs 2 steps and got 1"),
        (lambda: solvers.plan("deis", EDM, 8, order=5), "order=5; choose one of: 1, 2, 3, 4"),
        (lambda: solvers.plan("euler", EDM, 4, churn="x"), "churn of solver 'euler' is 'x'; give a number."),
        (lambda: solvers.plan("euler", EDM, 4, churn=math.nan), "churn of solver 'euler' is nan; give a number."),
        (lambda: solvers.plan("ddpm", EDM, 4, final_noise=1), "final_noise of solver 'ddpm' is 1; give True or False."),
        (
            lambda: solvers.plan("unipc", EDM, 4, order=2.0),
            "order of solver 'unipc' is 2.0; give a whole number or None.",
        ),
        (
            lambda: solvers.plan("restart", EDM, 4, intervals=[1, 2]),
            "intervals of solver 'restart' is [1, 2]; give a list of lists of numbers.",
        ),
        (
            lambda: solvers.plan("sa", EDM, 4, strength="x"),
            "strength of solver 'sa' is 'x'; give a number or a list of",
        ),
        (lambda: solvers.plan("unipc", EDM, 4, lower_order_final=3), "lower_order_final is 3; give True"),
        (lambda: solvers.plan("unipc", EDM, 4, correct_last=True), "ends at sigma = 0, where no network can be asked"),
        (
            lambda: solvers.plan("dpmpp_3s", EDM, 4, inner="grid", lower_order_final=2),
            "ends at sigma = 0, where no network can be asked",
        ),
        (lambda: solvers.plan("ddim", EDM, 4, initial_scale="big"), "initial_scale of a plan is 'big'; give a number"),
        (lambda: solvers.plan("ddim", EDM, 4, initial_scale=math.inf), "no finite coefficients on this grid"),
        (lambda: solvers.plan("ddim", SD, 4, told="whole"), "told 'whole' is not known; choose one of: exact, rounded"),
        (lambda: solvers.plan("ddim", EDM, 4, told="rounded", prediction="v"), "is for networks that count indices"),
        (lambda: solvers.plan("ddim", SD, 4, guidance=[1.0, 2.0]), "guidance has 2 entries for 4 steps"),
        (lambda: solvers.plan("ddim", SD, 4, guidance=True), "guidance is True; give a number"),
        (
            lambda: solvers.plan("ddim", SD, 4, grid={"name": "karras", "rho": "x"}),
            "rho of grid 'karras' is 'x'; give a",
        ),
        (
            lambda: solvers.plan("ddim", SD, 4, grid={"name": "karras", "start": 5000}),
            "holds 5000.0, outside the times",
        ),
        (
            lambda: solvers.plan("ddim", EDM, 4, grid={"name": "quadratic", "end": -1}),
            "grid 'quadratic' cannot use end=-1",
        ),
        (lambda: solvers.row("heun", EDM, torch.ones(1), torch.zeros(1)), "choose one of: ddim, dpmpp_2m, euler"),
        (lambda: solvers.Plan.from_json("{}"), "this is not a plan"),
    ],
)
def test_a_mistake_is_one_sentence(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and sentence(error.value)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([9.0, 4.0, 5.0, 1.0, 0.0], "must be strictly falling and goes from 4.0 to 5.0"),
        ([9.0, 4.0, 4.0, 1.0, 0.0], "must be strictly falling and goes from 4.0 to 4.0"),
        ([0.1, 4.0, 3.0, 5.0, 9.0], "must be strictly rising and goes from 4.0 to 3.0"),
        ([9.0, 4.0, 1.0, 0.0], "a custom grid for 4 steps needs 5 times (the last is where it ends), not 4."),
        ([], "a custom grid for 4 steps needs 5 times"),
        ([9.0, 4.0, math.nan, 1.0, 0.0], "a custom grid holds nan, outside the times 0 to inf"),
        ([math.inf, 4.0, 2.0, 1.0, 0.0], "a custom grid holds inf, outside the times 0 to inf"),
        ([9.0, 4.0, 2.0, 1.0, -1.0], "a custom grid holds -1.0, outside the times 0 to inf"),
        ([9.0, 4.0, "2", None, 0.0], "a custom grid holds numbers"),
    ],
)
def test_a_custom_grid_falls_or_rises_inside_the_schedule(times, words):
    with pytest.raises(UserError) as error:
        solvers.plan("ddim", EDM, 4, prediction="v", grid=times)
    assert words in str(error.value) and sentence(error.value)


def tanh(x, t, cond=None):
    return torch.tanh(x)


PLAIN = solvers.plan("ddim", EDM, 3, prediction="v")
NOISY = solvers.plan("euler_a", EDM, 3, prediction="v")


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (torch.ones(3), "noise has shape [3]"),
        (torch.ones(1, 1, 1, 1, 1, 1), "noise has shape [1, 1, 1, 1, 1, 1]"),
        (torch.ones(2, 3, dtype=torch.int64), "noise is torch.int64"),
        ([1.0, 2.0], "noise is list"),
        (None, "noise is NoneType"),
    ],
)
def test_noise_is_a_batch_of_states(noise, words):
    with pytest.raises(UserError) as error:
        solvers.sample(tanh, PLAIN, noise)
    assert words in str(error.value) and sentence(error.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: solvers.sample(tanh, NOISY, torch.ones(2, 4)), "got neither seeds nor their noise"),
        (lambda: solvers.sample(tanh, NOISY, torch.ones(2, 4), seeds=torch.arange(3)), "seeds are torch.int64 [3]"),
        (lambda: solvers.sample(tanh, NOISY, torch.ones(2, 4), seeds=torch.ones(2)), "seeds are torch.float32 [2]"),
        (lambda: solvers.sample(tanh, NOISY, torch.ones(2, 2, 4)), "this plan has 2 stochastic stages"),
        (lambda: solvers.sample(lambda x, t: x[:, :1], PLAIN, torch.ones(2, 4)), "the network answered [2, 1]"),
        (lambda: solvers.sample(lambda x, t: None, PLAIN, torch.ones(2, 4)), "the network answered NoneType"),
        (lambda: solvers.sample(None, PLAIN, torch.ones(2, 4)), "the network is NoneType"),
        (lambda: solvers.sample(tanh, "ddim", torch.ones(2, 4)), "the plan is 'ddim'; give one made by"),
        (lambda: solvers.execute(None, tanh, torch.ones(2, 4)), "the plan is None; give one made by"),
        (lambda: solvers.execute(PLAIN, tanh, torch.ones(2, 4), start=4), "give 0 <= start <= stop <= 3"),
        (lambda: solvers.execute(PLAIN, tanh, torch.ones(2, 4), start=-1), "give 0 <= start <= stop <= 3"),
        (lambda: solvers.execute(PLAIN, tanh, torch.ones(2, 4), gradient="x"), "gradient 'x' is not known"),
        (lambda: solvers.execute(PLAIN, tanh, torch.ones(2, 4), record=("z",)), "record 'z' is not known"),
        (lambda: solvers.execute(PLAIN, [tanh], torch.ones(2, 4)), "1 networks were given for 3 stages"),
    ],
)
def test_what_a_run_is_given(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and sentence(error.value)
