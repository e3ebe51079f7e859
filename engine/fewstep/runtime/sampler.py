"""A denoiser with its plan as one module: what is run, compiled, exported and timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.solvers import Plan, sample


class Sampler(nn.Module):
    """Standard normal noise and condition in, image out; the plan's stages are unrolled when it is exported.

    noise: [B, 1 + S, C, H, W], slot 0 the start and slot k the k-th stochastic stage's, or [B, C, H, W] with seeds.
    condition: int64 [B], the number of classes meaning none; or None. negatives: likewise, for perpendicular guidance.
    others: the networks of further roles that the plan names.
    """

    def __init__(self, denoiser: Denoiser, plan: Plan, others: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.plan = plan
        self.others = nn.ModuleDict(others or {})

    def forward(
        self,
        noise: Tensor,
        condition: Tensor | None = None,
        seeds: Tensor | None = None,
        negatives: Sequence[Tensor] = (),
    ) -> Tensor:
        others = dict(self.others.items())
        return sample(self.denoiser, self.plan, noise, cond=condition, seeds=seeds, negatives=negatives, others=others)
