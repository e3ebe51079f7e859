"""Few-step students that jump and renoise: LCM, trajectory consistency (TCD) and CTM's gamma-sampling.

Luo et al. 2023, 2310.04378; Zheng et al. 2024, 2402.19159; Kim et al. 2023, 2310.02279.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import multistep, rows
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

_ON_INDICES = {"sd": "lcm", "sdxl": "lcm"}
_DOWN = "it only goes down, use ddim, euler or heun for inversion."


@register(
    "lcm", "exact in law for the exact consistency function; 2310.04378", zero="replace", default_grids=_ON_INDICES
)
def lcm(schedule: Schedule, times: Sequence[float], *, timestep_scaling: float | None = None) -> list[Row]:
    """x' = alpha' f + sigma' z, the last f being the sample; f = c_skip x + c_out D.

    With a `timestep_scaling` k, c_skip = 1/(1 + 4 (k t)^2) and c_out = k t/sqrt((k t)^2 + 1/4) (diffusers' LCM: k = 10,
    t an index of sd, so that f = D to 1e-5 but for the smallest t); without one f = D.
    """
    multistep.falling("lcm", times, _DOWN)
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        of_x, of_denoised = 0.0, 1.0
        if timestep_scaling is not None:
            scaled = timestep_scaling * t
            of_x, of_denoised = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        last = step == len(times) - 2
        alpha, sigma = (1.0, 0.0) if last else (schedule.alpha(s), schedule.sigma(s))
        update = {"x": alpha * of_x, "D": alpha * of_denoised, "noise": sigma}
        table.append(Row(t, schedule.t_clean if last else s, {"x": update}, step))
    return table


def _jumps(
    schedule: Schedule, times: Sequence[float], landing: Callable[[float], float], told: bool = False
) -> list[Row]:
    """Down to landing(t') by the deterministic jump, then up to t' by fresh noise; the last jump goes to the end.

    `told`: the network is told where it lands.
    """
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        low = s if step == len(times) - 2 else landing(s)
        of_x, of_denoised = rows.jump(schedule, t, low)
        keep, noise = rows.renoise(schedule, low, s)
        update = {"x": keep * of_x, "D": keep * of_denoised, "noise": noise}
        table.append(Row(t, s, {"x": update}, step, landing=low if told else None))
    return table


@register("tcd", "exact in law for the exact flow map; 2402.19159", zero="replace", default_grids=_ON_INDICES)
def tcd(schedule: Schedule, times: Sequence[float], *, eta: float = 0.3) -> list[Row]:
    """Jumps to (1 - eta) t' and renoises to t': eta = 0 is DDIM, eta = 1 consistency multistep.

    On sd and sdxl the landing is the index below, floor((1 - eta) t'), and never below index 0, as published.
    """
    multistep.falling("tcd", times, _DOWN)
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"solver 'tcd' got eta={eta!r}; give a number from 0 (deterministic) to 1 (all fresh noise).")
    indices = schedule.t_clean < 0

    def landing(s: float) -> float:
        below = (1.0 - eta) * s
        return max(float(math.floor(below)), 0.0) if indices and s >= 0.0 and eta > 0.0 else below

    return _jumps(schedule, times, landing)


@register("ctm", "exact in law for the exact flow map; 2310.02279's gamma-sampling", zero="replace")
def ctm(schedule: Schedule, times: Sequence[float], *, gamma: float = 0.3, two_times: bool = False) -> list[Row]:
    """Jumps to sqrt(1 - gamma^2) sigma'/alpha' and renoises: gamma = 0 is deterministic, 1 consistency multistep.

    `two_times`: the student g(x, t, s) is told where it lands, as s=; the table holds the jump of its answer, so that
    what moves x is G(x, t, s).
    """
    multistep.falling("ctm", times, _DOWN)
    if not 0.0 <= gamma <= 1.0:
        raise UserError(
            f"solver 'ctm' got gamma={gamma!r}; give a number from 0 (deterministic) to 1 (all fresh noise)."
        )

    def landing(s: float) -> float:
        ratio = math.sqrt(1.0 - gamma * gamma) * schedule.ratio(s)
        if gamma == 0.0:
            return s
        return float(schedule.time_of_ratio(ratio)) if ratio > 0.0 else schedule.t_clean

    return _jumps(schedule, times, landing, two_times)
