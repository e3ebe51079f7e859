"""Distances between two answers, and the weight that makes a denoising error plain."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

import fewstep_kernels as fk
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.methods.base import MethodConfig


class Distance(MethodConfig):
    """A distance per sample, [B, ...] x [B, ...] -> [B]. In a recipe: `l2`, or `{name: pseudo_huber, c: 0.03}`."""

    name: Literal["l1", "l2", "pseudo_huber"] = "pseudo_huber"
    """l1: mean |a - b|; l2: mean (a - b)^2; pseudo_huber: sqrt(|a - b|^2 + c^2) - c over the whole sample."""
    c: Annotated[float, Field(gt=0.0)] = 0.03
    """Where pseudo-Huber turns from square to linear, in the norm of the sample (arXiv:2310.14189, section 3.3)."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    def __call__(self, answer: Tensor, target: Tensor) -> Tensor:
        if self.name == "pseudo_huber":
            return fk.pseudo_huber(answer, target, c=self.c)
        return (fk.l1 if self.name == "l1" else fk.l2)(answer, target)


def output_weight(schedule: Schedule, prediction: Prediction, t: Tensor) -> Tensor:
    """The weight of |x0_hat - x0|^2 that makes it the plain squared error of the network's own output: 1 / c_out(t)^2.

    It is EDM's (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 for "edm" (arXiv:2206.00364, table 1), the SNR for
    "eps", SNR + 1 for "v", 1 / t^2 for "flow" and 1 for "x0". Shape: t [B] -> [B].
    """
    _, c_out = replace(prediction, boundary=None).coefficients(schedule, t)
    weight = torch.as_tensor(c_out, dtype=t.dtype, device=t.device).square().reciprocal()
    return weight.expand(t.shape)
