"""DPM-Solver-v3 is its paper's algorithm; exact where the model is linear, and of its order elsewhere."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian, Mixture
from fewstep.diffusion import Denoiser, schedules
from fewstep.errors import UserError
from fewstep.solvers import model_statistics
from fewstep.solvers.dpm_solver_v3 import dpm_solver_v3

VP = schedules.get("vp")
FIRST, LAST = VP.time_of_half_log_snr(-3.0), VP.time_of_half_log_snr(2.5)
ENDS = {"start": FIRST, "end": LAST}
GAUSSIAN = Gaussian(torch.tensor([0.7, -0.3], dtype=torch.float64), 0.35)
MIXTURE = Mixture([0.4, 0.6], [[-0.5, 0.3], [0.4, -0.2]], [0.5, 0.35])
NOISE = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SAMPLES = MIXTURE.sample(500, torch.Generator().manual_seed(1))


def smooth(points: int) -> model_statistics.ModelStatistics:
    """Made-up statistics, different in every element, that any order must survive."""
    base = model_statistics.straight(VP, points, (2,), **ENDS)
    place = base.lambdas[:, None] / 3.0 * torch.tensor([1.0, 0.7], dtype=torch.float64)
    return model_statistics.ModelStatistics(
        VP, base.lambdas, torch.sigmoid(-2.0 * place), 0.3 * torch.sin(2.0 * place), 0.1 * torch.cos(place)
    )


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_one_step_is_exact_where_the_model_is_linear(name):
    """On Gaussian data f is one curve for all x, which l, s and b hold: what is left is their spacing's error."""
    schedule = schedules.get(name)
    first, last = schedule.time_of_half_log_snr(-3.0), schedule.time_of_half_log_snr(2.5)
    teacher = GAUSSIAN.teacher(schedule, "v")
    exact = GAUSSIAN.flow_map(schedule.sigma(first) * NOISE, schedule, first, last)
    samples, off = GAUSSIAN.sample(20, torch.Generator().manual_seed(1)), []
    for points in (12, 48):
        found = model_statistics.estimate(teacher, samples, points=points, start=first, end=last)
        ratio = torch.exp(-found.lambdas)[:, None]
        torch.testing.assert_close(found.l, (ratio**2 / (0.35**2 + ratio**2)).expand(-1, 2), rtol=1e-9, atol=1e-9)
        off.append(float((dpm_solver_v3(found, 1).sample(teacher, NOISE) - exact).abs().max()))
    plain = float(
        (dpm_solver_v3(model_statistics.straight(schedule, 48, (2,), start=first, end=last), 1))
        .sample(teacher, NOISE)
        .sub(exact)
        .abs()
        .max()
    )
    assert off[0] > 8.0 * off[1] and off[1] < 1e-3 < 0.05 * plain


@pytest.mark.parametrize("order", [1, 2, 3])
def test_clean_sample_prediction_is_dpm_solver_pp(order):
    """l = 1, s = b = 0; Simpson's rule on 400 levels integrates the exponential to 1e-9 of itself."""
    plain, denoiser = model_statistics.straight(VP, 400, **ENDS), MIXTURE.teacher(VP, "v")
    compiled = dpm_solver_v3(plain, 10, order=order)
    plan = solvers.plan("exponential", VP, 10, grid=list(compiled.times), prediction="v", order=order)
    expected = solvers.sample(denoiser, plan, NOISE)
    torch.testing.assert_close(compiled.sample(denoiser, NOISE), expected, rtol=1e-8, atol=1e-8)


@functools.cache
def measured() -> model_statistics.ModelStatistics:
    """The mixture's own."""
    return model_statistics.estimate(MIXTURE.teacher(VP, "v"), SAMPLES, points=44, batch=500, **ENDS)


