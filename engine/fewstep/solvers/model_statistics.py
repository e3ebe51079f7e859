"""Empirical model statistics: the parametrisation of a model's path in which it bends least.

DPM-Solver-v3, Zheng et al. 2023, 2310.13268, section 3.1. With lambda = log(alpha/sigma) and f = (sigma eps_hat - l x)/
alpha, l makes f depend on x as little as may be, and s, b make s f + b its change along the path. All three are per
element and per level: means over samples, estimated once per model (and guidance) and kept in a safetensors file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.diffusion import schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.linear import combine
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError

FORMAT = "fewstep.model-statistics/1"


@dataclasses.dataclass(frozen=True)
class ModelStatistics:
    """lambdas: rising and even, [T + 1]; l, s, b: [T + 1, ...], of the shape of one sample; all float64 on the CPU."""

    schedule: Schedule
    lambdas: Tensor
    l: Tensor
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        alike = self.l.shape == self.s.shape == self.b.shape and len(self.l) == len(self.lambdas) >= 2
        steps = self.lambdas.diff()
        if not alike or not bool((steps > 0).all()) or not torch.allclose(steps, steps[:1]):
            raise UserError(
                f"model statistics need 2 or more even, rising lambdas and l, s, b of one shape for each; got "
                f"{list(self.lambdas.shape)}, {list(self.l.shape)}, {list(self.s.shape)} and {list(self.b.shape)}."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write beside `path` and rename; float64 numbers come back bit for bit."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        tensors = {name: getattr(self, name).contiguous() for name in ("lambdas", "l", "s", "b")}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, {"format": FORMAT, "schedule": json.dumps(self.schedule.to_dict())})
            os.replace(partial, target)
        except OSError as error:
            raise UserError(f"cannot write {str(target)!r} ({error.strerror}); give a writable place.") from error
        finally:
            partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> ModelStatistics:
    """What `ModelStatistics.save` wrote; UserError for anything else."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            held = file.metadata() or {}
            if held.get("format") != FORMAT:
                raise UserError(f"{str(path)!r} is not of format {FORMAT!r}; estimate the statistics again.")
            tensors = {name: file.get_tensor(name) for name in ("lambdas", "l", "s", "b")}
            return ModelStatistics(schedules.from_dict(json.loads(held["schedule"])), **tensors)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(
            f"cannot read model statistics {str(path)!r} ({error}); give a file that their save() wrote."
        ) from None


def straight(schedule: Schedule, points: int, shape: Sequence[int] = (1,), **ends: float) -> ModelStatistics:
    """l = 1, s = 0, b = 0: clean-sample prediction, with which DPM-Solver-v3 is DPM-Solver++ (2310.13268, table 1)."""
    lambdas = _lambdas(schedule, points, **ends)
    ones = torch.ones((len(lambdas), *shape), dtype=torch.float64)
    return ModelStatistics(schedule, lambdas, ones, 0.0 * ones, 0.0 * ones)


