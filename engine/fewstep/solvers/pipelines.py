"""A plan in a pipeline's loop, where the pipeline asks its one network, guides, and calls once an evaluation.

What `fewstep.solvers.diffusers` needs and diffusers is not needed for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import schedules
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import UserError
from fewstep.solvers import registry
from fewstep.solvers.memory import tracing
from fewstep.solvers.plans import Plan, Stage

_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon", "rho": 7.0}
_STABLE_AUDIO = {"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0, "prediction_type": "v_prediction", "rho": 7.0}


def plan_for(solver: str, schedule: Schedule, steps: int, **options: Any) -> Plan:
    """`plan` of these options; UserError where a pipeline could not run it."""
    if options.get("guidance") is not None:
        raise UserError(
            f"options of PlanScheduler hold guidance={options['guidance']!r}; leave it out, the pipeline guides "
            "(guidance_scale=..), or run the plan by fewstep.sample."
        )
    plan = registry.plan(solver, schedule, steps, **options)
    if plan.roles:
        raise UserError(
            f"solver {solver!r} with these options asks a network in the role {plan.roles[0]!r} and a pipeline has one "
            "network; choose others, or run the plan by fewstep.sample(.., others=..)."
        )
    if any(stage.landing is not None for stage in plan.stages):
        raise UserError(
            f"two_times=True of solver {solver!r} tells the network where it lands and a pipeline does not; leave it "
            "out, or run the plan by fewstep.sample."
        )
    return plan


def bounds(config: Any) -> dict[str, Any]:
    """The bounds on clean estimates that diffusers' own names ask for, thresholding before clipping as there; `plan`'s
    own names in `config.options` stand before both.
    """
    own = config.options or {}
    if own.get("threshold") is not None or own.get("clip") is not None:
        return {}
    if config.thresholding:
        return {"threshold": {"quantile": config.dynamic_thresholding_ratio, "most": config.sample_max_value}}
    return {"clip": config.clip_sample_range} if config.clip_sample else {}


def laid_in_sigma(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of diffusers' EDM schedulers, or of Stable Audio's (CosineDPMSolverMultistepScheduler), with schedule,
    grid and prediction type by the names of PlanScheduler; what the config leaves out is its class's default.
    UserError for those whose networks it cannot read.
    """
    audio = "solver_order" in config and "algorithm_type" not in config  # EDM's have neither or both
    usual = _STABLE_AUDIO if audio else _EDM
    config = {**usual, **config}
    low, high = (float(config[key]) for key in ("sigma_min", "sigma_max"))
    wanted, given = ((of["prediction_type"], of["sigma_data"]) for of in (usual, config))
    if given != wanted:
        raise UserError(
            f"the config has prediction_type={given[0]!r} and sigma_data={given[1]!r}, and this scheduler takes over "
            f"{wanted[0]!r} and {wanted[1]}; run the plan by fewstep.sample, with fewstep.Denoiser(.., prediction=..)."
        )
    if not audio:
        schedule, kind = schedules.get("edm", t_min=low, t_max=high), "edm"
    else:  # sigma is the tangent of the schedule's angle
        ends = {name: 2.0 / math.pi * math.atan(sigma) for name, sigma in (("t_min", low), ("t_max", high))}
        schedule, kind = schedules.get("cosine", offset=0.0, **ends), "v_prediction"
    laid = {
        "name": config["sigma_schedule"],
        **({"rho": config["rho"]} if config["sigma_schedule"] == "karras" else {}),
    }
    return {**config, "schedule": schedule.to_dict(), "prediction_type": kind, "grid": laid}


def outputs(stage: Stage) -> tuple[str, ...]:
    """What a step computes: the pipeline scales the next network input itself."""
    return tuple(name for name in stage.outputs if name != "input")


def tables(plan: Plan, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor | None, ...]]:
    """Each stage's coefficients [M, K] and its parts' (None where a part has none), copied to the device once for as
    long as the plan lives.
    """

    def made() -> list[tuple[Tensor | None, ...]]:
        rows = ([stage.matrix[stage.outputs.index(name)] for name in outputs(stage)] for stage in plan.stages)
        every = ([table, *(part.matrix for part in stage.nonlinear)] for table, stage in zip(rows, plan.stages))
        return [
            tuple(torch.tensor(table, device=device, dtype=dtype) if table else None for table in each)
            for each in every
        ]

    if tracing():
        return made()
    key = ("scheduler", device, dtype)
    if key not in plan._device_cache:
        with torch.inference_mode(False):
            plan._device_cache[key] = made()
    return plan._device_cache[key]