def literal(statistics, denoiser, indices, order, corrector, pseudo, pseudo_corrector, lower_final):
    """The published loop: trapezoids over the levels, g re-based at every step, derivatives by a linear system."""
    schedule, at = statistics.schedule, statistics.lambdas
    l, s, b = statistics.l, statistics.s, statistics.b

    def cumulated(values):
        parts = 0.5 * (at[1:] - at[:-1])[:, None] * (values[1:] + values[:-1])
        return torch.cat([torch.zeros_like(values[:1]), parts.cumsum(0)])

    big_l, big_s = cumulated(l), cumulated(s)
    big_b = cumulated(torch.exp(-big_s) * b)
    big_i, big_c = cumulated(torch.exp(big_l + big_s)), cumulated(torch.exp(big_l + big_s) * big_b)
    times = [schedule.time_of_half_log_snr(float(at[i])) for i in indices]
    alphas, sigmas = ([float(fn(t)) for t in times] for fn in (schedule.alpha, schedule.sigma))

    def update(states, estimates, steps, target, divided):
        """From steps[0] to `target` through the values at all `steps`."""
        here, to = indices[steps[0]], indices[target]
        values = []
        for k in steps:
            f = (sigmas[k] * estimates[k] - l[indices[k]] * states[k]) / alphas[k]
            lift = torch.exp(big_s[here] - big_s[indices[k]])
            values.append(lift * f - torch.exp(big_s[here]) * (big_b[indices[k]] - big_b[here]))
        x = alphas[target] / alphas[steps[0]] * torch.exp(big_l[here] - big_l[to]) * states[steps[0]]
        x = x - alphas[target] * torch.exp(-big_l[to] - big_s[here]) * (big_i[to] - big_i[here]) * values[0]
        drift = big_c[to] - big_c[here] - big_b[here] * (big_i[to] - big_i[here])
        x = x - alphas[target] * torch.exp(-big_l[to]) * drift
        away = [float(at[indices[k]] - at[here]) for k in steps]
        if divided:
            table, slopes = list(values), []
            for n in range(1, len(steps)):
                table = [(table[j] - table[j + 1]) / (away[j] - away[j + n]) for j in range(len(table) - 1)]
                slopes.append(table[0] * math.factorial(n))
        elif len(steps) > 1:
            powers = torch.tensor([[u**n for n in range(1, len(steps))] for u in away[1:]], dtype=torch.float64)
            rises = torch.stack([value - values[0] for value in values[1:]])
            solved = torch.linalg.solve(powers, rises.flatten(1)).view_as(rises)
            slopes = [solved[n - 1] * math.factorial(n) for n in range(1, len(steps))]
        for n in range(1, len(steps)):
            inside = slice(here, to + 1)
            growth = torch.exp((big_l + big_s)[inside] - big_l[here] - big_s[here])
            weighed = growth * ((at[inside] - at[here]) ** n / math.factorial(n))[:, None]
            whole = (0.5 * (at[1] - at[0]) * (weighed[1:] + weighed[:-1])).sum(0)
            x = x - alphas[target] * torch.exp(big_l[here] - big_l[to]) * whole * slopes[n - 1]
        return x

    states, estimates, x, used = [], [], sigmas[0] * NOISE, 0
    for step in range(len(indices) - 1):
        states.append(x)
        estimates.append(denoiser.eps(x, times[step]))
        nodes = {"none": 0, "same": used, "higher": used + 1}[corrector]
        if nodes > 1:
            chosen = [step - 1, step, *(step - k for k in range(2, nodes))]
            corrected = update(states, estimates, chosen, step, pseudo_corrector)
            kept = sigmas[step] * estimates[step] - l[indices[step]] * states[step]
            states[step] = corrected
            estimates[step] = (kept + l[indices[step]] * corrected) / sigmas[step]
        used = min(order, step + 1)
        if lower_final:
            used = min(used, len(indices) - 1 - step)
        x = update(states, estimates, [step - k for k in range(used)], step + 1, pseudo)
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", ["none", "same", "higher"])
@pytest.mark.parametrize("pseudo", [False, True])
def test_it_is_the_published_algorithm(order, corrector, pseudo):
    statistics, denoiser = smooth(60), MIXTURE.teacher(VP, "v")
    options = {"order": order, "corrector": corrector, "pseudo": pseudo, "pseudo_corrector": pseudo}
    compiled = dpm_solver_v3(statistics, 8, quadrature="trapezoid", lower_order_final=pseudo, **options)
    indices = [round((VP.half_log_snr(t) + 3.0) / 5.5 * 60) for t in compiled.times]
    expected = literal(statistics, denoiser, indices, order, corrector, pseudo, pseudo, pseudo)
    torch.testing.assert_close(compiled.sample(denoiser, NOISE), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("order", "theory", "options"),
    [
        (1, 1, {}),
        (2, 2, {}),
        (3, 3, {}),
        (2, 3, {"corrector": "higher"}),
        (3, 2, {"pseudo": True}),  # the published third order of few steps: divided differences are no derivatives
    ],
)
def test_its_order_of_convergence_is_the_theorys(order, theory, options):
    statistics, denoiser = smooth(2**16), MIXTURE.teacher(VP, "v")
    exact = MIXTURE.flow_map(VP.sigma(FIRST) * NOISE, VP, FIRST, LAST)
    found = []
    for steps in (64, 128, 256):
        # the first step, of order 1, is of size N^-2, so that its error is of order 4
        rises = [0.0, *(5.5 * (i / (steps - 1) * (1.0 - 1.0 / steps**2) + 1.0 / steps**2) for i in range(steps))]
        grid = [VP.time_of_half_log_snr(rise - 3.0) for rise in rises]
        compiled = dpm_solver_v3(statistics, steps, grid=grid, order=order, **options)
        found.append(float((compiled.sample(denoiser, NOISE) - exact).abs().max()))
    early, late = (math.log2(coarse / fine) for coarse, fine in itertools.pairwise(found))
    assert early >= theory - 0.35 and late >= theory - 0.15
    assert theory > 2 or late <= theory + 0.25


