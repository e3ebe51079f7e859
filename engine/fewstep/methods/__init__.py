"""Distillation methods: one file each. `get(name)` gives the class; `base` is the interface."""

from __future__ import annotations

from fewstep.methods import consistency_distillation, denoising, dmd2, genie
from fewstep.methods.base import (
    Average,
    Method,
    MethodConfig,
    Needs,
    NetworkSpec,
    OptimizerConfig,
    Pairs,
    TrainingStage,
    Update,
)
from fewstep.methods.batch import Batch
from fewstep.methods.build import build
from fewstep.methods.check import check, plans
from fewstep.methods.registry import get, names, register
from fewstep.methods.rng import Rng

__all__ = [
    "Average",
    "Batch",
    "Method",
    "MethodConfig",
    "Needs",
    "NetworkSpec",
    "OptimizerConfig",
    "Pairs",
    "Rng",
    "TrainingStage",
    "Update",
    "build",
    "check",
    "consistency_distillation",
    "denoising",
    "dmd2",
    "genie",
    "get",
    "names",
    "plans",
    "register",
]
