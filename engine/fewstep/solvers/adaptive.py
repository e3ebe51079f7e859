"""Samplers that choose their steps, each sample its own: not plans, since the times are known only on the device.

Gotta Go Fast, Jolicoeur-Martineau et al. 2021, 2105.14080, for the reverse SDE; DPM-Solver-12 and -23, Lu et al. 2022,
2206.00927, appendix C, for the ODE. A trial makes two answers of neighbouring orders; their difference, scaled by what
is tolerated, decides whether the better one is kept and how long the next step is. All of it is [B] numbers on the
device and `lincomb`s with a row per sample; the host reads one flag a trial, or none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import fewstep_kernels as fk
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.linear import coefficient_dtype, matrix
from fewstep.diffusion.real import Number
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose

MOST_TRIALS = 1000
_REMEMBERED = 6


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """x: the samples; per sample, [B]: network evaluations, steps kept and thrown away, and whether the end was
    reached (False only where the trials ran out).
    """

    x: Tensor
    evaluations: Tensor
    kept: Tensor
    rejected: Tensor
    finished: Tensor


@dataclasses.dataclass
class _State:
    """x and the lower-order answer before it [B, ...]; place (t or lambda) and step, float64 [B]."""

    x: Tensor
    previous: Tensor
    place: Tensor
    step: Tensor
    end: float
    kept: Tensor
    rejected: Tensor

    @property
    def active(self) -> Tensor:
        return self.place != self.end


Answer = Callable[[Tensor, Tensor], Tensor]
Trial = Callable[[_State, int], tuple[Tensor, Tensor, Tensor]]
Settle = Callable[[Tensor, Tensor], None]


class _Brownian:
    """A Brownian path per sample, known where rejected steps have asked it: drawing anew what was thrown away because
    of its noise would bend the law. The nearest few known points are kept, as values relative to the current one.
    """

    def __init__(self, x: Tensor, seeds: Tensor, keeps: bool) -> None:
        self.seeds, self.keeps = seeds, keeps
        self.places = torch.full((_REMEMBERED, len(x)), -math.inf, dtype=torch.float64, device=x.device)
        self.values = x.new_zeros((_REMEMBERED if keeps else 1, *x.shape))  # nearest first
        self.asked = (self.places[0], self.values[0])

    def limited(self, place: Tensor, step: Tensor) -> Tensor:
        """The step, ended at the next known point where it would go beyond or come close."""
        distance = place - self.places[0]
        return torch.where(step > 0.75 * distance, distance, step)

    def increment(self, place: Tensor, after: Tensor, number: int) -> Tensor:
        """W(after) - W(place), given what is known (a Brownian bridge); `number` is its Philox stream."""
        share = (place - after) / (place - self.places[0])  # 0 where nothing is known
        spread = torch.sqrt(((place - after) * (1.0 - share)).clamp(min=0.0))
        drawn = _combined([self.values[0]], (share, spread), noise_seeds=self.seeds, noise_stream=number)
        self.asked = (after, drawn)
        return drawn

    def settle(self, accepted: Tensor, rejected: Tensor) -> None:
        """Go on along accepted steps; remember the end of rejected ones."""
        if not self.keeps:
            return
        (after, drawn), inner = self.asked, (-1, *[1] * (self.values.ndim - 2))
        reached = after == self.places[0]
        popped, pushed = accepted & reached, rejected & ~reached
        none = torch.full_like(after, -math.inf)[None]
        fewer, more = torch.cat([self.places[1:], none]), torch.cat([after[None], self.places[:-1]])
        self.places = torch.where(pushed, more, torch.where(popped, fewer, self.places))
        ahead = torch.where(accepted.view(inner), self.values - drawn, self.values)
        fewer, more = torch.cat([ahead[1:], ahead[-1:]]), torch.cat([drawn[None], ahead[:-1]])
        self.values = torch.where(pushed.view(inner), more, torch.where(popped.view(inner), fewer, ahead))


def gotta_go_fast(
    denoiser: Denoiser,
    noise: Tensor,
    *,
    seeds: Tensor,
    cond: Any = None,
    uncond: Any = None,
    guidance: float | Mapping[str, Any] | None = None,
    start: float | None = None,
    end: float | None = None,
    first_step: float = 0.01,
    absolute: float = 0.0078,
    relative: float = 0.02,
    safety: float = 0.9,
    exponent: float = 0.9,
    growth: float = 5.0,
    redraw: bool = False,
    denoise: bool = True,
    most_trials: int = MOST_TRIALS,
    host_reads: bool = True,
) -> Adaptive:
    """Samples of the reverse SDE by stochastic Heun steps of tolerated error (2105.14080, algorithm 1).

    noise: standard normal [B, ...]; seeds: int64 [B], trial k draws Philox stream k. start, end: schedule times
    (default t_max and t_min); first_step: share of the way. absolute, relative: a step's error in an element is
    measured in max(absolute, relative max(|x'|, |x'_previous|)), and the root of its mean square may be 1; 0.0078 is
    one grey level of 256 in [-1, 1]. A step becomes safety error^-exponent times as long, `growth` times at most.
    A rejected step's noise is kept, and shorter ones are drawn given it; redraw=True forgets it, as the published code
    does, which widens the law. denoise: the last answer is x0_hat at `end`. Two evaluations a trial.
    host_reads=False runs `most_trials` trials without reading anything back: then look at `finished`.
    """
    start, end = _ends(denoiser, noise, start, end)
    _tolerances(absolute, relative, first_step, safety, growth, most_trials)
    schedule, answer = denoiser.schedule, _answer(denoiser, cond, uncond, guidance)
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.shape != noise.shape[:1]:
        raise UserError(f"seeds must be an int64 tensor with one seed per sample, [{noise.shape[0]}].")

    def trial(state: _State, number: int) -> tuple[Tensor, Tensor, Tensor]:
        t = state.place
        state.step = h = path.limited(t, state.step)
        after = torch.where(h == t - end, end, torch.where(h == t - path.places[0], path.places[0], t - h))
        increment = path.increment(t, after, number)
        of_x, of_denoised, diffusion = _reverse_drift(schedule, t)
        low = _combined([state.x, answer(state.x, t), increment], (1.0 - h * of_x, h * of_denoised, diffusion))
        of_x, of_denoised, diffusion = _reverse_drift(schedule, after)
        row = (torch.full_like(h, 0.5), 0.5 * (1.0 - h * of_x), 0.5 * h * of_denoised, 0.5 * diffusion)
        return low, _combined([state.x, low, answer(low, after), increment], row), after

    with torch.no_grad():
        x = _combined([noise], (torch.full((len(noise),), float(schedule.sigma(start))),))
        state = _started(x, start, end, first_step * (start - end))
        path = _Brownian(x, seeds, keeps=not redraw)
        limits = (absolute, relative, safety, exponent, growth)
        _drive(state, trial, path.settle, limits, most_trials, host_reads)
        evaluations = 2 * (state.kept + state.rejected)
        if not denoise:
            return Adaptive(state.x, evaluations, state.kept, state.rejected, ~state.active)
        x = answer(state.x, state.place)
        return Adaptive(x, evaluations + 1, state.kept, state.rejected, ~state.active)


def dpm_adaptive(
    denoiser: Denoiser,
    noise: Tensor,
    *,
    order: int = 3,
    form: str = "x0",
    cond: Any = None,
    uncond: Any = None,
    guidance: float | Mapping[str, Any] | None = None,
    start: float | None = None,
    end: float | None = None,
    first_step: float = 0.05,
    absolute: float = 0.0078,
    relative: float = 0.05,
    safety: float = 0.9,
    growth: float = 1.5,
    denoise: bool = False,
    most_trials: int = MOST_TRIALS,
    host_reads: bool = True,
) -> Adaptive:
    """The probability-flow ODE by DPM-Solver-12 (order 2) or -23 (order 3) with tolerated error in lambda.

    first_step is in lambda; the other arguments as in `gotta_go_fast`. form: "x0" (in the clean sample, 2211.01095) or
    "eps" (2206.00927), which needs more care with long steps. `order` evaluations a trial. The published code takes the
    batch's largest error and one step for all, and lets it grow without limit; here every sample has its own.
    """
    if order not in (2, 3):
        raise choose("order of the adaptive DPM-Solver,", order, (2, 3))
    if form not in ("eps", "x0"):
        raise choose("form of the adaptive DPM-Solver,", form, ("eps", "x0"))
    start, end = _ends(denoiser, noise, start, end)
    _tolerances(absolute, relative, first_step, safety, growth, most_trials)
    schedule, predict = denoiser.schedule, _answer(denoiser, cond, uncond, guidance)
    first, last = (float(schedule.half_log_snr(t)) for t in (start, end))

    def levels(place: Tensor) -> tuple[Tensor, Number, Number]:
        t = schedule.time_of_half_log_snr(place)
        return t, schedule.alpha(t), schedule.sigma(t)

    def answer(x: Tensor, place: Tensor) -> Tensor:
        t, alpha, sigma = levels(place)
        denoised = predict(x, t)
        return denoised if form == "x0" else _combined([x, denoised], (1.0 / sigma, -alpha / sigma))

    def row(place: Tensor, h: Tensor, ratio: float | None, linear: bool = False) -> tuple[Tensor, ...]:
        """Coefficients of x and the answers at `place` and `ratio` h further on (one answer: None), to place + h."""
        _, alpha, sigma = levels(place)
        _, alpha_to, sigma_to = levels(place + h)
        if form == "x0":
            keep, scale, sign = sigma_to / sigma, alpha_to, -1.0
        else:
            keep, scale, sign = alpha_to / alpha, -sigma_to, 1.0
        whole, slope = _moments(h, sign)
        if ratio is None:
            return keep, scale * whole
        gain = scale * (slope if linear else 0.5 * whole) / ratio
        return keep, scale * whole - gain, gain

    def trial(state: _State, number: int) -> tuple[Tensor, Tensor, Tensor]:
        at, h = state.place, state.step
        after = torch.where(h == last - at, last, at + h)
        first_answer = answer(state.x, at)
        ratio = 0.5 if order == 2 else 1.0 / 3.0
        inner = _combined([state.x, first_answer], row(at, ratio * h, None))
        second = answer(inner, at + ratio * h)
        middle = _combined([state.x, first_answer, second], row(at, h, ratio))
        if order == 2:
            return _combined([state.x, first_answer], row(at, h, None)), middle, after
        inner = _combined([state.x, first_answer, second], row(at, 2.0 / 3.0 * h, 0.5, linear=True))
        third = answer(inner, at + 2.0 / 3.0 * h)
        return middle, _combined([state.x, first_answer, third], row(at, h, 2.0 / 3.0, linear=True)), after

    with torch.no_grad():
        x = _combined([noise], (torch.full((len(noise),), float(schedule.sigma(start))),))
        state = _started(x, first, last, first_step)
        limits = (absolute, relative, safety, 1.0 / order, growth)
        _drive(state, trial, lambda accepted, rejected: None, limits, most_trials, host_reads)
        evaluations = order * (state.kept + state.rejected)
        x = state.x
        if denoise:
            x, evaluations = predict(x, schedule.time_of_half_log_snr(state.place)), evaluations + 1
        return Adaptive(x, evaluations, state.kept, state.rejected, ~state.active)


def _drive(
    state: _State,
    trial: Trial,
    settle: Settle,
    limits: tuple[float, float, float, float, float],
    most_trials: int,
    host_reads: bool,
) -> None:
    """Trials until every sample is at the end, or `most_trials`; a sample that is there stands still."""
    absolute, relative, safety, exponent, growth = limits
    for number in range(1, most_trials + 1):
        low, high, after = trial(state, number)
        size = torch.maximum(low.abs(), state.previous.abs())
        tolerated = torch.clamp(relative * size, min=absolute)
        error = torch.sqrt(fk.l2(high, low, tolerated.to(coefficient_dtype(low)) ** -2)).double()  # [B]
        active = state.active
        accepted = active & (error <= 1.0)
        chosen = accepted.view(-1, *[1] * (high.ndim - 1))
        state.x = torch.where(chosen, high, state.x)
        state.previous = torch.where(chosen, low, state.previous)
        state.place = torch.where(accepted, after, state.place)
        state.kept += accepted
        state.rejected += active & ~accepted
        settle(accepted, active & ~accepted)
        # where two orders agree by accident their difference says nothing about a much longer step
        change = (safety * error.clamp(min=1e-12) ** -exponent).nan_to_num(nan=0.1).clamp(0.1, growth)
        change = torch.where(active & ~accepted, change.clamp(max=0.7), change)  # below what `limited` rounds up
        way = (state.end - state.place).abs()
        state.step = torch.minimum(state.step * change, way)
        if host_reads and not bool(state.active.any()):
            break


def _started(x: Tensor, first: float, last: float, step: float) -> _State:
    place = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
    counts = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    length = min(step, abs(last - first))
    return _State(x, x, place, torch.full_like(place, length), last, counts, counts.clone())


def _answer(denoiser: Denoiser, cond: Any, uncond: Any, guidance: float | Mapping[str, Any] | None) -> Answer:
    def answer(x: Tensor, t: Tensor) -> Tensor:
        return denoiser.guided(x, t.to(coefficient_dtype(x)), cond, guidance, uncond)

    return answer


def _combined(inputs: list[Tensor], row: tuple[Any, ...], **drawn: Any) -> Tensor:
    """One lincomb with a row per sample."""
    coefficients = matrix([row], inputs[0].device, coefficient_dtype(*inputs))
    return fk.lincomb(inputs, coefficients.to(inputs[0].device), dtypes=[inputs[0].dtype], **drawn)[0]


def _reverse_drift(schedule: Schedule, t: Tensor) -> tuple[Number, Number, Number]:
    """(of x, of x0_hat, g): the reverse SDE runs back by dx = (of_x x - of_denoised x0_hat) dt + g dW (2011.13456).

    f = alpha'/alpha, g^2 = 2 sigma sigma' - 2 f sigma^2, score = (alpha x0_hat - x)/sigma^2.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    alpha_rate, sigma_rate = schedule.derivatives(t)
    drift = alpha_rate / alpha
    variance = 2.0 * sigma * (sigma_rate - drift * sigma)
    share = variance / (sigma * sigma)
    return drift + share, share * alpha, torch.sqrt(variance.clamp(min=0.0))


