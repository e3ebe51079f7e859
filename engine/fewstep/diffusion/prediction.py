"""What a network's raw output F means, as coefficients: x0_hat = c_x x + c_out F.

| kind | F | source |
|---|---|---|
| eps | the noise | 2006.11239 |
| x0 | the clean sample | |
| v | alpha eps - sigma x0 | 2202.00512, appendix D |
| flow | eps - x0 | 2210.02747 |
| edm | EDM's preconditioned F, in x/alpha; TrigFlow's F (sign turned) on the trigflow schedule | 2206.00364, table 1 |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fewstep.diffusion import real
from fewstep.diffusion.real import Number, Real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError, choose

KINDS = ("eps", "x0", "v", "flow", "edm")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A prediction type.

    `sigma_data` matters to "edm" only. `boundary`, when given, is the schedule time at which the read-out is the
    identity, whatever the network: the consistency form of 2303.01469 (appendix C) for "edm", the DDIM jump to that
    time for the others. The read-out is then an estimate of x at `boundary` and not of x0.
    """

    kind: str
    sigma_data: float = 0.5
    boundary: float | None = None

    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise choose("prediction", self.kind, KINDS)
        if not self.sigma_data > 0:
            raise UserError(f"prediction {self.kind!r} got sigma_data={self.sigma_data!r}; give a number above 0.")

    def coefficients(self, schedule: Schedule, t: Real) -> tuple[Number, Number]:
        """(c_x, c_out) of the read-out at time t (float or tensor)."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if self.boundary is None:
            return self._denoised(schedule, t, alpha, sigma)
        alpha_end, sigma_end = schedule.alpha(self.boundary), schedule.sigma(self.boundary)
        if self.kind == "edm":
            data = self.sigma_data * alpha
            over = sigma - (sigma_end / alpha_end) * alpha
            scale = alpha_end * self.sigma_data
            return (
                scale * data / (over * over + data * data),
                scale * over / real.sqrt(sigma * sigma + data * data),
            )
        c_x, c_out = self._denoised(schedule, t, alpha, sigma)
        keep = sigma_end / sigma
        jump = alpha_end - alpha * keep
        return keep + jump * c_x, jump * c_out

    def noise_coefficients(self, schedule: Schedule, t: Real) -> tuple[Number, Number]:
        """(c_x, c_out) of eps_hat = (x - alpha x0_hat)/sigma, without dividing by sigma where the kind allows it."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if self.boundary is None:
            if self.kind == "eps":
                return real.constant(t, 0.0), real.constant(t, 1.0)
            if self.kind == "v":
                norm = alpha * alpha + sigma * sigma
                return sigma / norm, alpha / norm
            if self.kind == "flow":
                return 1.0 / (alpha + sigma), alpha / (alpha + sigma)
            if self.kind == "edm":
                data = self.sigma_data * alpha
                norm = sigma * sigma + data * data
                return sigma / norm, -data / real.sqrt(norm)
        c_x, c_out = self.coefficients(schedule, t)
        return (1.0 - alpha * c_x) / sigma, -alpha * c_out / sigma

    def input_scale(self, schedule: Schedule, t: Real) -> Number:
        """What x is multiplied by before the network sees it."""
        if self.kind != "edm":
            return real.constant(t, 1.0)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        data = self.sigma_data * alpha
        return 1.0 / real.sqrt(sigma * sigma + data * data)

    def network_time(self, schedule: Schedule, t: Real) -> Number:
        """What the network is told: log(sigma/alpha)/4 for "edm", else the schedule's own word for t."""
        if self.kind != "edm":
            return schedule.network_time(t)
        told = -0.25 * schedule.half_log_snr(t)
        if isinstance(told, float) and not math.isfinite(told):
            raise UserError(
                f"prediction 'edm' tells its network log(sigma/alpha)/4, which is infinite at t={t!r} of schedule "
                f"{schedule.name!r}; start at a smaller t_max, or use one of: eps, flow, v, x0."
            )
        return told

    def time_of_network_time(self, schedule: Schedule, told: Real) -> Number:
        """Schedule time from what the network is told."""
        if self.kind == "edm":
            return schedule.time_of_half_log_snr(-4.0 * told)
        return schedule.time_of_network_time(told)

    def _denoised(self, schedule: Schedule, t: Real, alpha: Real, sigma: Real) -> tuple[Number, Number]:
        if self.kind == "x0":
            return real.constant(t, 0.0), real.constant(t, 1.0)
        if self.kind == "v":
            norm = alpha * alpha + sigma * sigma
            return alpha / norm, -sigma / norm
        if self.kind == "flow":
            norm = alpha + sigma
            return 1.0 / norm, -sigma / norm
        if self.kind == "edm":
            data = self.sigma_data * alpha
            norm = sigma * sigma + data * data
            return data * self.sigma_data / norm, sigma * self.sigma_data / real.sqrt(norm)
        if isinstance(alpha, float) and alpha <= 1e-12:
            raise UserError(
                f"prediction 'eps' says nothing about the picture where alpha is zero (t={t!r} of schedule "
                f"{schedule.name!r}); start at a smaller t_max, or use one of: edm, flow, v, x0."
            )
        return 1.0 / alpha, -sigma / alpha

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def get(kind: str | Prediction, **options: Any) -> Prediction:
    """The prediction type called `kind`, e.g. get("edm", sigma_data=0.5)."""
    if isinstance(kind, Prediction):
        return dataclasses.replace(kind, **options) if options else kind
    if not isinstance(kind, str):
        raise choose("prediction", kind, KINDS)
    fields = [field.name for field in dataclasses.fields(Prediction)]
    for option in options:
        if option not in fields:
            raise choose(f"option of prediction {kind!r},", option, fields[1:])
    return Prediction(kind, **options)


def from_dict(description: Mapping[str, Any]) -> Prediction:
    """The prediction type that `to_dict` described."""
    if "kind" not in description:
        raise UserError(
            f"a prediction needs a kind, and {dict(description)!r} has none; choose one of: {', '.join(KINDS)}."
        )
    return get(**description)
