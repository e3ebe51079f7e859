"""Guidance and bounds mean the same in every solver: its plan for a network that guides and bounds its own answers."""

from __future__ import annotations

import pytest
import torch

from fewstep import solvers
from fewstep.diffusion import gram_guidance, schedules
from fewstep.diffusion.prediction import Prediction

STEPS = 6
NOISE = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COND = torch.tensor([0.5, -0.8, 0.2], dtype=torch.float64)
SEEDS = torch.arange(3)
EDM = schedules.get("edm")
ALONE = [name for name in solvers.names() if not solvers.plan(name, EDM, 3, prediction="edm").roles]
# splitting applies what guidance adds in steps of its own
WHOLE = [name for name in ALONE if name not in ("ltsp", "stsp")]


def net(x, t, cond):
    shift = cond[:, None, None, None] + torch.sin(t)[:, None, None, None]
    return torch.tanh(0.8 * x.flip(2) + shift) + 0.3 * x


def cfg(c, u):
    return u + 2.5 * (c - u)


def rescaled(c, u):
    return gram_guidance.rescaled(c, u, 2.5)


def projected(c, u):
    return gram_guidance.projected(c, u, 2.5, radius=1.5)[0]


FORMS = {
    "cfg": (2.5, cfg),
    "rescale": ({"name": "rescale", "scale": 2.5, "of": "denoised"}, rescaled),
    "apg": ({"name": "apg", "scale": 2.5, "radius": 1.5}, projected),
}


def changed(schedule, kind, change):
    """A network whose clean estimate is change(conditional one, unconditional one)."""

    def call(x_scaled, told, cond):
        t = float(schedule.time_of_network_time(told[0])) if kind.kind != "edm" else float(torch.exp(4.0 * told[0]))
        x = x_scaled / float(kind.input_scale(schedule, t))
        of_x, of_output = (float(value) for value in kind.coefficients(schedule, t))
        clean = [of_x * x + of_output * net(x_scaled, told, one) for one in (cond, 0 * cond)]
        return (change(*clean) - of_x * x) / of_output

    return call


def compared(solver, name, kind, change, **options):
    schedule, kind = schedules.get(name), Prediction(kind)
    grid = {"name": "log_snr"} if name == "vp" else None
    asked, plain = (solvers.plan(solver, schedule, STEPS, prediction=kind, grid=grid, **more) for more in (options, {}))
    found = solvers.sample(net, asked, NOISE, COND, uncond=0 * COND, seeds=SEEDS)
    expected = solvers.sample(changed(schedule, kind, change), plain, NOISE, COND, seeds=SEEDS)
    # float64; dividing by c_out at the last, nearly clean time costs digits
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("name", "kind"), [("edm", "edm"), ("vp", "eps")])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", WHOLE)
def test_a_form_of_guidance(solver, form, name, kind):
    guidance, change = FORMS[form]
    compared(solver, name, kind, change, guidance=guidance)


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("solver", WHOLE)
def test_a_bound_on_the_clean_estimate(solver, guidance):
    def bounded(c, u):
        return (c if guidance is None else cfg(c, u)).clamp(-0.6, 0.6)

    compared(solver, "edm", "edm", bounded, guidance=guidance, clip=0.6)
