"""Two evaluations a step with fresh noise after, or in, each: k-diffusion's "DPM++ 2S a" and "DPM++ SDE".

Singlestep DPM-Solver++ (Lu et al. 2022, 2211.01095) down to the ancestral level sigma_down, then noise up to sigma'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import multistep, rows
from fewstep.solvers.churn import level_down, lifted
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register


def _check(solver: str, times: Sequence[float], eta: float, ratio: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"solver {solver!r} got eta={eta!r}; give a number from 0 (deterministic) to 1 (ancestral).")
    if not 0.0 < ratio <= 1.0:
        raise UserError(f"solver {solver!r} got ratio={ratio!r}; give a number above 0 and at most 1.")
    if eta > 0.0:
        multistep.falling(solver, times, "inversion is deterministic, give eta=0.")


@register("dpmpp_2s_a", "weak order 2, two evaluations a step; k-diffusion's DPM++ 2S a, of 2211.01095")
def dpmpp_2s_a(schedule: Schedule, times: Sequence[float], *, eta: float = 1.0, noise_scale: float = 1.0) -> list[Row]:
    """dpmpp_2s ("midpoint") from sigma/alpha to the ancestral level down, and noise on top up to the next.

    `eta` 0 is dpmpp_2s; noise_scale multiplies the noise. Steps from pure noise and to sigma' = 0 are of order 1.
    """
    _check("dpmpp_2s_a", times, eta, 1.0)
    table: list[Row] = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        ratio, down = schedule.ratio(t), level_down(schedule, t, s, eta)
        if is_clean(schedule, down) or real.isinf(ratio):
            of_x, of_denoised = rows.jump(schedule, t, down)
            table.append(lifted(schedule, Row(t, down, {"x": {"x": of_x, "D": of_denoised}}, step), s, noise_scale))
            continue
        middle = float(schedule.time_of_ratio(math.sqrt(ratio * schedule.ratio(down))))
        of_x, of_denoised = rows.jump(schedule, t, middle)
        table.append(Row(t, middle, {"x": {"x": of_x, "D": of_denoised}, "base": {"x": 1.0}}, step))
        of_base, of_denoised = rows.jump(schedule, t, down)
        update = Row(middle, down, {"x": {"base": of_base, "D": of_denoised}}, step)
        table.append(lifted(schedule, update, s, noise_scale))
    return table


@register("dpmpp_sde", "weak order 2, two evaluations a step; k-diffusion's DPM++ SDE, of 2211.01095")
def dpmpp_sde(
    schedule: Schedule,
    times: Sequence[float],
    *,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    ratio: float = 0.5,
    shared_noise: bool = True,
) -> list[Row]:
    """An ancestral step to `ratio` of the way in lambda, and one from the start again with the estimate found there.

    `shared_noise`: both draws are of one Brownian path in sigma/alpha, as with k-diffusion's noise sampler. Drawn
    independently (False) the weak order is 1, and at ratio=1/2 and eta=1 this is dpmpp_2s with strength=1. noise_scale
    multiplies the noise. Steps from pure noise and to sigma' = 0 are of order 1.
    """
    _check("dpmpp_sde", times, eta, ratio)
    table: list[Row] = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        of_x, of_denoised, of_noise = rows.noisy_jump(schedule, t, s, eta)
        of_noise *= noise_scale
        at, to = schedule.half_log_snr(t), schedule.half_log_snr(s)
        if is_clean(schedule, s) or real.isinf(at):
            table.append(Row(t, s, {"x": {"x": of_x, "D": of_denoised, "noise": of_noise}}, step))
            continue
        middle = float(schedule.time_of_half_log_snr(at + ratio * (to - at)))
        first = dict(zip(("x", "D", "noise"), rows.noisy_jump(schedule, t, middle, eta)))
        first["noise"] *= noise_scale
        table.append(Row(t, middle, {"x": first, "base": {"x": 1.0}, "d0": {"D": 1.0}}, step))
        late = 0.5 / ratio
        update = {"base": of_x, "d0": of_denoised * (1.0 - late), "D": of_denoised * late, "noise": of_noise}
        if shared_noise and first["noise"] > 0.0:
            levels = (schedule.ratio(t), schedule.ratio(middle), schedule.ratio(s))
            share = (levels[0] - levels[1]) / (levels[0] - levels[2])
            # the first draw is what x has that `first` does not make of base and d0
            again = of_noise * math.sqrt(share) / first["noise"]
            drawn = {"x": 1.0, "base": -first["x"], "d0": -first["D"]}
            update["noise"] = of_noise * math.sqrt(1.0 - share)
            update = multistep.total((1.0, update), (again, drawn))
        table.append(Row(middle, s, {"x": update}, step))
    return table
