"""Every form of guidance, run by a plan, is its paper's formula in a literal loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import Denoiser, schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from fewstep.solvers import Plan

EDM, VP = schedules.get("edm"), schedules.get("vp")
STEPS = 5


class Net(torch.nn.Module):
    """A nonlinear network on [B, 6], told a number as its condition."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64) * 0.4)

    def forward(self, x, t, cond=None):
        shift = 0.0 if cond is None else torch.sin(torch.arange(6, dtype=x.dtype) * cond[:, None])
        return torch.tanh(x @ self.mix + shift) + 0.1 * t[:, None]

    def null(self, cond):
        return torch.zeros_like(cond)


NOISE = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COND = torch.tensor([1.0, 2.0, -1.0, 0.7], dtype=torch.float64)
NEGATIVES = [COND + 0.5, -COND]


def dot(a, b):
    return (a * b).sum(1, keepdim=True)


def literal(schedule, kind, guided, start=0, stop=STEPS, times=None):
    """DDIM with D = guided(step, x, t, clean) and nothing of the package but the denoiser and the schedule."""
    denoiser = Denoiser(Net(1), schedule, kind)
    times = times or solvers.plan("ddim", schedule, STEPS, prediction=kind).times
    x = float(schedule.sigma(times[0])) * NOISE
    asked = []

    def clean(x, t, cond, net=None):
        asked.append(t)
        return (net or denoiser)(x, t, cond)

    for step, (t, s) in enumerate(itertools.pairwise(times)):
        inside = start <= step < stop
        answer = guided(step, x, t, clean) if inside else clean(x, t, COND)
        ratio = schedule.sigma(s) / schedule.sigma(t)
        x = ratio * x + (schedule.alpha(s) - schedule.alpha(t) * ratio) * answer
    return x


def ran(schedule, kind, guidance, **given):
    plan = solvers.plan("ddim", schedule, STEPS, prediction=kind, guidance=guidance)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()
    denoiser = Denoiser(Net(1), schedule, kind)
    found = solvers.sample(denoiser, again, NOISE, COND, **given)
    assert torch.equal(found, solvers.sample(denoiser, plan, NOISE, COND, **given))  # buffers do not leak between runs
    tracked = solvers.execute(plan, denoiser, NOISE, cond=COND, gradient="all", **given).x
    torch.testing.assert_close(tracked.detach(), found, rtol=0, atol=1e-11)
    return plan, found


def close(found, expected):
    # float64, states up to 80 at the start, weights from moments
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def null():
    return torch.zeros_like(COND)


@pytest.mark.parametrize(("schedule", "kind"), [(EDM, "edm"), (VP, "v"), (VP, "eps")])
def test_plain_guidance_in_an_interval(schedule, kind):
    def guided(step, x, t, clean):
        u = clean(x, t, null())
        return u + 3.0 * (clean(x, t, COND) - u)

    form = {"name": "interval", "scale": 3.0, "start": 1, "stop": 3}
    plan, found = ran(schedule, kind, form)
    assert [stage.conditions for stage in plan.stages] == [("cond",)] + [("cond", "uncond")] * 2 + [("cond",)] * 2
    close(found, literal(schedule, kind, guided, 1, 3))
    levels = [float(schedule.ratio(t)) for t in plan.times]
    by_level = {"name": "cfg", "scale": 3.0, "sigma_low": levels[3], "sigma_high": levels[1]}
    assert ran(schedule, kind, by_level)[0].stages == plan.stages


