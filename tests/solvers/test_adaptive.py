"""Samplers that choose their steps: the right law, errors that follow the tolerance, every sample by itself."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import schedules
from fewstep.errors import UserError
from fewstep.solvers import adaptive

STD = 0.35
GAUSSIAN = Gaussian(torch.tensor([0.7, -0.3, 0.2, 0.1], dtype=torch.float64), STD)
MIXTURE = Mixture([0.4, 0.6], [[-0.5, 0.3], [0.4, -0.2]], [0.5, 0.35])
COUNT = 4000


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gone_fast(name: str, **options) -> adaptive.Adaptive:
    schedule = schedules.get(name)
    options = {"relative": 0.05, "absolute": 0.02, "denoise": False, **options}
    teacher = GAUSSIAN.teacher(schedule, "x0")
    return adaptive.gotta_go_fast(teacher, normal(COUNT, 4), seeds=torch.arange(COUNT), **options)


def widths_off(name: str, x: torch.Tensor) -> torch.Tensor:
    """By how many standard errors each number's variance misses the exact one at t_min."""
    schedule = schedules.get(name)
    exact = (schedule.alpha(schedule.t_min) * STD) ** 2 + schedule.sigma(schedule.t_min) ** 2
    return (x.var(0) / exact - 1.0) / math.sqrt(2.0 / COUNT)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "trigflow"])
def test_gotta_go_fast_has_the_datas_mean_and_covariance(name):
    found = gone_fast(name)
    assert bool(found.finished.all())
    schedule = schedules.get(name)
    spread = math.hypot(schedule.alpha(schedule.t_min) * STD, schedule.sigma(schedule.t_min))
    mean = schedule.alpha(schedule.t_min) * GAUSSIAN.mean
    # 8 numbers and 6 correlations a schedule within 4 standard errors: each has a chance of 6e-5 to be outside
    assert float(((found.x.mean(0) - mean) / spread).abs().max()) < 4.0 / math.sqrt(COUNT)
    assert float(widths_off(name, found.x).abs().max()) < 4.0
    apart = torch.corrcoef(found.x.T) - torch.eye(4, dtype=torch.float64)
    assert float(apart.abs().max()) < 4.0 / math.sqrt(COUNT)


def test_forgetting_the_noise_of_rejected_steps_widens_the_law():
    """What the published code does: a step is thrown away because of its noise, and the noise with it."""
    assert float(widths_off("vp", gone_fast("vp", redraw=True).x).max()) > 8.0


def test_a_brownian_path_is_one_path_however_it_is_asked():
    """Increments over [1, 0] asked whole, rejected, then asked in parts add up to the whole, and have its law."""
    x, seeds = torch.zeros(COUNT, 1, dtype=torch.float64), torch.arange(COUNT)
    path = adaptive._Brownian(x, seeds, keeps=True)
    at, yes = torch.ones(COUNT, dtype=torch.float64), torch.ones(COUNT, dtype=torch.bool)
    whole = path.increment(at, 0.0 * at, 1)
    path.settle(~yes, yes)
    half = path.increment(at, 0.5 * at, 2)
    path.settle(~yes, yes)
    first = path.increment(at, 0.8 * at, 3)
    path.settle(yes, ~yes)
    assert path.limited(0.8 * at, 0.4 * at).tolist() == pytest.approx([0.3] * COUNT)  # ends where something is known
    second = path.increment(0.8 * at, path.places[0], 4)
    path.settle(yes, ~yes)
    third = path.increment(0.5 * at, path.places[0], 5)
    assert torch.allclose(first + second, half, atol=1e-12) and torch.allclose(half + third, whole, atol=1e-12)
    for part, length in ((first, 0.2), (second, 0.3), (third, 0.5), (whole, 1.0)):
        assert float(part.var()) == pytest.approx(length, rel=4.0 * math.sqrt(2.0 / COUNT))
    assert abs(float(torch.corrcoef(torch.cat([first, second], 1).T)[0, 1])) < 4.0 / math.sqrt(COUNT)


@functools.cache
def truth(data, name: str) -> tuple[schedules.Schedule, float, torch.Tensor, torch.Tensor]:
    """Schedule, start, unit noise, and where the exact path through it ends."""
    schedule = schedules.get(name)
    start = 0.999 if name == "flow" else schedule.t_max
    noise = normal(32, 4 if data is GAUSSIAN else 2)
    return schedule, start, noise, data.flow_map(schedule.sigma(start) * noise, schedule, start, schedule.t_min)


def deterministic(data, name: str, relative: float, **options) -> tuple[float, float]:
    """(root mean square error, mean evaluations) against the exact flow map."""
    schedule, start, noise, exact = truth(data, name)
    found = adaptive.dpm_adaptive(
        data.teacher(schedule, "x0"), noise, start=start, relative=relative, absolute=relative / 6.4, **options
    )
    assert bool(found.finished.all())
    return float((found.x - exact).square().mean().sqrt()), float(found.evaluations.double().mean())


