"""The critic, a diffusion model of what the student makes now, and the direction it gives with the teacher.

Yin et al. 2023 (DMD), arXiv:2311.18828; Luo et al. 2023 (Diff-Instruct), arXiv:2305.18455.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.gram_guidance import normalised_direction
from fewstep.methods.distances import output_weight
from fewstep.methods.rng import Rng
from fewstep.methods.times import TimeLaw
from fewstep.nets.network import Network
from fewstep_kernels import l2


@dataclass(frozen=True)
class Critic:
    """The diffusion model `network` of the student's samples, trained at the times of `times`."""

    network: Network
    times: TimeLaw

    def diffused(self, x0: Tensor, rng: Rng, purpose: str, times: TimeLaw | None = None) -> tuple[Tensor, Tensor]:
        """(x_t [B, ...], t [B]): x0 at fresh times with fresh noise; gradients pass to x0."""
        schedule = self.network.schedule
        t = (times or self.times)(schedule, rng.uniform(x0, f"{purpose} time"))
        return schedule.add_noise(x0, rng.normal(x0, f"{purpose} noise"), t), t

    def loss(self, answer: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Denoising score matching on the student's samples x0: mean of lambda(t) |answer - x0|^2."""
        weight = output_weight(self.network.schedule, self.network.prediction, t)
        return l2(answer, x0, weight).mean()


def matching_direction(x: Tensor, fake: Tensor, real: Tensor, normalise: bool = True) -> Tensor:
    """h = (D_fake - D) / mean|x - D| per sample, the descent direction of KL(student || teacher) at x_t.

    arXiv:2311.18828, equations 7 and 8. x: the student's samples; fake, real: the critic's and the teacher's clean
    estimates, all [B, ...]. Not normalised, E[h . dx] is sigma^2/alpha^2 times the gradient of KL(q_t || p_t).
    """
    with torch.no_grad():
        direction = normalised_direction(x, fake, real) if normalise else fake - real
        return torch.nan_to_num(direction, nan=0.0, posinf=0.0, neginf=0.0)


def pseudo_target_loss(x: Tensor, direction: Tensor) -> Tensor:
    """0.5 mean (x - sg(x - h))^2: a loss whose gradient at x is h divided by the number of elements."""
    return 0.5 * (x - (x - direction).detach()).square().mean()
