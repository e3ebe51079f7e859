"""A teacher in distillation, asked at a time for each sample, is guided as a sampler's step at that time is."""

from __future__ import annotations

import pytest
import torch

from fewstep import config, solvers
from fewstep.diffusion import Denoiser, guidance, schedules, teacher_guidance
from fewstep.errors import UserError
from fewstep.methods import Method, get
from fewstep.nets import Network
from fewstep.solvers import adaptive
from fewstep.solvers.era import era

TIMES = (0.3, 0.45, 0.8)
COND = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)


class Net(torch.nn.Module):
    def __init__(self, slope=0.7):
        super().__init__()
        self.slope = slope

    def forward(self, x, t, cond):
        rolled = torch.roll(x, 1, -1)
        shift = cond.view(-1, 1, 1, 1)
        return torch.tanh(self.slope * x + 0.2 * shift * rolled) + 0.1 * shift + 0.05 * t.view(-1, 1, 1, 1)

    def null(self, cond):
        return torch.zeros_like(cond)


def start():
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


FORMS = {
    "cfg": {"name": "cfg", "scale": 3.0},
    "interval": {"name": "interval", "scale": 3.0, "sigma_low": 0.5, "sigma_high": 1.0},
    "an interval without its upper end": {"name": "interval", "scale": 3.0, "sigma_low": 0.5},
    "rescale": {"name": "rescale", "scale": 3.0, "rescale": 0.6},
    "rescale of clean estimates": {"name": "rescale", "scale": 3.0, "of": "denoised"},
    "rescale in an interval": {"name": "rescale", "scale": 3.0, "sigma_high": 1.0},
    "apg": {"name": "apg", "scale": 3.0, "radius": 0.7, "parallel": 0.2},
    "apg of outputs": {"name": "apg", "scale": 3.0, "of": "output", "base": "uncond"},
    "cfg_zero_star": {"name": "cfg_zero_star", "scale": 3.0, "zero_steps": 0},
    "mambo_g": {"name": "mambo_g", "scale": 3.0, "decay": 1.0},
    "tcfg": {"name": "tcfg", "scale": 3.0},
    "autoguidance": {"name": "autoguidance", "scale": 2.0},
    "autoguidance in an interval": {"name": "autoguidance", "scale": 2.0, "sigma_low": 0.5},
    "perturbed": {"name": "perturbed", "scale": 2.0, "perturbed_scale": 1.5},
    "perturbed alone": {"name": "perturbed", "scale": 1.0},
    "perp_neg": {"name": "perp_neg", "scale": 3.0, "weights_of": [1.0, 0.5]},
}
NEGATIVES = (3, 2)


@pytest.mark.parametrize("kind", ("x0", "eps", "v", "flow", "edm"))
@pytest.mark.parametrize("form", FORMS)
def test_each_samples_estimate_is_that_of_a_samplers_step_at_its_time(form, kind):
    """The rows of a plan are made by other code, from floats; at 0.3, 0.45 and 0.8 sigma/alpha is 0.43, 0.82 and 4."""
    schedule = schedules.get("flow")
    denoiser = Denoiser(Net(), schedule, kind)
    x, times = start(), torch.tensor(TIMES, dtype=torch.float64)
    further = {role: Denoiser(Net(0.4), schedule, kind) for role in guidance.get(FORMS[form]).roles}
    away = [torch.full_like(COND, label) for label in NEGATIVES] if FORMS[form]["name"] == "perp_neg" else []
    method = Method()
    method.others, method.negatives = {role: Network(one) for role, one in further.items()}, NEGATIVES[: len(away)]
    found = method.guided(Network(denoiser), x, times, COND, guidance=FORMS[form])
    for place, t in enumerate(TIMES):
        one = slice(place, place + 1)
        plan = solvers.plan(
            "ddim", schedule, 1, grid=[t, 0.1], prediction=kind, guidance=FORMS[form], initial_scale=1.0
        )
        asked = {"others": further, "negatives": [label[one] for label in away]}
        expected = solvers.execute(plan, denoiser, x[one], cond=COND[one], **asked).denoised
        torch.testing.assert_close(found[one], expected, rtol=1e-11, atol=1e-11)


