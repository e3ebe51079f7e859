"""Consistency distillation.  Song, Dhariwal, Chen and Sutskever 2023, arXiv:2303.01469, Algorithm 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep import solvers
from fewstep.methods.base import Average, Method, MethodConfig, Needs, NetworkSpec, TeacherGuidance
from fewstep.methods.batch import Batch
from fewstep.methods.distances import Distance
from fewstep.methods.registry import register
from fewstep.methods.rng import Rng
from fewstep.methods.times import Grid, node_times, student_grid
from fewstep.nets.network import Network


@register("consistency_distillation")
class ConsistencyDistillation(Method):
    """The student's answer must not change along the teacher's path: f(x_t, t) = f(x_s, s)."""

    needs = Needs(data="samples")
    target: Network

    class Config(MethodConfig):
        """Options of consistency distillation."""

        nodes: int = Field(18, ge=2)
        """Times between which the student must agree, t_max to t_min."""
        grid: Grid = "karras"
        """Their spacing: a time grid by name, or {name: karras, rho: 7}."""
        solver: Literal["euler", "heun"] = "heun"
        """The one step the teacher makes from a node to the next."""
        guidance: TeacherGuidance = None
        """Guidance of that step, distilled into the student: a scale or a form; none or 1: conditional only."""
        distance: Distance = Distance()
        """Between the student's two answers."""
        weighting: Literal["uniform", "inverse_gap"] = "uniform"
        """Weight of a node: 1, or 1 / (t - s) (arXiv:2310.14189, section 3.5)."""
        target_decay: float = Field(0.95, ge=0, lt=1)
        """Decay of the averaged target; 0: the student itself, without gradient, which needs far longer runs."""
        levels: dict[int, tuple[float, ...]] | None = None
        """Times at which a student of so many steps is asked, e.g. {2: [80, 0.8]}; none: spaced like the nodes."""

    @property
    def networks(self) -> Mapping[str, NetworkSpec]:  # type: ignore[override]
        networks = {"student": NetworkSpec(read_out="skip")}  # f(x, t_min) = x by construction
        if self.config.target_decay > 0:
            networks["target"] = NetworkSpec(start="student", average=Average(self.config.target_decay))
        return networks

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        t, s = self.neighbouring_times(batch, rng)  # s < t, [B]
        x_t, _ = self.noised(batch.x0, t, rng)
        x_s = self.teacher_step(x_t, t, s, batch.cond)
        target_network = self.target if self.config.target_decay > 0 else self.student
        with rng.same_dropout():
            answer = self.student(x_t, t, batch.cond)
            target = target_network.value(x_s, s, batch.cond)
        distance = self.config.distance(answer, target)  # [B]
        return (distance / (t - s) if self.config.weighting == "inverse_gap" else distance).mean()

    def neighbouring_times(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """Two neighbouring nodes for each sample; the last pair ends at t_min, where the student is the identity."""
        nodes = node_times(self.schedule, self.config.nodes, self.config.grid)
        dtype = torch.float64 if batch.x0.dtype == torch.float64 else torch.float32
        times = torch.tensor(nodes, dtype=dtype, device=batch.x0.device)
        n = rng.integers(batch, 0, len(nodes) - 1, "node")
        return times[n], times[n + 1]

    def sampling(self, steps: int, **options: Any) -> solvers.Plan:
        """Algorithm 1: ask at the first level; noise the answer to the next and ask again."""
        grid = student_grid(self.schedule, steps, self.config.grid, self.config.levels)
        return solvers.plan(
            "consistency", self.schedule, steps, grid=grid, prediction=self.student.prediction, **options
        )