def estimate(
    denoiser: Denoiser,
    samples: Tensor,
    *,
    points: int = 120,
    start: float | None = None,
    end: float | None = None,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: float | None = None,
    probes: int = 1,
    batch: int = 64,
    seed: int = 0,
) -> ModelStatistics:
    """l = E diag(sigma d eps_hat/dx), by `probes` random signs a sample; then s = Cov(f, f')/Var(f) and b = E f' - s
    E f, with f' the change of f with lambda along the path, by forward mode (2310.13268, section 3.1).

    samples: clean [B, ...], with their cond [B] where the model takes one; noised anew at each of `points` + 1 levels
    from `start` (t_max, or just below where that is pure noise) to `end` (t_min). A level and batch takes 1 + `probes`
    evaluations with tangents and one without. Where f does not vary between samples s is 0. The same for any `batch`.
    """
    schedule = denoiser.schedule
    lambdas = _lambdas(schedule, points, start, end)
    if not isinstance(samples, Tensor) or not samples.is_floating_point() or samples.ndim < 2 or not len(samples):
        raise UserError("model statistics are means over clean samples; give a floating-point tensor [B, ...].")
    if probes < 1 or batch < 1:
        raise UserError(f"probes={probes!r} and batch={batch!r} must be at least 1.")

    def chunks(level: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Any, Any]]:
        """(x, lambda [B], signs [probes, B, ...], cond, uncond) of one level."""
        generator = torch.Generator(samples.device).manual_seed(seed * 2**32 + level)
        noise = torch.randn(samples.shape, generator=generator, dtype=samples.dtype, device=samples.device)
        signs = torch.randint(2, (probes, *samples.shape), generator=generator, device=samples.device)
        place = samples.new_full((len(samples),), float(lambdas[level]))
        x = schedule.add_noise(samples, noise, schedule.time_of_half_log_snr(place))
        for i in range(0, len(samples), batch):
            part = slice(i, i + batch)
            told, null = (given[part] if isinstance(given, Tensor) else given for given in (cond, uncond))
            yield x[part], place[part], 2.0 * signs[:, part].to(x) - 1.0, told, null

    def eps(x: Tensor, place: Tensor, cond: Any, uncond: Any) -> Tensor:
        t = schedule.time_of_half_log_snr(place)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        clean = denoiser.guided(x, t, cond, guidance, uncond)
        return combine([x, clean], [(1.0 / sigma, -alpha / sigma)])[0]

    with torch.no_grad():
        slopes = []
        for level in range(len(lambdas)):
            t = float(schedule.time_of_half_log_snr(float(lambdas[level])))
            total = torch.zeros(samples.shape[1:], dtype=torch.float64, device=samples.device)
            for x, place, signs, c, u in chunks(level):
                for sign in signs:
                    slope = torch.func.jvp(lambda x, p=place, c=c, u=u: eps(x, p, c, u), (x,), (sign,))[1]
                    total += (sign * slope).double().sum(0)
            slopes.append(total * float(schedule.sigma(t)) / (probes * len(samples)))
        l = torch.stack(slopes)
        change = torch.gradient(l, spacing=(lambdas.to(l),), dim=0)[0]
        found = [_fit(schedule, chunks(level), eps, l[level], change[level]) for level in range(len(lambdas))]
    s, b = (torch.stack(values).cpu() for values in zip(*found))
    return ModelStatistics(schedule, lambdas, l.cpu(), s, b)


def _fit(schedule: Schedule, chunks: Any, eps: Any, l: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """(s, b) of one level: the line through (f, f') over samples."""
    sums = torch.zeros((5, *l.shape), dtype=torch.float64, device=l.device)
    count = 0
    for x, place, _, cond, uncond in chunks:
        level = float(place[0])

        def alpha_of(at: Tensor) -> Tensor:
            alpha = schedule.alpha(schedule.time_of_half_log_snr(at))
            assert isinstance(alpha, Tensor)
            return alpha

        at = torch.tensor(level, dtype=torch.float64)
        alpha, alpha_rate = (float(v) for v in torch.func.jvp(alpha_of, (at,), (torch.ones_like(at),)))
        ratio = float(torch.exp(-at))  # sigma/alpha
        noise = eps(x, place, cond, uncond)
        along = (alpha_rate / alpha) * x - (alpha * ratio) * noise  # dx/d lambda of the path
        moves = (along, torch.ones_like(place))
        rate = torch.func.jvp(lambda x, p, c=cond, u=uncond: eps(x, p, c, u), (x, place), moves)[1].double()
        noise, scaled = noise.double(), x.double() / alpha
        f = ratio * noise - l * scaled
        f_rate = ratio * (rate - noise + l * noise) - change * scaled
        size = (ratio * noise).square() + (l * scaled).square()
        sums += torch.stack([value.sum(0) for value in (f, f_rate, f * f, f * f_rate, size)])
        count += len(x)
    f, f_rate, square, product, size = sums / count
    variance = square - f * f
    s = torch.where(variance > 1e-10 * size, (product - f * f_rate) / variance, 0.0)
    return s, f_rate - s * f


def _lambdas(schedule: Schedule, points: int, start: float | None = None, end: float | None = None) -> Tensor:
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise UserError(f"model statistics got points={points!r}; give a whole number of at least 1 (usually 120).")
    first = schedule.t_max if start is None else float(start)
    last = schedule.t_min if end is None else float(end)
    if start is None and not schedule.ratio(first) < 1e12:  # as the grids laid in sigma/alpha
        first -= 1e-3 * (first - schedule.t_clean)
    if not schedule.t_clean < last < first <= schedule.last_time or not schedule.ratio(first) < 1e12:
        raise UserError(
            f"model statistics go from start={first!r} to end={last!r}; give {schedule.t_clean:g} < end < start, where "
            "alpha and sigma are above zero."
        )
    low, high = float(schedule.half_log_snr(first)), float(schedule.half_log_snr(last))
    return torch.linspace(low, high, points + 1, dtype=torch.float64)
