"""Guidance of a teacher in distillation: the forms of sampling, on clean estimates at every sample's own time.

A sampler knows each step's time as a number and folds guidance into its rows. A method asks its teacher at times [B],
so bounds on the noise level are decided on the device, sample by sample; the weights are those of `guidance_forms` and
`gram_guidance`. Forms that count steps or carry something from step to step are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import guidance as guiding
from fewstep.diffusion.gram_guidance import WEIGHTS
from fewstep.diffusion.guidance_forms import (
    FORMS,
    Autoguidance,
    Classifier,
    GramGuidance,
    Guidance,
    PlusPlus,
    Projected,
    ZeroStar,
)
from fewstep.diffusion.linear import coefficient_dtype, combine
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.real import Real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep_kernels import lincomb


def get(given: float | Mapping[str, Any] | Guidance | None) -> Guidance | None:
    """The form that `guidance.get` makes of it, where a teacher asked at single times can be guided so.

    Raises UserError, one sentence, for the others.
    """
    form = guiding.get(given)
    reason = None if form is None else _unfit(form)
    if reason is not None:
        raise UserError(f"a teacher in distillation takes no {reason}; choose one of: {', '.join(names())}.")
    return form


def names() -> list[str]:
    """The forms a teacher takes, all but one at their defaults (cfg_zero_star with zero_steps: 0)."""
    return sorted(name for name, form in FORMS.items() if form not in (PlusPlus, Classifier))


def _unfit(form: Guidance) -> str | None:
    """What about it a teacher cannot do."""
    name = f"guidance {form.name!r}"
    if isinstance(form, PlusPlus):
        return f"{name}, a rule of what a solver puts back"
    if isinstance(form, Classifier):
        return f"{name}, which asks for a gradient that no artefact gives"
    if form.start != 0 or form.stop is not None:
        return f"{name} with start or stop, which count a sampler's steps (sigma_low and sigma_high it knows)"
    if isinstance(form, ZeroStar) and form.zero_steps:
        return f"{name} with zero_steps {form.zero_steps}, which counts a sampler's steps (0 it knows)"
    if isinstance(form, Projected) and form.momentum:
        return f"{name} with momentum, which a sampler carries from step to step (0 it knows)"
    return None


def guided(
    form: Guidance, x: Tensor, t: Tensor, answers: Mapping[str, Tensor], schedule: Schedule, prediction: Prediction
) -> Tensor:
    """The guided clean estimate [B, ...] at x = alpha x0 + sigma eps and times t [B].

    answers: the clean estimates for `form.conditions`, then of `form.roles`, by name. Where the form does not act, that
    for "cond" stands alone. Forms that weigh the network's raw output F get it as (D - c_x x)/c_out. Differentiable in
    x and answers.
    """
    dtype = coefficient_dtype(x, t)
    inputs = [*answers.values()]
    linear = form.weights()
    if isinstance(form, Autoguidance):  # on clean estimates, whatever the weak network predicts
        linear = {"cond": form.scale, "weak": 1.0 - form.scale}
    if linear is not None:
        row = torch.tensor([linear[name] for name in answers], dtype=dtype, device=x.device)
        weights = row.expand(len(t), 1, -1)
    elif isinstance(form, GramGuidance) and form.of == "denoised":
        weights = WEIGHTS[form.name](inputs, **form.numbers())
    else:
        assert isinstance(form, GramGuidance)
        of_x, of_output = (_column(value, t, dtype) for value in prediction.coefficients(schedule, t))
        of_output = torch.where(of_output == 0, torch.ones_like(of_output), of_output)  # where sigma is 0, D = x
        rows_of = [[-of_x / of_output, *(k * (1 / of_output) for k in row)] for row in torch.eye(len(inputs)).tolist()]
        weights = WEIGHTS[form.name](combine([x, *inputs], rows_of), **form.numbers())
        rest = of_x * (1 - weights[:, 0].sum(1))
        inputs, weights = [x, *inputs], torch.cat([rest[:, None, None], weights], -1)
    if form.sigma_low is not None or form.sigma_high is not None:
        alone = torch.zeros_like(weights)
        alone[:, :, len(inputs) - len(answers)] = 1.0
        weights = torch.where(_within(form, t, schedule)[:, None, None], weights, alone)
    return lincomb(inputs, weights.to(dtype))[0]


def _column(value: Real, t: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else torch.full_like(t, value, dtype=dtype)


def _within(form: Guidance, t: Tensor, schedule: Schedule) -> Tensor:
    """bool [B]: where the noise level sigma/alpha is above `sigma_low` and at most `sigma_high`."""
    alpha, sigma = _column(schedule.alpha(t), t, t.dtype), _column(schedule.sigma(t), t, t.dtype)
    inside = torch.ones_like(sigma, dtype=torch.bool)
    if form.sigma_low is not None:  # alpha may be 0, which an infinite bound must not multiply
        inside &= sigma > form.sigma_low * alpha
    if form.sigma_high is not None:
        inside &= sigma <= form.sigma_high * alpha
    return inside


def stored(given: Any) -> Any:
    """What a recipe holds: a number or None as it is, a form checked, its options at their defaults left out."""
    if isinstance(given, Mapping):
        form = get(given)
        assert form is not None
        return form.to_dict()
    if given is not None and (isinstance(given, bool) or not isinstance(given, (int, float))):
        raise UserError("give a number, or a form such as {name: interval, scale: 3, sigma_high: 1.6}.")
    return given


def of_config(config: Any) -> Guidance | None:
    """The form of a method's option `guidance`; None where it has none, or one of another kind."""
    given = getattr(config, "guidance", None)
    return get(given) if isinstance(given, (int, float, Mapping)) and not isinstance(given, bool) else None