def test_the_models_own_statistics_are_better_than_none():
    """What the method is for: fewer steps for the same error, here five of them against the clean-sample form."""
    teacher = MIXTURE.teacher(VP, "v")
    exact = MIXTURE.flow_map(VP.sigma(FIRST) * NOISE, VP, FIRST, LAST)
    own, plain = measured(), model_statistics.straight(VP, 44, (2,), **ENDS)
    for order in (1, 2):
        errors = [
            float((dpm_solver_v3(found, 5, order=order).sample(teacher, NOISE) - exact).square().mean().sqrt())
            for found in (own, plain)
        ]
        assert errors[0] < 0.7 * errors[1]


def test_statistics_do_not_depend_on_the_batch_and_come_back_from_a_file(tmp_path):
    teacher, cond = MIXTURE.teacher(VP, "eps"), torch.arange(500) % 2
    asked = {"points": 3, "cond": cond, "guidance": 2.0, **ENDS}
    one, other = (model_statistics.estimate(teacher, SAMPLES, batch=batch, **asked) for batch in (500, 77))
    for name in ("l", "s", "b"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9)
    one.save(tmp_path / "statistics.safetensors")
    again = model_statistics.load(tmp_path / "statistics.safetensors")
    assert again.schedule == VP and all(
        torch.equal(getattr(again, n), getattr(one, n)) for n in ("lambdas", "l", "s", "b")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_a_change_along_the_path_is_s_f_plus_b():
    """s and b are a regression: the residual of f' - s f - b has mean zero and no correlation with f."""
    teacher, level, found = MIXTURE.teacher(VP, "v"), 20, measured()
    # f along the exact path, one level before and after
    t, before, after = (VP.time_of_half_log_snr(float(found.lambdas[level + k])) for k in (0, -1, 1))
    generator = torch.Generator().manual_seed(level)
    x = VP.add_noise(SAMPLES, torch.randn(SAMPLES.shape, generator=generator, dtype=torch.float64), t)

    def f(k, at):
        state = MIXTURE.flow_map(x, VP, t, at, steps=20)
        return (VP.sigma(at) * teacher.eps(state, at) - found.l[level + k] * state) / VP.alpha(at)

    rate = (f(1, after) - f(-1, before)) / float(found.lambdas[level + 1] - found.lambdas[level - 1])
    here = f(0, t)
    residual = rate - found.s[level] * here - found.b[level]
    spread = rate.std(0)
    # central differences over levels an eighth apart are right to 1e-2 of the change
    assert float((residual.mean(0) / spread).abs().max()) < 1e-2
    assert float(((residual * (here - here.mean(0))).mean(0) / (spread * here.std(0))).abs().max()) < 1e-2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 4}, "order=4; choose one of: 1, 2, 3"),
        ({"corrector": "yes"}, "corrector of DPM-Solver-v3, 'yes' is not known"),
        ({"quadrature": "gauss"}, "quadrature of DPM-Solver-v3, 'gauss' is not known"),
        ({"steps": 30}, "a grid of 30 steps does not fall .* over 21 levels"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_a_mistake_is_one_sentence(options, words):
    plain = model_statistics.straight(VP, 20, **ENDS)
    with pytest.raises(UserError, match=words):
        dpm_solver_v3(plain, **{"steps": 5, **options})


def test_what_does_not_fit_is_refused(tmp_path):
    compiled = dpm_solver_v3(model_statistics.straight(VP, 20, (2,), **ENDS), 5)
    with pytest.raises(UserError, match="these statistics are of a denoiser on"):
        compiled.sample(MIXTURE.teacher(schedules.get("edm"), "v"), NOISE)
    with pytest.raises(UserError, match=r"noise has shape \[2, 3\] and the statistics are of samples \[2\]"):
        compiled.sample(Denoiser(torch.nn.Identity(), VP, "v"), torch.zeros(2, 3))
    (tmp_path / "broken").write_bytes(b"not a file")
    for path in ("broken", "missing"):
        with pytest.raises(UserError, match="cannot read model statistics"):
            model_statistics.load(tmp_path / path)
    with pytest.raises(UserError, match="need 2 or more even, rising lambdas"):
        model_statistics.ModelStatistics(VP, torch.tensor([0.0, 1.0, 3.0]), *[torch.zeros(3, 2)] * 3)
    with pytest.raises(UserError, match="points=0"):
        model_statistics.estimate(MIXTURE.teacher(VP, "v"), SAMPLES, points=0)