def test_a_number_and_its_form_are_one():
    denoiser, t = Network(Denoiser(Net(), schedules.get("vp"), "eps")), torch.tensor(TIMES, dtype=torch.float64)
    by_number = Method().guided(denoiser, start(), t, COND, guidance=3.0)
    torch.testing.assert_close(
        Method().guided(denoiser, start(), t, COND, guidance=FORMS["cfg"]), by_number, rtol=1e-14, atol=1e-14
    )
    assert not torch.allclose(by_number, denoiser.value(start(), t, COND))
    plain = Method().guided(denoiser, start(), t, COND, guidance={"name": "cfg", "scale": 1.0})
    assert torch.equal(plain, denoiser.value(start(), t, COND))


@pytest.mark.parametrize("form", ("cfg", "interval", "rescale", "apg", "tcfg"))
def test_a_denoiser_alone_takes_the_forms_that_ask_two_answers(form):
    """And with it every sampler without a plan: they ask `Denoiser.guided`."""
    denoiser, x = Denoiser(Net(), schedules.get("flow"), "flow"), start()
    for t in (torch.tensor(TIMES, dtype=torch.float64), 0.45):
        times = t if isinstance(t, torch.Tensor) else torch.full((3,), t, dtype=torch.float64)
        expected = Method().guided(Network(denoiser), x, times, COND, guidance=FORMS[form])
        torch.testing.assert_close(denoiser.guided(x, t, COND, FORMS[form]), expected, rtol=1e-12, atol=1e-12)
    for name in ("autoguidance", "perp_neg"):
        with pytest.raises(UserError, match=f"guidance '{name}' asks more than cond and uncond"):
            denoiser.guided(x, 0.45, COND, FORMS[name])


def test_a_sampler_without_a_plan_is_guided_in_forms():
    """With no share rescaled it is plain guidance; the whole share changes what is sampled."""
    denoiser, noise = Denoiser(Net(), schedules.get("vp"), "eps"), start()
    kept, none = ({"name": "rescale", "scale": 3.0, "rescale": share} for share in (1.0, 0.0))
    for sampler in (adaptive.dpm_adaptive, lambda *given, **named: era(*given, 6, **named)):
        found = [sampler(denoiser, noise, cond=COND, guidance=one) for one in (3.0, none, kept)]
        plain, same, other = (x.x if hasattr(x, "x") else x for x in found)
        torch.testing.assert_close(same, plain, rtol=1e-9, atol=1e-9)
        assert (other - plain).abs().max() > 1e-2


@pytest.mark.parametrize("form", ("interval", "rescale", "apg of outputs"))
def test_a_guided_estimate_is_differentiable(form):
    denoiser, t = Network(Denoiser(Net(), schedules.get("flow"), "flow")), torch.tensor(TIMES, dtype=torch.float64)
    x = start()[..., :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: Method().guided(denoiser, x, t, COND, guidance=FORMS[form], way="fixed"), (x,)
    )


def test_at_a_clean_end_the_estimate_is_the_sample():
    """There the network's output says nothing: D = x whatever F, and no weight may be infinite times zero."""
    schedule, x = schedules.get("flow"), start()
    form, t = guidance.get(FORMS["rescale"]), torch.zeros(3, dtype=torch.float64)
    found = teacher_guidance.guided(
        form, x, t, {"cond": x, "uncond": x}, schedule, Denoiser(Net(), schedule, "flow").prediction
    )
    torch.testing.assert_close(found, x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("bounds", "acts"), [({"sigma_low": 0.5}, True), ({"sigma_high": 5.0}, False)])
