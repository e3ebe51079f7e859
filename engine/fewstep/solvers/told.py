"""What a plan tells its network of the time: the exact one, or what a published sampler makes of it.

diffusers' DPM-Solver, UniPC, DEIS and SA-Solver classes hand Karras times over rounded to whole indices, and
exponential, beta and flow times cut off to them; its KDPM2 rounds Karras times where its steps start and not their
middles; its DDIM inversion names the level a step goes to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fewstep.errors import UserError, choose
from fewstep.solvers.plans import Plan

TOLD = ("exact", "rounded", "rounded_starts", "truncated", "target")


def retold(plan: Plan, told: str, steps: Sequence[int]) -> Plan:
    """The plan with its network times "exact", "rounded" or "truncated" to whole indices (on flow, to thousandths),
    rounded where a step starts alone ("rounded_starts"; `steps` is each stage's), or those of each stage's "target".

    Raises UserError for another word, and where the schedule's times are not indices.
    """
    if told not in TOLD:
        raise choose("told", told, TOLD)
    if told == "exact":
        return plan
    units = getattr(plan.schedule, "train_steps", 1000 if plan.schedule.name == "flow" else None)
    if told != "target" and (units is None or plan.prediction.kind == "edm"):
        raise UserError(
            f"told={told!r} is for networks that count indices (schedules sd, sdxl and flow, predictions other than "
            f"edm), not schedule {plan.schedule.name!r} with prediction {plan.prediction.kind!r}; leave it out."
        )
    inner = [False] * len(plan.stages)
    if told == "rounded_starts":
        inner = [step == before for step, before in zip(steps, [None, *steps])]
        if len(inner) != len(plan.stages):
            raise UserError(
                f"told={told!r} is for solvers that move once an evaluation, not {plan.solver!r}; leave it out."
            )
    scale = 1000.0 if plan.schedule.name == "flow" else 1.0

    def time(target: float, exact: float, within: bool) -> float:
        if told == "target":
            return float(plan.prediction.network_time(plan.schedule, target))
        if told == "rounded_starts" and within:
            return exact
        # a sum of roundings below an index is that index
        return (round(exact * scale) if told.startswith("rounded") else math.floor(exact * scale + 1e-6)) / scale

    stages = (
        dataclasses.replace(stage, network_time=time(stage.target, stage.network_time, within))
        for stage, within in zip(plan.stages, inner)
    )
    return dataclasses.replace(plan, stages=tuple(stages))
