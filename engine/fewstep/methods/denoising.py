"""Denoising: how a teacher is trained.  Karras et al. 2022 (EDM), arXiv:2206.00364; flow matching, arXiv:2210.02747."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from fewstep import solvers
from fewstep.methods.base import Method, MethodConfig, Needs, NetworkSpec
from fewstep.methods.batch import Batch
from fewstep.methods.distances import output_weight
from fewstep.methods.registry import register
from fewstep.methods.rng import Rng
from fewstep.methods.times import TimeLaw, usual_law


@register("denoising")
class Denoising(Method):
    """Train a teacher: recover x0 from x_t, in plain squared error of the network's own output."""

    networks = {"student": NetworkSpec(start="random")}
    needs = Needs(data="samples", teacher=False)

    class Config(MethodConfig):
        """Options of teacher training."""

        times: TimeLaw | None = None
        """Law of the training times; none: log-normal(-1.2, 1.2) for prediction "edm", karras or uniform for others."""
        condition_dropout: float = Field(0.1, ge=0, le=1)
        """Share of samples trained with the null condition, for classifier-free guidance."""
        solver: str = "dpmpp_2m"
        """The solver of `sampling`."""

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        t = self.time_law()(self.schedule, rng.uniform(batch, "time"))  # [B]
        x_t, _ = self.noised(batch.x0, t, rng)
        cond = self.condition_dropout(batch.cond, self.config.condition_dropout, rng, self.student)
        answer = self.student(x_t, t, cond)
        error = (answer - batch.x0).square().flatten(1).mean(1)
        return (output_weight(self.schedule, self.prediction, t) * error).mean()

    def time_law(self) -> TimeLaw:
        if self.config.times is not None:
            return self.config.times
        return TimeLaw(name="log_normal") if self.prediction.kind == "edm" else usual_law(self.schedule)

    def sampling(self, steps: int, **options: Any) -> solvers.Plan:
        """A plan of the configured solver; `guidance=` and the solver's own options pass through."""
        return solvers.plan(
            self.config.solver, self.schedule, steps, prediction=self.prediction, **{"grid": "karras", **options}
        )