@pytest.mark.parametrize("weak_kind", [None, "x0", {"kind": "edm", "sigma_data": 1.0}])
@pytest.mark.parametrize(("schedule", "kind"), [(EDM, "edm"), (VP, "v")])
def test_autoguidance_by_a_network_of_another_kind(schedule, kind, weak_kind):
    own = Prediction(kind)
    weak_prediction = (
        own if weak_kind is None else Prediction(**weak_kind) if isinstance(weak_kind, dict) else Prediction(weak_kind)
    )
    weak = Denoiser(Net(2), schedule, weak_prediction)

    def guided(step, x, t, clean):
        bad = clean(x, t, COND, weak)
        return bad + 2.0 * (clean(x, t, COND) - bad)

    form = {"name": "autoguidance", "scale": 2.0, "prediction": weak_kind}
    plan, found = ran(schedule, kind, form, others={"weak": weak})
    assert plan.roles == ("weak",) and plan.evaluations == 2 * STEPS
    close(found, literal(schedule, kind, guided))
    with pytest.raises(UserError, match="role 'weak'"):
        ran(schedule, kind, form)


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_a_perturbed_third_answer(w):
    other = Net(3)
    perturbed = Denoiser(other, EDM, "edm")

    def guided(step, x, t, clean):
        c, u, p = clean(x, t, COND), clean(x, t, null()), clean(x, t, COND, perturbed)
        return u + w * (c - u) + 1.7 * (c - p)

    plan, found = ran(
        EDM, "edm", {"name": "perturbed", "scale": w, "perturbed_scale": 1.7}, others={"perturbed": other}
    )
    assert plan.stages[0].conditions == (("cond",) if w == 1.0 else ("cond", "uncond"))
    close(found, literal(EDM, "edm", guided))


@pytest.mark.parametrize(("schedule", "kind"), [(EDM, "edm"), (VP, "eps")])
def test_a_classifiers_gradient(schedule, kind):
    def gradient(x, t, cond):
        return torch.cos(x) * cond[:, None] + t[:, None]

    def guided(step, x, t, clean):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        eps = (x - alpha * clean(x, t, COND)) / sigma
        told = torch.full((4,), float(schedule.network_time(t)), dtype=torch.float64)
        eps = eps - 0.3 * sigma * gradient(x, told, COND)
        return (x - sigma * eps) / alpha

    _, found = ran(schedule, kind, {"name": "classifier", "scale": 0.3}, others={"gradient": gradient})
    close(found, literal(schedule, kind, guided))


def rescaled(c, u, w=4.0, phi=0.7):
    g = u + w * (c - u)
    return g * (phi * c.std(1, keepdim=True) / g.std(1, keepdim=True) + 1 - phi)


def zero_star(c, u, w=4.0):
    u = u * dot(c, u) / (dot(u, u) + 1e-8)
    return u + w * (c - u)


def magnitude(c, u, w=4.0, decay=8.0):
    w = 1 + (w - 1) * torch.exp(-decay * dot(c - u, c - u).sqrt() / dot(u, u).sqrt())
    return u + w * (c - u)


def tangential(c, u, w=4.0):
    _, _, v = torch.linalg.svd(torch.stack([c, u], 1), full_matrices=False)
    u = dot(u, v[:, 0]) * v[:, 0]
    return u + w * (c - u)


def projected(c, u, w=4.0, parallel=0.25, radius=0.9, running=None, momentum=0.0, base="cond"):
    d = c - u + (0.0 if running is None else momentum * running)
    kept = d
    d = d * torch.clamp(radius / dot(d, d).sqrt(), max=1.0)
    along = dot(d, c) / dot(c, c) * c
    d = d - along + parallel * along
    return (c + (w - 1) * d if base == "cond" else u + w * d), kept


def in_space(space, schedule, kind, formula):
    """A guided clean estimate by a formula in clean estimates, or in outputs F of D = c_x x + c_out F."""

    def guided(step, x, t, clean):
        values = [clean(x, t, COND), clean(x, t, null())]
        if space == "denoised":
            return formula(step, *values)
        of_x, of_output = (float(v) for v in Prediction(kind).coefficients(schedule, t))
        return of_x * x + of_output * formula(step, *((value - of_x * x) / of_output for value in values))

    return guided


FORMS = {"rescale": rescaled, "cfg_zero_star": zero_star, "mambo_g": magnitude, "tcfg": tangential}


@pytest.mark.parametrize("space", ["output", "denoised"])
@pytest.mark.parametrize(("schedule", "kind"), [(EDM, "edm"), (VP, "v")])
@pytest.mark.parametrize("name", FORMS)
def test_forms_by_inner_products(name, schedule, kind, space):
    form = {"name": name, "scale": 4.0, "of": space, **({"zero_steps": 0} if name == "cfg_zero_star" else {})}
    _, found = ran(schedule, kind, form)
    close(found, literal(schedule, kind, in_space(space, schedule, kind, lambda step, c, u: FORMS[name](c, u))))