def _moments(h: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """(I_0, I_1) of `moments.decaying` (sign -1) or (J_0, J_1) of `moments.growing` (sign +1), for h >= 0 [B]."""
    whole = sign * torch.expm1(sign * h)
    series = h * (0.5 + sign * h * (1.0 / 6.0 + sign * h * (1.0 / 24.0 + sign * h / 120.0)))
    safe = torch.where(h > 1e-3, h, torch.ones_like(h))
    return whole, torch.where(h > 1e-3, sign * (whole / safe - 1.0), series)


def _ends(denoiser: Any, noise: Any, start: float | None, end: float | None) -> tuple[float, float]:
    if not isinstance(denoiser, Denoiser):
        raise UserError(f"an adaptive sampler needs a Denoiser and got {type(denoiser).__name__}; wrap the network.")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.ndim < 2:
        raise UserError("noise must be a floating-point tensor [B, ...] of standard normal numbers.")
    schedule = denoiser.schedule
    first = schedule.t_max if start is None else float(start)
    last = schedule.t_min if end is None else float(end)
    if start is None and not schedule.ratio(first) < 1e12:  # as the grids laid in sigma/alpha
        first -= 1e-3 * (first - schedule.t_clean)
    if not schedule.t_clean < last < first <= schedule.last_time or not math.isfinite(schedule.ratio(first)):
        raise UserError(
            f"an adaptive sampler goes from start={first!r} to end={last!r}; give {schedule.t_clean:g} < end < start, "
            "where alpha and sigma are above zero."
        )
    return first, last


def _tolerances(
    absolute: float, relative: float, first_step: float, safety: float, growth: float, most_trials: int
) -> None:
    if not (absolute > 0 and relative >= 0 and first_step > 0 and 0 < safety <= 1 < growth and most_trials >= 1):
        raise UserError(
            f"absolute={absolute!r}, relative={relative!r}, first_step={first_step!r}, safety={safety!r}, "
            f"growth={growth!r} and most_trials={most_trials!r}: give numbers above 0 (relative may be 0, safety is at "
            "most and growth above 1)."
        )
