"""The coefficients of one solver update, for times that are floats (plans) or tensors [B] (methods).

x' = k_x x + k_D D_0 + ..., with D the clean-sample estimate. These hold for any (alpha, sigma). A target with sigma = 0
is legal everywhere: the row is then x' = alpha' D_0.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.diffusion import real
from fewstep.diffusion.real import Number, Real
from fewstep.diffusion.schedules import Schedule


def jump(schedule: Schedule, t: Real, s: Real) -> tuple[Number, Number]:
    """(of x, of D_0): the deterministic first-order step, DDIM = Euler (2010.02502, eq. 12 with eta = 0)."""
    keep = schedule.sigma(s) / schedule.sigma(t)
    return keep, schedule.alpha(s) - schedule.alpha(t) * keep


def noisy_jump(schedule: Schedule, t: Real, s: Real, eta: float) -> tuple[Number, Number, Number]:
    """(of x, of D_0, of noise): DDIM(eta) (2010.02502, eq. 12 and 16); eta = 1 is DDPM with the posterior variance."""
    sigma, sigma_to = schedule.sigma(t), schedule.sigma(s)
    alpha, alpha_to = schedule.alpha(t), schedule.alpha(s)
    # e^{-2h} = (tau'/tau)^2, and (alpha sigma'/(alpha' sigma)) is that ratio where alpha' > 0
    shrink = (alpha * sigma_to) / (alpha_to * sigma)
    noise = eta * sigma_to * real.sqrt_or_zero(1.0 - shrink * shrink)
    keep = real.sqrt_or_zero(sigma_to * sigma_to - noise * noise) / sigma
    return keep, alpha_to - alpha * keep, noise


def two_step(schedule: Schedule, before: Real, t: Real, s: Real, variant: str) -> tuple[Number, Number, Number]:
    """(of x, of D_0, of D_1): DPM-Solver++ 2M (2211.01095, algorithm 2), D_1 taken at time `before`.

    With h = lambda' - lambda and g = lambda - lambda_before the slope's weight is I_0/2 ("midpoint", the paper's) or
    I_1 = 1 - I_0/h ("exact", the exponential integral), times h/g.
    """
    keep, gain = jump(schedule, t, s)
    at, to, past = schedule.half_log_snr(t), schedule.half_log_snr(s), schedule.half_log_snr(before)
    if isinstance(gain, Tensor):
        clean = schedule.sigma(s) == 0
        step = real.select(clean, real.constant(gain, 1.0), to - at)
    else:
        clean, step = schedule.sigma(s) == 0, to - at
        if clean or real.isinf(at) or real.isinf(past):
            return keep, gain, 0.0
    if variant == "midpoint":
        slope = 0.5 * gain * step / (at - past)
    else:
        # alpha' I_1 = alpha' - (alpha' I_0)/h
        slope = (schedule.alpha(s) - gain / step) * step / (at - past)
    slope = real.select(clean, real.constant(gain, 0.0), slope)
    return keep, gain + slope, -slope


def trapezoid(schedule: Schedule, t: Real, s: Real, coordinate: str) -> tuple[Number, Number, Number, Number]:
    """(of base, of D at t, of x at s, of D at s): the second stage of Heun (2206.00364, algorithm 1).

    In the coordinate c = sigma/n of x/n, with n = alpha ("ratio": EDM's) or n = alpha + sigma ("flow": flow matching's,
    finite at pure noise), the slope of the probability-flow path is (x/n - D)/c. At sigma' = 0 the row is Euler's.
    """

    def norm(time: Real) -> Number:
        alpha = schedule.alpha(time)
        return alpha if coordinate == "ratio" else alpha + schedule.sigma(time)

    n, n_to = norm(t), norm(s)
    c, c_to = schedule.sigma(t) / n, schedule.sigma(s) / n_to
    half = 0.5 * (c_to - c)
    clean = c_to == 0
    safe = real.select(clean, real.constant(c_to, 1.0), c_to)
    keep, gain = jump(schedule, t, s)
    zero = real.constant(keep, 0.0)
    return (
        real.select(clean, keep, n_to / n * (1.0 + half / c)),
        real.select(clean, gain, -n_to * half / c),
        real.select(clean, zero, half / safe),
        real.select(clean, zero, -n_to * half / safe),
    )


def renoise(schedule: Schedule, e: Real, s: Real) -> tuple[Number, Number]:
    """(of f, of noise): from an answer at time e (sigma_e = 0 for a clean one) up to time s by fresh noise.

    VE form sqrt(s^2 - e^2) of 2303.01469, algorithm 1, for any (alpha, sigma).
    """
    keep = schedule.alpha(s) / schedule.alpha(e)
    sigma, carried = schedule.sigma(s), keep * schedule.sigma(e)
    return keep, real.sqrt_or_zero((sigma - carried) * (sigma + carried))