def test_at_pure_noise_the_level_is_above_every_bound(bounds, acts):
    """alpha is 0 there, where consistency distillation's first node and DMD2's student start."""
    schedule, x, t = schedules.get("flow"), start(), torch.ones(3, dtype=torch.float64)
    form, answers = guidance.get({"name": "interval", "scale": 3.0, **bounds}), {"cond": x + 1.0, "uncond": x}
    found = teacher_guidance.guided(form, x, t, answers, schedule, Denoiser(Net(), schedule, "flow").prediction)
    torch.testing.assert_close(found, x + (3.0 if acts else 1.0), rtol=1e-14, atol=1e-14)


UNFIT = {
    "cfg++": ({"scale": 0.5}, "a rule of what a solver puts back"),
    "classifier": ({"scale": 2.0}, "asks for a gradient that no artefact gives"),
    "cfg": ({"scale": 2.0, "stop": 4}, "count a sampler's steps"),
    "cfg_zero_star": ({"scale": 2.0}, "with zero_steps 1"),
    "apg": ({"scale": 2.0, "momentum": -0.5}, "with momentum"),
    "rescaled": ({"scale": 2.0}, "did you mean 'rescale'"),
    "rescale": ({"scale": 2.0, "share": 0.5}, "option of guidance 'rescale'"),
    "interval": ({"sigma_high": 0.5}, "got no scale"),
}


def recipe(method, form, **further):
    return {"name": "x", "teacher": "nowhere", "output": "out", "method": {"name": method, "guidance": form}, **further}


@pytest.mark.parametrize("method", ("consistency_distillation", "dmd2"))
@pytest.mark.parametrize("name", UNFIT)
def test_what_a_teacher_cannot_do_is_said_when_the_recipe_is_read(name, method):
    options, words = UNFIT[name]
    with pytest.raises(UserError) as caught:
        config.from_dict(recipe(method, {"name": name, **options}))
    message = str(caught.value)
    assert words in message and message.startswith("method.guidance {'name': ")
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("given", ("strong", True, [1.0, 2.0], float("inf")))
def test_what_is_neither_a_number_nor_a_form_is_refused(given):
    with pytest.raises(UserError, match=r"^method.guidance .*(give a number, or a form such as|a finite number)"):
        config.from_dict(recipe("dmd2", given))


@pytest.mark.parametrize("method", ("consistency_distillation", "dmd2"))
@pytest.mark.parametrize("form", FORMS)
def test_a_recipe_holds_its_form_and_is_read_back(form, method):
    asked = guidance.get(FORMS[form])
    further = {"others": dict.fromkeys(asked.roles, "a/folder")}
    further["negatives"] = [*NEGATIVES] if asked.name == "perp_neg" else []
    made = config.from_dict(recipe(method, FORMS[form], **further))
    assert guidance.get(made.method["guidance"]) == guidance.get(FORMS[form])
    assert config.from_dict(made.to_dict()) == made
    assert get(method)(made.method_config()).config.guidance == made.method["guidance"]


@pytest.mark.parametrize(
    ("form", "further", "words"),
    [
        ("autoguidance", {}, "asks a network in the role 'weak'; set others.weak to an artefact folder."),
        (
            "autoguidance",
            {"others": {"weak": "a", "head": "b"}},
            "others.head names an artefact and method.guidance asks",
        ),
        ("cfg", {"others": {"weak": "a"}}, "others.weak names an artefact and method.guidance asks no other network"),
        ("perp_neg", {"negatives": [1]}, "negatives is [1] and method.guidance takes 2; give that many classes."),
        ("cfg", {"negatives": [1]}, "negatives is [1] and method.guidance takes 0"),
        ("perp_neg", {"negatives": [1, -1]}, "negatives.1 is -1"),
    ],
)
def test_what_a_form_asks_besides_is_checked_when_the_recipe_is_read(form, further, words):
    with pytest.raises(UserError) as caught:
        config.from_dict(recipe("dmd2", FORMS[form], **further))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_form_is_either_taken_or_refused():
    assert {*teacher_guidance.names()} | {*UNFIT} >= {*guidance.names()}
    for name in teacher_guidance.names():
        options = {"zero_steps": 0} if name == "cfg_zero_star" else {}
        assert teacher_guidance.get({"name": name, "scale": 2.0, **options}).scale == 2.0
