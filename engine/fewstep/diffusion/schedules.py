"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, with t growing with noise.

Every function takes a Python float (float64 arithmetic) or a tensor (same dtype out). A schedule is a frozen value:
equal parameters mean equal schedules, and `from_dict(schedule.to_dict())` gives it back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion import real
from fewstep.diffusion.linear import combine
from fewstep.diffusion.real import Number, Real
from fewstep.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all schedules share.

    `t_min` and `t_max` bound training and sampling; `t_clean` is the time at which sigma is zero (where a sampler
    ends). tau = sigma/alpha is `ratio`, lambda = log(alpha/sigma) is `half_log_snr`.
    """

    name: ClassVar[str] = ""
    t_clean: ClassVar[float] = 0.0
    t_min: float
    t_max: float

    def __post_init__(self) -> None:
        if not (self.t_clean <= self.t_min < self.t_max <= self.last_time):
            raise UserError(
                f"schedule {self.name!r} got t_min={self.t_min!r} and t_max={self.t_max!r}; "
                f"give {self.t_clean:g} <= t_min < t_max <= {self.last_time:g}."
            )

    @property
    def last_time(self) -> float:
        """The largest time at which the schedule is defined."""
        return math.inf

    def alpha(self, t: Real) -> Number:
        raise NotImplementedError

    def sigma(self, t: Real) -> Number:
        raise NotImplementedError

    def derivatives(self, t: Real) -> tuple[Number, Number]:
        """(d alpha/dt, d sigma/dt)."""
        raise NotImplementedError

    def time_of_half_log_snr(self, half_log_snr: Real) -> Number:
        raise NotImplementedError

    def ratio(self, t: Real) -> Number:
        """tau = sigma/alpha (infinite where alpha is zero)."""
        return real.divide(self.sigma(t), self.alpha(t))

    def half_log_snr(self, t: Real) -> Number:
        """lambda = log(alpha/sigma)."""
        return real.log(self.alpha(t)) - real.log(self.sigma(t))

    def log_snr(self, t: Real) -> Number:
        """log(alpha^2/sigma^2)."""
        return 2.0 * self.half_log_snr(t)

    def time_of_ratio(self, ratio: Real) -> Number:
        return self.time_of_half_log_snr(-real.log(ratio))

    def network_time(self, t: Real) -> Number:
        """What a network is told for time t, unless its prediction type says otherwise."""
        return t

    def time_of_network_time(self, told: Real) -> Number:
        return told

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise; t a float or [B]."""
        return combine([x0, noise], [[self.alpha(t), self.sigma(t)]])[0]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class VariancePreserving(Schedule):
    """Continuous VP with beta(t) linear: log alpha = -t^2 (beta_max - beta_min)/4 - t beta_min/2 (2011.13456, eq.
    33).
    """

    name: ClassVar[str] = "vp"
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_min < self.beta_max:
            raise UserError(
                f"schedule 'vp' got beta_min={self.beta_min!r} and beta_max={self.beta_max!r}; "
                "give 0 < beta_min < beta_max."
            )

    def log_alpha(self, t: Real) -> Number:
        return -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Real) -> Number:
        return real.exp(self.log_alpha(t))

    def sigma(self, t: Real) -> Number:
        return real.sqrt(-real.expm1(2.0 * self.log_alpha(t)))

    def half_log_snr(self, t: Real) -> Number:
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * real.log(-real.expm1(2.0 * log_alpha))

    def derivatives(self, t: Real) -> tuple[Number, Number]:
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        alpha = self.alpha(t)
        return -0.5 * beta * alpha, real.divide(0.5 * beta * alpha * alpha, self.sigma(t))

    def time_of_half_log_snr(self, half_log_snr: Real) -> Number:
        # log alpha = -softplus(-2 lambda)/2, then the quadratic in t, solved without cancellation
        slope = self.beta_max - self.beta_min
        twice = 2.0 * slope * real.softplus(-2.0 * half_log_snr)
        return twice / (real.sqrt(self.beta_min**2 + twice) + self.beta_min) / slope


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(u)/cos(u0), u = (t + offset)/(1 + offset) pi/2 (2102.09672, eq. 17).

    alpha reaches zero at t = 1; the default t_max stops before it, as DPM-Solver does (2206.00927, appendix D).
    """

    name: ClassVar[str] = "cosine"
    offset: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    @property
    def last_time(self) -> float:
        return 1.0

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.offset)

    @property
    def _start(self) -> float:
        return self.offset * self._rate

    def alpha(self, t: Real) -> Number:
        return real.cos(t * self._rate + self._start) / math.cos(self._start)

    def sigma(self, t: Real) -> Number:
        # 1 - alpha^2 = sin(u - u0) sin(u + u0) / cos(u0)^2
        turned = t * self._rate
        return real.sqrt(real.sin(turned) * real.sin(turned + 2.0 * self._start)) / math.cos(self._start)

    def derivatives(self, t: Real) -> tuple[Number, Number]:
        slope = -self._rate * real.sin(t * self._rate + self._start) / math.cos(self._start)
        return slope, real.divide(-slope * self.alpha(t), self.sigma(t))

    def time_of_half_log_snr(self, half_log_snr: Real) -> Number:
        log_alpha = -0.5 * real.softplus(-2.0 * half_log_snr)
        log_sigma = -0.5 * real.softplus(2.0 * half_log_snr)
        sigma, alpha = real.exp(log_sigma), real.exp(log_alpha)
        rise = sigma * sigma * math.cos(self._start) ** 2 + math.sin(self._start) ** 2
        return (real.atan2(real.sqrt(rise), alpha * math.cos(self._start)) - self._start) / self._rate


@functools.lru_cache(maxsize=16)
def _half_log_snr_table(
    train_steps: int, beta_start: float, beta_end: float, snr_shift: float, zero_snr: bool
) -> tuple[float, ...]:
    """lambda at the integer times of the scaled-linear schedule (betas linear in their square root) where it is finite:
    everywhere, or everywhere but at the last.
    """
    low, high = math.sqrt(beta_start), math.sqrt(beta_end)
    log_alpha_bar, table = 0.0, []
    for i in range(train_steps):
        log_alpha_bar += math.log1p(-((low + (high - low) * i / (train_steps - 1)) ** 2))
        table.append(0.5 * (log_alpha_bar - math.log(-math.expm1(log_alpha_bar)) - math.log(snr_shift)))
    if not zero_snr:
        return tuple(table)
    first, *inner, last = (1.0 / math.sqrt(1.0 + math.exp(-2.0 * value)) for value in table)
    alphas = ((alpha - last) * first / (first - last) for alpha in inner)
    return (table[0], *(math.log(alpha) - 0.5 * math.log1p(-alpha * alpha) for alpha in alphas))


@functools.lru_cache(maxsize=32)
def _table_tensor(table: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(table, device=device, dtype=dtype)


def _on_device(table: tuple[float, ...], like: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return torch.tensor(table, device=like.device, dtype=like.dtype)
    return _table_tensor(table, like.device, like.dtype)


@dataclasses.dataclass(frozen=True)
class DiscreteVariancePreserving(Schedule):
    """Stable Diffusion's 1000 indices, t in [0, 999] (2112.10752).

    lambda is linear in t between the indices; from t = 0 down to t = -1, where the picture is clean, tau is.
    `snr_shift` divides alpha^2/sigma^2 (CogVideoX's snr_shift_scale, 2408.06072). `zero_snr` then shifts and scales
    alpha to zero at the last index, the first keeping its value (2305.08891, algorithm 1; diffusers'
    rescale_betas_zero_snr): in the last interval alpha/sigma is linear in t, as tau is in the first.
    """

    name: ClassVar[str] = "sd"
    t_clean: ClassVar[float] = -1.0
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000
    t_min: float = 0.0
    t_max: float = 999.0
    snr_shift: float = 1.0
    zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.snr_shift > 0:
            raise UserError(f"schedule {self.name!r} got snr_shift={self.snr_shift!r}; give a number above 0.")
        least = 3 if self.zero_snr else 2
        if not (0 < self.beta_start <= self.beta_end < 1 and self.train_steps >= least):
            raise UserError(
                f"schedule {self.name!r} got beta_start={self.beta_start!r}, beta_end={self.beta_end!r}, train_steps="
                f"{self.train_steps!r}; give 0 < beta_start <= beta_end < 1 and at least {least} train_steps."
            )

    @property
    def last_time(self) -> float:
        return self.train_steps - 1.0

    @property
    def _table(self) -> tuple[float, ...]:
        return _half_log_snr_table(self.train_steps, self.beta_start, self.beta_end, self.snr_shift, self.zero_snr)

    def _last(self, t: Real) -> tuple[bool | Tensor, Number]:
        """(whether t is in the interval down to alpha = 0, alpha/sigma there and 1 elsewhere)."""
        if not self.zero_snr:
            return False, 1.0
        end, rate = self.last_time, math.exp(self._table[-1])
        if isinstance(t, Tensor):
            late = t > end - 1.0
            return late, torch.where(late, rate * torch.clamp(end - t, min=0.0), torch.ones_like(t))
        return (True, rate * max(end - t, 0.0)) if t > end - 1.0 else (False, 1.0)

    def _segment(self, t: Real) -> tuple[Number, Number, Number]:
        """(lambda at the index below, change of lambda to the next, fraction of the way)."""
        most = len(self._table) - 2
        if isinstance(t, Tensor):
            table = _on_device(self._table, t)
            index = t.detach().floor().clamp(0, most).long()
            return table[index], table[index + 1] - table[index], t - index.to(t.dtype)
        below = min(max(math.floor(t), 0), most)
        return self._table[below], self._table[below + 1] - self._table[below], t - below

    def _tabled(self, t: Real) -> Number:
        """lambda from the table, straight on beyond its end; below t = 0, where tau is linear."""
        below, change, fraction = self._segment(t)
        inside = below + change * fraction
        if isinstance(t, Tensor):
            early = t < 0
            return torch.where(
                early, self._table[0] - torch.log(torch.where(early, t + 1.0, torch.ones_like(t))), inside
            )
        return inside if t >= 0 else self._table[0] - real.log(t + 1.0)

    def half_log_snr(self, t: Real) -> Number:
        late, signal = self._last(t)
        return real.select(late, real.log(signal), self._tabled(t))

    def ratio(self, t: Real) -> Number:
        return real.exp(-self.half_log_snr(t))

    def alpha(self, t: Real) -> Number:
        late, signal = self._last(t)
        ratio = real.exp(-self._tabled(t))
        return real.select(late, signal / real.sqrt(1.0 + signal * signal), 1.0 / real.sqrt(1.0 + ratio * ratio))

    def sigma(self, t: Real) -> Number:
        late, signal = self._last(t)
        ratio = real.exp(-self._tabled(t))
        return real.select(late, 1.0 / real.sqrt(1.0 + signal * signal), ratio / real.sqrt(1.0 + ratio * ratio))

    def derivatives(self, t: Real) -> tuple[Number, Number]:
        late, signal = self._last(t)
        _, change, _ = self._segment(t)
        ratio = real.exp(-self._tabled(t))
        slope = real.select(t < 0, real.constant(t, math.exp(-self._table[0])), -change * ratio)
        cube = (1.0 + ratio * ratio) ** -1.5
        falling = -math.exp(self._table[-1]) * (1.0 + signal * signal) ** -1.5
        return real.select(late, falling, -ratio * cube * slope), real.select(late, -signal * falling, cube * slope)

    def time_of_half_log_snr(self, half_log_snr: Real) -> Number:
        table = self._table
        if isinstance(half_log_snr, Tensor):
            falling = _on_device(table, half_log_snr)
            index = (torch.searchsorted(-falling, -half_log_snr.detach(), right=True) - 1).clamp(0, len(table) - 2)
            low, high = falling[index], falling[index + 1]
            found = index.to(half_log_snr.dtype) + (half_log_snr - low) / (high - low)
            early = torch.exp(torch.clamp(table[0] - half_log_snr, max=0.0)) - 1.0
            found = torch.where(half_log_snr > table[0], early, found)
            if self.zero_snr:
                late = self.last_time - torch.exp(torch.clamp(half_log_snr - table[-1], max=0.0))
                found = torch.where(half_log_snr < table[-1], late, found)
            return found
        if half_log_snr > table[0]:
            return math.exp(table[0] - half_log_snr) - 1.0
        if self.zero_snr and half_log_snr < table[-1]:
            return self.last_time - math.exp(half_log_snr - table[-1])
        first, last = 0, len(table) - 1
        while last - first > 1:
            middle = (first + last) // 2
            first, last = (middle, last) if table[middle] >= half_log_snr else (first, middle)
        return first + (half_log_snr - table[first]) / (table[last] - table[first])


@dataclasses.dataclass(frozen=True)
class StableDiffusionXL(DiscreteVariancePreserving):
    """SDXL's schedule: the same betas as Stable Diffusion's (2307.01952)."""

    name: ClassVar[str] = "sdxl"


@dataclasses.dataclass(frozen=True)
class VarianceExploding(Schedule):
    """EDM: alpha = 1, sigma = t (2206.00364)."""

    name: ClassVar[str] = "edm"
    t_min: float = 0.002
    t_max: float = 80.0

    def alpha(self, t: Real) -> Number:
        return real.constant(t, 1.0)

    def sigma(self, t: Real) -> Number:
        return t

    def ratio(self, t: Real) -> Number:
        return t

    def half_log_snr(self, t: Real) -> Number:
        return -real.log(t)

    def derivatives(self, t: Real) -> tuple[Number, Number]:
        return real.constant(t, 0.0), real.constant(t, 1.0)

    def time_of_half_log_snr(self, half_log_snr: Real) -> Number:
        return real.exp(-half_log_snr)

    def time_of_ratio(self, ratio: Real) -> Number:
        return ratio


@dataclasses.dataclass(frozen=True)
class Flow(Schedule):
    """Flow matching: sigma = shift t / (1 + (shift - 1) t), alpha = 1 - sigma (2210.02747; shift: 2403.03206, eq. 23).

    The network is told sigma, so one network serves any shift; t_max = 1 is pure noise (alpha = 0).
    """

    name: ClassVar[str] = "flow"
    shift: float = 1.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shift > 0:
            raise UserError(f"schedule 'flow' got shift={self.shift!r}; give a number above 0 (1 is no shift).")

    @property
    def last_time(self) -> float:
        return 1.0

    def alpha(self, t: Real) -> Number:
        return (1.0 - t) / (1.0 + (self.shift - 1.0) * t)

    def sigma(self, t: Real) -> Number:
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def ratio(self, t: Real) -> Number:
        return real.divide(self.shift * t, 1.0 - t)

    def derivatives(self, t: Real) -> tuple[Number, Number]:
        slope = self.shift / (1.0 + (self.shift - 1.0) * t) ** 2
        return -slope, slope

    def time_of_ratio(self, ratio: Real) -> Number:
        return 1.0 / (1.0 + real.divide(self.shift, ratio))

    def time_of_half_log_snr(self, half_log_snr: Real) -> Number:
        return self.time_of_ratio(real.exp(-half_log_snr))

    def network_time(self, t: Real) -> Number:
        return self.sigma(t)

    def time_of_network_time(self, told: Real) -> Number:
        return told / (self.shift - (self.shift - 1.0) * told)


@dataclasses.dataclass(frozen=True)
class TrigFlow(Schedule):
    """TrigFlow: alpha = cos t, sigma = sigma_data sin t (2410.11081, eq. 3).

    With prediction "edm" of the same sigma_data this is the paper's D = cos t x - sigma_data sin t F with F's sign
    turned.
    """

    name: ClassVar[str] = "trigflow"
    sigma_data: float = 0.5
    t_min: float = 4e-3
    t_max: float = math.atan(80.0 / 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma_data > 0:
            raise UserError(f"schedule 'trigflow' got sigma_data={self.sigma_data!r}; give a number above 0.")

    @property
    def last_time(self) -> float:
        return 0.5 * math.pi

    def alpha(self, t: Real) -> Number:
        return real.cos(t)

    def sigma(self, t: Real) -> Number:
        return self.sigma_data * real.sin(t)

    def derivatives(self, t: Real) -> tuple[Number, Number]:
        return -real.sin(t), self.sigma_data * real.cos(t)

    def time_of_ratio(self, ratio: Real) -> Number:
        return real.atan(ratio / self.sigma_data)

    def time_of_half_log_snr(self, half_log_snr: Real) -> Number:
        return self.time_of_ratio(real.exp(-half_log_snr))


_SCHEDULES: dict[str, type[Schedule]] = {
    kind.name: kind
    for kind in (
        VariancePreserving,
        Cosine,
        DiscreteVariancePreserving,
        StableDiffusionXL,
        VarianceExploding,
        Flow,
        TrigFlow,
    )
}


def names() -> list[str]:
    """The schedules `get` knows."""
    return sorted(_SCHEDULES)


def get(name: str, **options: Any) -> Schedule:
    """The schedule called `name`, with its fields as options, e.g. get("flow", shift=3.0)."""
    if name not in _SCHEDULES:
        raise choose("schedule", name, _SCHEDULES)
    kind = _SCHEDULES[name]
    fields = [field.name for field in dataclasses.fields(kind)]
    taken: dict[str, Any] = {}
    for option, value in options.items():
        if option not in fields:
            raise choose(f"option of schedule {name!r},", option, fields)
        if option == "zero_snr":
            if not isinstance(value, bool):
                raise UserError(f"schedule {name!r} got {option}={value!r}; give True or False.")
            taken[option] = value
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"schedule {name!r} got {option}={value!r}; give a finite number.")
        taken[option] = int(value) if option == "train_steps" else float(value)
    return kind(**taken)


def from_dict(description: Mapping[str, Any]) -> Schedule:
    """The schedule that `to_dict` described."""
    if "name" not in description:
        raise UserError(
            f"a schedule needs a name, and {dict(description)!r} has none; choose one of: {', '.join(names())}."
        )
    return get(**description)
