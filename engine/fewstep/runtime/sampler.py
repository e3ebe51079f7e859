"""A denoiser with its plan as one module: what is run, compiled, exported and timed."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.solvers import Plan, sample


class Sampler(nn.Module):
    """Standard normal noise and condition in, image out; the plan's stages are unrolled when it is exported.

    noise: [B, 1 + S, C, H, W], slot 0 the start and slot k the k-th stochastic stage's, or [B, C, H, W] with seeds.
    condition: int64 [B], the number of classes meaning none; or None.
    """

    def __init__(self, denoiser: Denoiser, plan: Plan) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.plan = plan

    def forward(self, noise: Tensor, condition: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        return sample(self.denoiser, self.plan, noise, cond=condition, seeds=seeds)
