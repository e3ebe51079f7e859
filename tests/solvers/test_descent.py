"""Grids searched by descent are the best there are, for any deterministic solver, and cost no memory of their steps."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import Denoiser, schedules
from fewstep.errors import UserError
from fewstep.solvers import descent, grids
from fewstep.solvers.descent import descend, kernel_distance, paired_distance
from fewstep.solvers.plan_slopes import Batch, numbers_of, slopes_of, walked

EDM = schedules.get("edm")
DATA = {
    "gaussian": Gaussian(torch.zeros(3, dtype=torch.float64), 0.5),
    # ten tight components in 64 dimensions: what the digits look like to a denoiser
    "mixture": Mixture(
        [0.1] * 10,
        torch.randn(10, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.7,
        [0.3] * 10,
    ),
}

DIMENSIONS = {DATA["gaussian"]: 3, DATA["mixture"]: 64}


def compared(data, seed=0, size=32):
    """Noise and where the exact path takes it from sigma 20 to 0.05."""
    noise = torch.randn(size, DIMENSIONS[data], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Batch(noise, data.flow_map(20.0 * noise, EDM, 20.0, 0.05))


def karras(steps):
    return grids.times({"name": "karras", "start": 20.0, "end": 0.05, "zero": "none"}, EDM, steps)


def distance(data, batch, times, solver="ddim"):
    plan = solvers.plan(solver, EDM, len(times) - 1, grid=list(times), prediction="x0")
    return float(paired_distance(solvers.sample(data.teacher(EDM), plan, batch.noise), batch.target))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("steps", [2, 3])
def test_the_grid_found_is_the_best_of_all(name, steps):
    data = DATA[name]
    batch = compared(data)
    found = descend(data.teacher(EDM), [batch], karras(steps), rounds=40)
    tried = torch.logspace(1.2, -1.2, 60 if steps == 2 else 24, dtype=torch.float64).tolist()
    best = min(distance(data, batch, (20.0, *inside, 0.05)) for inside in itertools.combinations(tried, steps - 1))
    assert found.loss == pytest.approx(distance(data, batch, found.times), rel=1e-9)
    assert found.loss < 1.001 * best  # what is tried is not the best of all either
    assert found.loss < 0.97 * found.losses[0]
    assert (found.times[0], found.times[-1]) == (20.0, 0.05)
    assert descend(data.teacher(EDM), [batch], karras(steps), rounds=40) == found


@pytest.mark.parametrize("solver", ["heun", "unipc"])
def test_few_steps_end_nearer_on_new_noise_than_on_the_start_grid(solver):
    """Of few samples: those that end in another component than the exact path weigh much, so 64 are not too many."""
    data = DATA["mixture"]
    found = descend(data.teacher(EDM), [compared(data, size=64)], karras(4), solver=solver, rounds=20)
    fresh = compared(data, seed=1, size=64)

    assert distance(data, fresh, found.times, solver) < 0.9 * distance(data, fresh, karras(4), solver)


class Net(torch.nn.Module):
    def __init__(self, width=16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(8, width, dtype=torch.float64, generator=generator) / 3.0)
        self.last = torch.nn.Parameter(torch.randn(width, 8, dtype=torch.float64, generator=generator) / width**0.5)

    def forward(self, x, t, cond=None):
        shift = 0.0 if cond is None else cond[:, None]
        return torch.tanh(x @ self.first + torch.sin(t)[:, None] + shift) @ self.last

    def null(self, cond):
        return torch.zeros_like(cond)


NOISE = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_3m", "unipc", "deis", "plms", "dpmpp_3s"])
@pytest.mark.parametrize("name", ["edm", "vp", "flow"])
def test_the_gradient_is_that_of_the_whole_run(name, solver):
    """Against central differences of sampling itself, guided and down to sigma = 0."""
    schedule = schedules.get(name)
    denoiser = Denoiser(Net(), schedule, "edm" if name == "edm" else "v")
    batch = Batch(NOISE, torch.zeros_like(NOISE), torch.linspace(-1.0, 1.0, 5, dtype=torch.float64))
    start = grids.times("karras", schedule, 4) if name != "flow" else grids.times("uniform", schedule, 4)
    logits = descent._shares(start).log()

    def compiled(at):
        times = descent._times(at, start)
        return solvers.plan(solver, schedule, 4, grid=times, prediction=denoiser.prediction, guidance=2.0)

    def run(at):
        return float(solvers.sample(denoiser, compiled(at), NOISE, batch.cond).square().mean())

    sides = descent._sides(compiled, logits)
    near = dict.fromkeys([key for side in sides for numbers in side for key in numbers], 0.0)
    plan = compiled(logits)
    numbers = {**near, **numbers_of(plan)}
    value, slopes = slopes_of(plan, numbers, denoiser, [batch], lambda x, _: x.square().mean(), needed=True)
    gradient = descent._chained(sides, slopes)
    assert value == pytest.approx(run(logits), rel=1e-9)
    for i, apart in enumerate(1e-4 * torch.eye(4, dtype=torch.float64)):
        slope = (run(logits + apart) - run(logits - apart)) / 2e-4
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert all(parameter.grad is None for parameter in denoiser.parameters())


@pytest.mark.parametrize(("solver", "name"), [("dpmpp_2m", "edm"), ("heun", "vp")])
def test_searched_coefficients_end_nearer_and_make_a_plan_like_any_other(solver, name):
    schedule, data = schedules.get(name), DATA["gaussian"]
    kind = "edm" if name == "edm" else "v"
    teacher = data.teacher(schedule, kind)
    first, last = schedule.time_of_ratio(20.0), schedule.time_of_ratio(0.05)
    noise = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch(noise, data.flow_map(schedule.sigma(first) * noise, schedule, first, last))
    grid = {"name": "karras", "start": first, "end": last, "zero": "none"}
    plan = solvers.plan(solver, schedule, 3, grid=grid, prediction=kind)
    refined, losses = descent.refine(teacher, [batch], plan, rounds=30)
    assert min(losses) < 0.3 * losses[0] and len(losses) == 31
    fresh = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end = data.flow_map(schedule.sigma(first) * fresh, schedule, first, last)
    before, after = (float(paired_distance(solvers.sample(teacher, p, fresh), end)) for p in (plan, refined))
    assert after < 0.4 * before
    again = solvers.sample(teacher, solvers.Plan.from_json(refined.to_json()), noise)
    assert float(paired_distance(again, batch.target)) == pytest.approx(min(losses), rel=1e-9)
    for stage, after in itertools.pairwise(refined.stages):  # networks read x itself, scaled
        if "input" in stage.outputs:
            expected = [after.input_scale * value for value in stage.row("x").values()]
            assert list(stage.row("input").values()) == pytest.approx(expected, rel=1e-12)


def test_a_run_keeps_its_states_and_no_activations():
    kept = []
    denoiser = Denoiser(Net(width=4096), EDM, "edm")
    plan = solvers.plan("ddim", EDM, 6, prediction="edm")
    table = {key: torch.tensor(value, requires_grad=True) for key, value in numbers_of(plan).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        walked(plan, table, denoiser, Batch(NOISE, NOISE))
    assert sum(kept) < 5 * 4096  # of one call's activations, of six calls


def test_every_grid_tried_falls_from_the_first_time_to_the_last():
    start = karras(5)
    for seed in range(20):
        logits = 30.0 * torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        times = descent._times(logits, start)
        assert (times[0], times[-1]) == (20.0, 0.05) and all(a > b for a, b in itertools.pairwise(times))
    assert descent._times(descent._shares(start).log(), start) == pytest.approx(list(start), rel=1e-6)


def test_the_kernel_distance_is_its_formula_and_can_be_descended():
    a, b = (torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (5, 6))
    pairs = [[float((x @ y / 4 + 1) ** 3) for y in second] for first, second in ((a, a), (b, b), (a, b)) for x in first]
    within_a = sum(pairs[i][j] for i in range(5) for j in range(5) if i != j) / 20
    within_b = sum(pairs[5 + i][j] for i in range(6) for j in range(6) if i != j) / 30
    between = sum(pairs[11 + i][j] for i in range(5) for j in range(6)) / 30
    found = kernel_distance(lambda x: x)(a, b)
    assert float(found) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)
    data, features = DATA["gaussian"], lambda x: torch.tanh(2.0 * x)
    search = descend(data.teacher(EDM), [compared(data, size=64)], karras(2), loss=kernel_distance(features), rounds=20)
    assert search.loss < 0.5 * search.losses[0]


def test_a_mistake_is_one_sentence():
    data = DATA["gaussian"]
    teacher, batch = data.teacher(EDM), compared(data)
    for words, changes in (
        ("no inner time", {"start": (20.0, 0.05)}),
        ("strictly falling", {"start": (20.0, 20.0, 0.05)}),
        ("got none", {"batches": []}),
        ("at least one whole round", {"rounds": 0}),
        ("at least one whole round", {"rounds": 1.5}),
        ("by clamp in this plan, which is no linear map; leave clip", {"options": {"clip": 1.0}}),
        ("rate above 0", {"rate": 0.0}),
        ("draws noise", {"solver": "ddpm"}),
        ("more than one network", {"solver": "genie"}),
        ("solver 'dimm' is not known", {"solver": "dimm"}),
        ("loss is nan", {"loss": lambda x, y: x.sum() * float("nan")}),
        ("give one for each noise", {"batches": [dataclasses.replace(batch, target=batch.target[:1])]}),
        ("needs two samples", {"loss": kernel_distance(lambda x: x), "batches": [compared(data, size=1)]}),
    ):
        options = {"batches": [batch], "start": karras(3), "rounds": 2, **changes}
        with pytest.raises(UserError, match=words) as error:
            descend(teacher, options.pop("batches"), options.pop("start"), **options)
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
    with pytest.raises(UserError, match=r"searched for a Denoiser.* got a Net; wrap it"):
        descend(Net(width=4), [batch], karras(3), rounds=2)
    plan = solvers.plan("ddim", EDM, 3, prediction="x0")
    for search in (lambda: descend(teacher, [batch], karras(3)), lambda: descent.refine(teacher, [batch], plan)):
        with torch.inference_mode(), pytest.raises(UserError, match=r"torch.inference_mode\(\) forbids"):
            search()
    with pytest.raises(UserError, match="got none"):
        descent.refine(teacher, [], plan)
    with pytest.raises(UserError, match="draws noise"):
        descent.refine(teacher, [batch], solvers.plan("ddpm", EDM, 3, prediction="x0"))
