"""GENIE's head: the teacher's noise estimate is differentiated along its path.  Dockhorn et al. 2022, arXiv:2210.05475.

The student is the teacher, frozen, and a head on what its last layer reads (`nets.genie`), sampled by solver "genie".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep import solvers
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.linear import combine
from fewstep.methods.base import Method, MethodConfig, Needs, NetworkSpec
from fewstep.methods.batch import Batch
from fewstep.methods.registry import register
from fewstep.methods.rng import Rng
from fewstep.methods.times import Grid, TimeLaw, usual_law
from fewstep.nets.genie import Genie


class Change(Denoiser):
    """Answers gamma d eps/d gamma along the path, [B, ...], of a `Genie`, whose base never trains."""

    def forward(self, x: Tensor, t: Any, cond: Any = None, *, as_network: bool = False, **inputs: Any) -> Tensor:
        if as_network:
            return super().forward(x, t, cond, as_network=True, **inputs)
        time = self._time(x, t)
        parts = self._output(x, time, cond, inputs).chunk(4, 1)[1:]
        clean, noisy = self.schedule.alpha(time) ** 2, self.schedule.sigma(time) ** 2
        # gamma^2/(1 + gamma^2) and 1/(1 + gamma^2), finite at pure noise too
        return combine(parts, [(-1.0, noisy / (clean + noisy), clean / (clean + noisy))])[0]

    def requires_grad_(self, requires_grad: bool = True) -> Change:
        super().requires_grad_(requires_grad)
        self.net.base.requires_grad_(False)  # type: ignore[union-attr, operator]
        return self

    def train(self, mode: bool = True) -> Change:
        super().train(mode)
        self.net.base.eval()  # type: ignore[union-attr, operator]
        return self


@register("genie")
class GENIE(Method):
    """Teach a head d eps/d gamma along the teacher's path, so that a step of order 2 costs one evaluation."""

    needs = Needs(data="samples", tangent=True)

    class Config(MethodConfig):
        """Options of GENIE's head."""

        width: int = Field(64, ge=1)
        """Channels of the head."""
        blocks: int = Field(1, ge=0)
        """Its residual blocks."""
        times: TimeLaw | None = None
        """Law of the training times; none: karras or uniform, as the schedule is (the paper's is uniform)."""
        steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 20), min_length=1)
        """The numbers of evaluations the artefact records a plan for."""
        grid: Grid | None = None
        """Where they are made: a time grid by name, or {name: quadratic, power: 2}; none: the schedule's."""
        analytic_first_step: bool = False
        """Take the first step without the network, its noise estimate being the state."""

    @property
    def networks(self) -> Mapping[str, NetworkSpec]:  # type: ignore[override]
        start = partial(_headed, width=self.config.width, blocks=self.config.blocks)
        return {"student": NetworkSpec(start=start, read_out=Change)}

    @property
    def steps_offered(self) -> Sequence[int]:  # type: ignore[override]
        return self.config.steps

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        """E gamma^2 |d eps/d gamma - head|^2 (section 3; the weight of nv-tlabs/GENIE)."""
        law = self.config.times or usual_law(self.schedule)
        t = law(self.schedule, rng.uniform(batch, "time"))  # [B]
        x_t, _ = self.noised(batch.x0, t, rng)
        change = self.student(x_t, t, batch.cond)
        return (change - self.change(x_t, t, batch.cond)).square().mean()

    def change(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """gamma d eps/d gamma of the teacher along its own path, by forward mode; [B, ...].

        Along it x/alpha moves by eps d gamma, so that eps = (x/alpha - D)/gamma changes by -d D/gamma.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        alpha_rate, sigma_rate = self.schedule.derivatives(t)
        clean = self.teacher.value(x_t, t, cond)
        # dx/dt = alpha' D + sigma' eps
        row = (sigma_rate / sigma, alpha_rate - alpha * sigma_rate / sigma)
        along = combine([x_t, clean], [row])[0]
        _, rate = self.teacher.tangent((x_t, t), (along, torch.ones_like(t)), cond=cond)
        gamma_rate = (sigma_rate * alpha - sigma * alpha_rate) / alpha.square()
        return combine([rate], [(-1.0 / gamma_rate,)])[0]

    def sampling(self, steps: int, **options: Any) -> solvers.Plan:
        """Truncated Taylor steps of order 2, one call of the network each."""
        given = {"grid": self.config.grid, "analytic_first_step": self.config.analytic_first_step, **options}
        return solvers.plan(
            "genie", self.schedule, steps, prediction=self.student.prediction, head="mixed", within=True, **given
        )


def _headed(built: Mapping[str, nn.Module], width: int, blocks: int) -> Genie:
    teacher: Any = built["teacher"]
    base = copy.deepcopy(teacher.net)
    parameter = next(base.parameters(), None)
    head = Genie(base, width, blocks)
    return head if parameter is None else head.to(parameter.device, parameter.dtype)