@pytest.mark.parametrize("momentum", [0.0, -0.5])
@pytest.mark.parametrize("base", ["cond", "uncond"])
@pytest.mark.parametrize("space", ["output", "denoised"])
def test_projected_guidance_with_its_running_difference(space, base, momentum):
    running = []

    def formula(step, c, u):
        answer, kept = projected(c, u, running=running[-1] if running else None, momentum=momentum, base=base)
        running.append(kept)
        return answer

    form = {"name": "apg", "scale": 4.0, "parallel": 0.25, "radius": 0.9, "of": space, "base": base}
    _, found = ran(EDM, "edm", {**form, "momentum": momentum, "start": 1, "stop": 4})
    close(found, literal(EDM, "edm", in_space(space, EDM, "edm", formula), 1, 4))


def test_perpendicular_negatives():
    def guided(step, x, t, clean):
        c, u, *negatives = (clean(x, t, cond) for cond in (COND, null(), *NEGATIVES))
        total = c - u
        for weight, negative in zip((0.5, 0.2), negatives):
            n = negative - u
            total = total - weight * (n - dot(n, c - u) / dot(c - u, c - u) * (c - u))
        return u + 3.0 * total

    form = {"name": "perp_neg", "scale": 3.0, "weights_of": [0.5, 0.2], "of": "denoised", "start": 1}
    plan, found = ran(EDM, "edm", form, negatives=NEGATIVES)
    assert len(plan.stages[1].conditions) == 4 and plan.evaluations == STEPS
    close(found, literal(EDM, "edm", guided, 1))
    with pytest.raises(UserError, match="takes 2 negatives and got 1"):
        ran(EDM, "edm", form, negatives=NEGATIVES[:1])


def test_zero_stars_first_steps_ask_nobody():
    def guided(step, x, t, clean):
        of_x, _ = (float(v) for v in Prediction("edm").coefficients(EDM, t))
        return (
            of_x * x if step < 2 else in_space("output", EDM, "edm", lambda _, c, u: zero_star(c, u))(step, x, t, clean)
        )

    plan, found = ran(EDM, "edm", {"name": "cfg_zero_star", "scale": 4.0, "zero_steps": 2})
    assert plan.evaluations == STEPS - 2
    close(found, literal(EDM, "edm", guided))


@pytest.mark.parametrize("name", ["cfg", "rescale", "apg", "mambo_g", "tcfg", "autoguidance"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "unipc"])
def test_a_scale_of_one_is_no_guidance(name, solver):
    one, none = (
        solvers.plan(solver, EDM, 4, prediction="edm", guidance=g) for g in ({"name": name, "scale": 1.0}, None)
    )
    assert one.stages == none.stages


PLUS = {"name": "cfg++", "scale": 0.6}


@pytest.mark.parametrize(("schedule", "kind"), [(EDM, "edm"), (VP, "eps")])
@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2m"])
def test_plus_plus_renoises_with_the_unconditional_answer(solver, schedule, kind):
    denoiser = Denoiser(Net(1), schedule, kind)
    grid = [float(schedule.time_of_ratio(v)) for v in (8.0, 3.0, 1.0, 0.3, 0.05)] + [schedule.t_clean]
    plan = solvers.plan(solver, schedule, STEPS, grid=grid, prediction=kind, guidance=PLUS)
    assert Plan.from_json(plan.to_json()) == plan
    taus = [float(schedule.ratio(t)) for t in grid]
    x, before = NOISE * float(schedule.sigma(grid[0])) / float(schedule.alpha(grid[0])), None  # x/alpha
    for i, (tau, ahead) in enumerate(itertools.pairwise(taus)):
        state = x * schedule.alpha(grid[i])
        u = denoiser(state, grid[i], null())
        d = u + 0.6 * (denoiser(state, grid[i], COND) - u)
        x = d + ahead / tau * (x - u)
        if solver == "dpmpp_2m" and before is not None and ahead > 0:
            h, past = (
                torch.log(torch.tensor(a / b, dtype=torch.float64)) for a, b in ((tau, ahead), (taus[i - 1], tau))
            )
            x = x + (1 - ahead / tau) / (2 * past / h) * (d - before)
        before = u
    close(solvers.sample(denoiser, plan, NOISE, COND), x)


