"""Solvers as data: `plan` compiles one to a table, `sample` and `execute` run any table."""

from fewstep.solvers import (
    ancestral,
    consistency,
    ddim,
    deis,
    dpm_solver,
    dpmpp,
    euler,
    genie,
    grids,
    heun,
    jumps,
    plus_plus,
    pndm,
    runge_kutta,
    sa,
    splitting,
    trigflow,
    unipc,
)
from fewstep.solvers.executor import Execution, execute, sample
from fewstep.solvers.per_sample import row, step
from fewstep.solvers.plans import Plan, Stage
from fewstep.solvers.registry import describe, names, plan, register

__all__ = [
    "Execution",
    "Plan",
    "Stage",
    "ancestral",
    "consistency",
    "ddim",
    "deis",
    "describe",
    "dpm_solver",
    "dpmpp",
    "euler",
    "execute",
    "genie",
    "grids",
    "heun",
    "jumps",
    "names",
    "plan",
    "plus_plus",
    "pndm",
    "register",
    "row",
    "runge_kutta",
    "sa",
    "sample",
    "splitting",
    "step",
    "trigflow",
    "unipc",
]
