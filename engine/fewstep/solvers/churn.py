"""Noise added before an evaluation, written into the row before it (2206.00364, algorithm 2; 2306.14878)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fewstep.diffusion import real
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import rows, spacing
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Row


@dataclasses.dataclass(frozen=True)
class Churn:
    """S_churn, S_tmin, S_tmax (in sigma/alpha) and S_noise of 2206.00364."""

    amount: float
    low: float
    high: float
    noise_scale: float

    def check(self, solver: str, times: Sequence[float]) -> None:
        if not self.amount >= 0.0:
            raise UserError(f"solver {solver!r} got churn={self.amount!r}; give a number of at least 0.")
        if self.amount > 0.0 and times[-1] > times[0]:
            raise UserError(
                f"solver {solver!r} got churn={self.amount!r} on a rising grid; "
                "inversion is deterministic, give churn=0."
            )

    def raised(self, schedule: Schedule, times: Sequence[float]) -> list[float]:
        """Per step, the time whose sigma/alpha is (1 + gamma) times as large: where its evaluation is made."""
        steps, found = len(times) - 1, []
        gamma = min(self.amount / steps, math.sqrt(2.0) - 1.0)
        for t in times[:-1]:
            ratio = schedule.ratio(t)
            inside = self.low <= ratio <= self.high and not real.isinf(ratio)
            if gamma > 0.0 and inside:
                found.append(min(float(schedule.time_of_ratio(ratio * (1.0 + gamma))), schedule.last_time))
            else:
                found.append(t)
        return found


def level_down(schedule: Schedule, t: float, s: float, eta: float, coordinate: str = "ratio") -> float:
    """The time an ancestral step from t goes down to before noise lifts it to s: k-diffusion's sigma_down in
    sigma/alpha ("ratio"); in u = sigma/(alpha + sigma) ("flow") ComfyUI's of flow models, u' (1 + eta (u'/u - 1)).
    """
    if eta == 0.0 or is_clean(schedule, s):
        return s
    if coordinate == "flow":
        level, level_to = spacing.flow_level(schedule, t), spacing.flow_level(schedule, s)
        return spacing.time_of_flow_level(schedule, level_to * (1.0 + eta * (level_to / level - 1.0)))
    ratio, ratio_to = schedule.ratio(t), schedule.ratio(s)
    up = eta * ratio_to * (math.sqrt(1.0 - (ratio_to / ratio) ** 2) if not real.isinf(ratio) else 1.0)
    left = math.sqrt(max(ratio_to**2 - up**2, 0.0))
    return float(schedule.time_of_ratio(left)) if left > 0.0 else schedule.t_clean


def lifted(schedule: Schedule, row: Row, to: float, noise_scale: float = 1.0) -> Row:
    """The row with fresh noise on its result, up to the time `to`."""
    if to == row.target:
        return row
    keep, noise = rows.renoise(schedule, row.target, to)
    update = {name: keep * value for name, value in row.outputs["x"].items()}
    update["noise"] = math.hypot(update.get("noise", 0.0), noise_scale * noise)
    return dataclasses.replace(row, target=to, outputs={**row.outputs, "x": update})


def started(schedule: Schedule, t: float, to: float, noise_scale: float = 1.0) -> float:
    """The scale of a start of sigma at t with noise up to `to`."""
    if to == t:
        return float(schedule.sigma(t))
    keep, noise = rows.renoise(schedule, t, to)
    return math.hypot(keep * schedule.sigma(t), noise_scale * noise)
