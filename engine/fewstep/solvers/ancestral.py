"""Ancestral sampling: DDPM with its variances, and Euler ancestral.

Ho et al. 2020, 2006.11239; Analytic-DPM, Bao et al. 2022, 2201.06503.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.diffusion import real
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import multistep, rows
from fewstep.solvers.churn import level_down, lifted
from fewstep.solvers.ddim import ddim
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Part, Row
from fewstep.solvers.reading import SHAPED
from fewstep.solvers.registry import register
from fewstep.solvers.spacing import COORDINATES

VARIANCES = ("fixed_small", "fixed_large", "analytic", "learned_range", "learned", "second_moment", "residual")
EXTENDED = ("second_moment", "residual")


@register("euler_a", "weak order 1, one evaluation a step; k-diffusion's Euler ancestral, which is ddim with eta=1")
def euler_a(
    schedule: Schedule,
    times: Sequence[float],
    *,
    prediction: Prediction,
    eta: float = 1.0,
    coordinate: str = "ratio",
) -> list[Row]:
    """The deterministic step down to sigma_down and fresh noise up to sigma': in every coefficient DDIM(eta).

    `coordinate` is where sigma_down lies below sigma': "ratio" (sigma/alpha), or "flow" (sigma/(alpha + sigma)), which
    is another sampler, of less noise: ComfyUI's Euler ancestral for flow models (LTX-Video, Flux).
    """
    multistep.chosen("euler_a", "coordinate", coordinate, COORDINATES)
    same = ddim(schedule, times, prediction=prediction, eta=eta)
    if coordinate == "ratio" or eta == 0.0:
        return same
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        down = level_down(schedule, t, s, eta, coordinate)
        of_x, of_denoised = rows.jump(schedule, t, down)
        table.append(lifted(schedule, Row(t, down, {"x": {"x": of_x, "D": of_denoised}}, step), s))
    return table


@register("ddpm", "weak order 1, one evaluation a step; 2006.11239, analytic variance 2201.06503")
def ddpm(
    schedule: Schedule,
    times: Sequence[float],
    *,
    variance: str = "fixed_small",
    noise_moments: Sequence[float] | None = None,
    eta: float = 1.0,
    final_noise: bool = False,
    covariance_clip: float | None = None,
    pixel_clip: float | None = None,
    pixel_clip_steps: int = 1,
) -> list[Row]:
    """The posterior mean and noise of a chosen variance; respaced to whatever times are given.

    `variance`: "fixed_small" (of the posterior given x0), "fixed_large" (of the forward step), or "analytic", the
    optimal one, from `noise_moments`: E||eps_hat||^2 per number at each evaluation time (see `noise_moments()`).

    Number by number: "learned_range", between the logarithms of the first two by the network's second answer (2 C
    channels; 2102.09672, eq. 15), "learned", that answer itself; and the optimal one of 2206.07309 from a further
    network in the role "moment": "second_moment" of E[eps^2], "residual" of E[(eps - eps_hat)^2] (SN- and NPR-DPM).

    `eta` below 1 is DDIM's mean, for "analytic", "fixed_small" and those of 2206.07309. The last step draws no noise;
    `final_noise` draws it where sigma' > 0, as the chain between two levels needs, and "fixed_large" on any end, as
    diffusers does.

    What Analytic-DPM's own code clips besides, for pictures in [-1, 1]: `covariance_clip` (1 there, for "analytic") is
    the most that Cov[x0 | x_t] = (sigma/alpha)^2 (1 - Gamma) may be, a bound that holds for data within +-sqrt of it;
    `pixel_clip` (1 or 2 there, for variances that are numbers) keeps the mean size of the noise in the
    `pixel_clip_steps` steps before the last at so many of 255 levels: its std at most pixel_clip (2/255) sqrt(pi/2).
    """
    multistep.chosen("ddpm", "variance", variance, VARIANCES)
    multistep.falling("ddpm", times, "it only goes down, use ddim, euler or heun for inversion.")
    only_one = variance in ("fixed_large", "learned_range", "learned")
    if not 0.0 <= eta <= 1.0 or (only_one and eta != 1.0):
        raise UserError(
            f"solver 'ddpm' with variance={variance!r} got eta={eta!r}; give {1 if only_one else '0 to 1'}."
        )
    steps = len(times) - 1
    if (variance == "analytic") != (noise_moments is not None):
        raise UserError("solver 'ddpm' takes noise_moments with variance='analytic' and only then; give both or none.")
    if noise_moments is not None and (len(noise_moments) != steps or not all(0.0 <= m <= 1.0 for m in noise_moments)):
        raise UserError(
            f"noise_moments are {list(noise_moments)!r}; give {steps} numbers from 0 to 1, one per evaluation."
        )
    _check_clips(variance, covariance_clip, pixel_clip, pixel_clip_steps)
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        of_x, of_denoised, of_noise = rows.noisy_jump(schedule, t, s, eta)
        # the bracket of 2201.06503, eq. 8: alpha' sigma/alpha less what the mean keeps of eps
        spread = of_denoised * real.divide(schedule.sigma(t), schedule.alpha(t))
        if variance == "fixed_large":
            of_noise = rows.renoise(schedule, s, t)[1]
        elif noise_moments is not None:
            left = 1.0 - noise_moments[step]
            if covariance_clip is not None:
                left = min(left, covariance_clip / schedule.ratio(t) ** 2)
            of_noise = math.sqrt(of_noise**2 + spread**2 * left)
        if pixel_clip is not None and step >= steps - 1 - pixel_clip_steps:
            of_noise = min(of_noise, pixel_clip * (2.0 / 255.0) * math.sqrt(0.5 * math.pi))
        if step == steps - 1 and not (final_noise and (variance == "fixed_large" or not is_clean(schedule, s))):
            of_noise = 0.0
        elif variance in ("learned_range", "learned"):
            options = (("small", of_noise), ("large", rows.renoise(schedule, s, t)[1]))
            part = Part(variance, ("noise", "variance"), (SHAPED,), options if variance == "learned_range" else ())
            update = {"x": of_x, "D": of_denoised, SHAPED: 1.0}
            table.append(Row(t, s, {"x": update}, step, answers=("variance",), parts=(part,)))
            continue
        elif variance in EXTENDED:
            table.append(_extended(t, s, variance, of_x, of_denoised, of_noise, spread, step))
            continue
        answers = ("variance",) if variance in ("learned_range", "learned") else ()
        update = {"x": of_x, "D": of_denoised, "noise": of_noise}
        table.append(Row(t, s, {"x": update}, step, answers=answers))
    return table


def _check_clips(variance: str, covariance_clip: float | None, pixel_clip: float | None, steps: int) -> None:
    for option, value, known in (
        ("covariance_clip", covariance_clip, ("analytic",)),
        ("pixel_clip", pixel_clip, ("analytic", "fixed_large", "fixed_small")),
    ):
        if value is not None and not (0.0 <= value < math.inf and variance in known):
            raise UserError(
                f"solver 'ddpm' with variance={variance!r} got {option}={value!r}; give a number of at least 0, with "
                f"variance {' or '.join(map(repr, known))}, or None."
            )
    if steps < 0:
        raise UserError(f"solver 'ddpm' got pixel_clip_steps={steps!r}; give a whole number of at least 0.")


def _extended(
    t: float, s: float, variance: str, of_x: float, of_denoised: float, of_noise: float, spread: float, step: int
) -> Row:
    """Noise of variance lambda^2 + spread^2 (moment - eps_hat^2), number by number (2206.07309, eq. 9 and 14)."""
    options = (("base", of_noise * of_noise), ("gain", spread * spread))
    asked = {"moment": ("moment",)}
    update = {"x": of_x, "D": of_denoised, SHAPED: 1.0}
    if variance == "residual":
        part = Part("residual", ("noise", "moment"), (SHAPED,), options)
        return Row(t, s, {"x": update}, step, others=asked, parts=(part,))
    part = Part("second_moment", ("noise", "E", "moment"), (SHAPED,), options)
    return Row(t, s, {"x": update}, step, others=asked, parts=(part,))


def noise_moments(
    denoiser: Denoiser, samples: Tensor, times: Sequence[float], generator: torch.Generator | None = None
) -> list[float]:
    """Gamma_t = E||eps_hat(x_t, t)||^2 per number at each of `times`, by Monte Carlo over clean `samples` [B, ...].

    2201.06503, eq. 9; clipped to [0, 1]. Estimated once per model: the list is an option of plan("ddpm", ...).
    """
    found = []
    with torch.no_grad():
        for t in times:
            noise = torch.randn(samples.shape, generator=generator, dtype=samples.dtype, device=samples.device)
            x = denoiser.schedule.add_noise(samples, noise, t)
            found.append(min(float(denoiser.eps(x, t).square().mean()), 1.0))
    return found