def test_plus_plus_outside_its_interval_is_the_solver():
    never = {**PLUS, "stop": 0}
    for solver in ("ddim", "euler", "dpmpp_2m"):
        one, none = (solvers.plan(solver, VP, 5, prediction="v", guidance=g) for g in (never, None))
        for a, b in zip(one.stages, none.stages, strict=True):
            for key, value in b.row("x").items():
                assert a.row("x").get(key, 0.0) == pytest.approx(value, rel=1e-12, abs=1e-12)
    with pytest.raises(UserError, match="solver with rows for guidance 'cfg\\+\\+'"):
        solvers.plan("heun", VP, 5, prediction="v", guidance=PLUS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("cfg", "guidance is 'cfg'; give a number, None, a form"),
        ({"name": ["apg"], "scale": 2.0}, "guidance ['apg'] is not known (did you mean 'apg'?)"),
        ({"name": "apg"}, "guidance 'apg' got no scale"),
        ({"name": "apg", "scale": 2.0, "eta": 0.0}, "option of guidance 'apg', 'eta' is not known"),
        ({"scale": True}, "scale of guidance 'cfg' is True; give a number."),
        ({"scale": 2.0, "start": 0.5}, "start of guidance 'cfg' is 0.5; give a whole number from 0."),
        ({"scale": 2.0, "stop": "3"}, "stop of guidance 'cfg' is '3'; give a whole number from 0."),
        ({"scale": 2.0, "start": 3, "stop": 2}, "acts from step 3 to 2"),
        ({"scale": 2.0, "sigma_low": 2, "sigma_high": 1.0}, "give sigma_low < sigma_high"),
        ({"name": "cfg++", "scale": 3.0}, "scale of guidance 'cfg++' is 3.0; give a number from 0 to 1."),
        (
            {"name": "rescale", "scale": 3.0, "rescale": 70},
            "rescale of guidance 'rescale' is 70.0; give a number from 0",
        ),
        ({"name": "mambo_g", "scale": 3.0, "decay": -8}, "decay of guidance 'mambo_g' is -8.0; give a number from 0."),
        (
            {"name": "apg", "scale": 3.0, "radius": 0},
            "radius of guidance 'apg' is 0.0; give a number above 0, or None.",
        ),
        ({"name": "apg", "scale": 3.0, "of": "eps"}, "of in guidance 'apg', 'eps' is not known"),
        ({"name": "cfg_zero_star", "scale": 3.0, "zero_steps": -1}, "zero_steps of guidance 'cfg_zero_star' is -1"),
        ({"name": "perp_neg", "scale": 3.0, "weights_of": [float("nan")]}, "give one number for each of one to four"),
        ([2.0, None], "guidance has 2 entries for 5 steps"),
    ],
)
def test_a_mistake_in_a_form_is_one_sentence(given, words):
    with pytest.raises(UserError) as error:
        solvers.plan("ddim", EDM, STEPS, prediction="edm", guidance=given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"clip": float("inf")}, "clip is inf; give a number above 0, or None."),
        ({"threshold": 0.9}, "threshold is 0.9; give {'quantile'"),
        ({"threshold": {"quantile": "0.9"}}, "quantile of threshold is '0.9'; give a number."),
        ({"threshold": {"most": 0.5}}, "0 < least <= most"),
        ({"threshold": {"ratio": 0.9}}, "option of threshold, 'ratio' is not known"),
        ({"threshold": {}, "clip": 1.0}, "both threshold and clip"),
    ],
)
def test_a_mistake_in_a_bound_is_one_sentence(bound, words):
    with pytest.raises(UserError) as error:
        solvers.plan("ddim", EDM, STEPS, prediction="edm", **bound)
    assert words in str(error.value)