@pytest.mark.parametrize(
    ("data", "name"),
    [(GAUSSIAN, "vp"), (GAUSSIAN, "edm"), (MIXTURE, "sd"), (MIXTURE, "flow")],
    ids=["gaussian-vp", "gaussian-edm", "mixture-sd", "mixture-flow"],
)
@pytest.mark.parametrize(("order", "form"), [(2, "eps"), (2, "x0"), (3, "eps"), (3, "x0")])
def test_a_tighter_tolerance_gives_a_smaller_error_for_more_evaluations(data, name, order, form):
    loose, cheap = deterministic(data, name, 0.05, order=order, form=form)
    # on edm x is 80 at first and relative tolerance lax: order 3 in eps errs 0.01 there until it is below 0.003
    tight, dear = deterministic(data, name, 3e-4 if (order, form) == (3, "eps") else 0.003, order=order, form=form)
    assert tight < loose and dear > cheap
    assert tight < 0.02  # of data of standard deviation 0.35 to 0.5


def test_order_three_is_cheaper_than_order_two_at_a_tight_tolerance():
    (two, of_two), (three, of_three) = (deterministic(MIXTURE, "vp", 1e-4, order=order) for order in (2, 3))
    assert three < two and of_three < of_two


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_a_sample_does_not_depend_on_its_neighbours(sampler):
    schedule = schedules.get("vp")
    teacher, noise, seeds = MIXTURE.teacher(schedule, "v"), normal(5, 2), torch.arange(5)

    def run(chosen):
        if sampler == "ode":
            return adaptive.dpm_adaptive(teacher, noise[chosen])
        return adaptive.gotta_go_fast(teacher, noise[chosen], seeds=seeds[chosen], relative=0.2)

    together, alone = run(slice(None)), run(slice(3, 4))
    assert torch.allclose(together.x[3:4], alone.x, atol=1e-12)
    assert together.evaluations[3:4].equal(alone.evaluations) and len(together.evaluations.unique()) > 1


def test_evaluations_count_the_trials_and_the_last_answer():
    schedule, noise, seeds = schedules.get("vp"), normal(3, 4), torch.arange(3)
    teacher = GAUSSIAN.teacher(schedule)
    found = adaptive.gotta_go_fast(teacher, noise, seeds=seeds)
    assert found.evaluations.equal(2 * (found.kept + found.rejected) + 1)
    found = adaptive.dpm_adaptive(teacher, noise, order=3)
    assert found.evaluations.equal(3 * (found.kept + found.rejected))


def test_without_host_reads_the_result_is_the_same_and_says_whether_it_ended():
    teacher, noise = MIXTURE.teacher(schedules.get("vp"), "v"), normal(4, 2)
    read = adaptive.dpm_adaptive(teacher, noise)
    free = adaptive.dpm_adaptive(teacher, noise, host_reads=False, most_trials=40)
    assert torch.equal(read.x, free.x) and torch.equal(read.evaluations, free.evaluations)
    short = adaptive.dpm_adaptive(teacher, noise, host_reads=False, most_trials=3)
    assert not bool(short.finished.any()) and bool((short.evaluations == 9).all())


def test_guidance_is_the_guided_denoisers():
    schedule, noise = schedules.get("vp"), normal(6, 2)
    teacher, labels = MIXTURE.teacher(schedule, "v"), torch.tensor([0, 1, 0, 1, 0, 1])
    options = {"cond": labels, "guidance": 2.0}
    fine = solvers.plan(
        "dpmpp_3m", schedule, 400, grid={"name": "log_snr", "zero": "none"}, prediction="v", guidance=2.0
    )
    found = adaptive.dpm_adaptive(teacher, noise, relative=1e-4, absolute=1e-5, **options)
    assert torch.allclose(found.x, solvers.sample(teacher, fine, noise, cond=labels), atol=2e-3)


def test_bad_input_is_one_sentence():
    teacher, noise = GAUSSIAN.teacher(schedules.get("vp")), normal(2, 4)
    for words, call in (
        ("Denoiser", lambda: adaptive.dpm_adaptive(teacher.net, noise)),
        ("order", lambda: adaptive.dpm_adaptive(teacher, noise, order=4)),
        ("form", lambda: adaptive.dpm_adaptive(teacher, noise, form="v")),
        ("growth", lambda: adaptive.dpm_adaptive(teacher, noise, growth=1.0)),
        ("absolute", lambda: adaptive.dpm_adaptive(teacher, noise, absolute=0.0)),
        ("end < start", lambda: adaptive.dpm_adaptive(teacher, noise, start=0.1, end=0.2)),
        ("end < start", lambda: adaptive.dpm_adaptive(teacher, noise, end=0.0)),
        ("seeds", lambda: adaptive.gotta_go_fast(teacher, noise, seeds=torch.arange(3))),
    ):
        with pytest.raises(UserError, match=words) as error:
            call()
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
