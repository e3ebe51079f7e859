"""GENIE, the second-order Taylor step with a learned derivative.  Dockhorn et al. 2022, 2210.05475, section 3."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion import real
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.linear import combine
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import choose
from fewstep.solvers import rows
from fewstep.solvers.grids import is_clean
from fewstep.solvers.plans import Row
from fewstep.solvers.registry import register

HEADS = {"derivative": ("slope",), "mixed": ("k1", "k2", "k3")}


@register("genie", "order 2, one evaluation and one of a head a step; 2210.05475", roles=("head",))
def genie(schedule: Schedule, times: Sequence[float], *, head: str = "derivative", within: bool = False) -> list[Row]:
    """x'/alpha' = x/alpha + h eps + h^2/2 d eps/d gamma, gamma = sigma/alpha and h = gamma' - gamma.

    The derivative along the path comes from a further network in the role "head" (see `DerivativeHead`), or with
    `within` from the plan's network, which then answers a tuple or more channels. `head`: "derivative", one column; or
    "mixed", the paper's k1, k2, k3 of d eps/d gamma = -k1/gamma + k2 gamma/(1 + gamma^2) + k3/(gamma (1 + gamma^2)).
    A step from pure noise, and one to sigma' = 0 (the paper's denoising step), is of order 1 and asks no
    head. For the paper's first step without the network see plan's `analytic_first_step`.
    """
    if head not in HEADS:
        raise choose("head of solver 'genie',", head, HEADS)
    columns = HEADS[head]
    answers = columns if within else ()
    table = []
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        gamma, gamma_to = schedule.ratio(t), schedule.ratio(s)
        if is_clean(schedule, s) or real.isinf(gamma):
            of_x, of_denoised = rows.jump(schedule, t, s)
            table.append(Row(t, s, {"x": {"x": of_x, "D": of_denoised}}, step, answers=answers))
            continue
        h, alpha = gamma_to - gamma, schedule.alpha(s)
        whole = 1.0 + gamma * gamma
        parts = (1.0,) if head == "derivative" else (-1.0 / gamma, gamma / whole, 1.0 / (gamma * whole))
        update = {"x": alpha / schedule.alpha(t), "E": alpha * h}
        update |= {name: 0.5 * alpha * h * h * part for name, part in zip(columns, parts)}
        others = {} if within else {"head": columns}
        table.append(Row(t, s, {"x": update}, step, answers=answers, others=others))
    return table


class DerivativeHead(nn.Module):
    """The derivative itself, d eps_hat/d gamma along the denoiser's own path, by forward mode: what a head learns.

    Called as the plan's network is: x [B, ...] scaled and the network's own time [B]; answers [B, ...]. It costs about
    three evaluations, and makes solver "genie" the truncated Taylor method of order 2 (2210.05475, section 3).
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.teacher = denoiser

    def forward(self, x: Tensor, told: Tensor, cond: Any = None) -> Tensor:
        denoiser, schedule = self.teacher, self.teacher.schedule
        t = denoiser.prediction.time_of_network_time(schedule, told)
        state = combine([x], [(1.0 / denoiser.prediction.input_scale(schedule, t),)])[0]

        def eps(state: Tensor, t: Tensor) -> Tensor:
            return denoiser.eps(state, t, cond)

        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        alpha_rate, sigma_rate = schedule.derivatives(t)
        along = denoiser.velocity(state, t, cond)
        change = torch.func.jvp(eps, (state, t), (along, torch.ones_like(t)))[1]
        gamma_rate = (sigma_rate * alpha - sigma * alpha_rate) / (alpha * alpha)
        return combine([change], [(1.0 / gamma_rate,)])[0]
