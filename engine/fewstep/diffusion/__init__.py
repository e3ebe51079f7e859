"""Schedules, prediction types, the denoiser and guidance: pure mathematics on tensors."""

from fewstep.diffusion import guidance, prediction, schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule

__all__ = ["Denoiser", "Prediction", "Schedule", "guidance", "prediction", "schedules"]
