"""Improved distribution matching distillation.  Yin et al. 2024 (DMD2), arXiv:2405.14867, sections 4.1 to 4.5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from fewstep import solvers
from fewstep.methods.base import Method, MethodConfig, Needs, NetworkSpec, OptimizerConfig, TeacherGuidance, Update
from fewstep.methods.batch import Batch
from fewstep.methods.critic import Critic, matching_direction, pseudo_target_loss
from fewstep.methods.discriminator import Discriminator, accuracy, discriminator_loss, make_head, student_loss, tap_name
from fewstep.methods.registry import register
from fewstep.methods.rng import Rng
from fewstep.methods.times import Grid, TimeLaw, student_grid, usual_law
from fewstep.nets.network import Network


@register("dmd2")
class DMD2(Method):
    """Move the student's distribution to the teacher's by the difference of two scores, and by a discriminator."""

    needs = Needs(data="samples")
    critic: Network
    head: Network

    class Config(MethodConfig):
        """Options of DMD2."""

        steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 4), min_length=1)
        """The numbers of evaluations the one student serves."""
        levels: dict[int, tuple[float, ...]] | None = None
        """Times at which a student of so many steps is asked; none: those of the grid."""
        grid: Grid = "karras"
        """The spacing of those times: a time grid by name, or {name: karras, rho: 7}."""
        guidance: TeacherGuidance = None
        """Guidance of the teacher (the real score) only: a scale or a form; none or 1: conditional only."""
        critic_updates: int = Field(5, ge=1)
        """Critic updates to one of the student (section 4.2)."""
        critic_optimizer: OptimizerConfig | None = None
        """The critic's optimiser; none: the recipe's."""
        times: TimeLaw | None = None
        """Law of the times at which the two scores are compared; none: 0.02 .. 0.98 of the karras levels."""
        critic_times: TimeLaw | None = None
        """Law of the times the critic and the discriminator train at; none: all levels."""
        normalise: bool = True
        """Divide the difference of scores by mean|x - D| per sample (arXiv:2311.18828, equation 8)."""
        gan_weight: float = Field(3e-3, ge=0)
        """Weight of the adversarial loss in the student's; 0: no discriminator."""
        discriminator_weight: float = Field(1e-2, ge=0)
        """Weight of the discriminator's loss in the critic's."""
        critic_sees_level: bool = False
        """Tell the critic at which level the student answered: a score for each branch; the paper has one of all."""
        tap: str = ""
        """The critic's layer the discriminator looks at; empty: the network's last tap."""

    @property
    def networks(self) -> Mapping[str, NetworkSpec]:  # type: ignore[override]
        inputs = ("x", "t", "s") if self.config.critic_sees_level else ("x", "t")
        critic = NetworkSpec(inputs=inputs, optimizer=self.config.critic_optimizer)
        networks = {"student": NetworkSpec(), "critic": critic}
        if self.config.gan_weight > 0:
            networks["head"] = NetworkSpec(start=partial(_head, at=self.config.tap), read_out="plain", engine="critic")
        return networks

    @property
    def steps_offered(self) -> Sequence[int]:  # type: ignore[override]
        return self.config.steps

    def iteration(self, batch: Batch, rng: Rng) -> Iterator[Update]:
        turn = rng.step % self.config.critic_updates == 0
        x, told = self.generated(batch, rng, gradient="last" if turn else "none")
        if turn:
            loss, log = self.student_update(x, told, batch, rng)
            yield Update("student", loss, log)
        loss, log = self.critic_update(
            x.detach(), told, batch, rng
        )  # the same samples, made before the student's update
        yield Update("critic", loss, log)

    def generated(self, batch: Batch, rng: Rng, gradient: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's samples, each step started as when it samples: backward simulation (section 4.5).

        One branch (how many steps, which of them answers) is drawn for all ranks and micro-batches. With them, what
        the critic is told of the branch: the network time `s` [B] of the student's answer, or nothing.
        """
        branches = [(steps, n) for steps in self.config.steps for n in range(steps)]
        steps, n = branches[rng.same_for_all(0, len(branches))]
        noise, seeds = rng.normal(batch.x0, "start"), rng.seeds("renoise")
        plan = self.sampling(steps)
        run = solvers.execute(plan, self.student, noise, cond=batch.cond, seeds=seeds, stop=n + 1, gradient=gradient)
        if not self.config.critic_sees_level:
            return run.denoised, {}
        return run.denoised, {"s": noise.new_full((len(noise),), plan.stages[n].network_time)}

    def student_update(
        self, x: Tensor, told: dict[str, Tensor], batch: Batch, rng: Rng
    ) -> tuple[Tensor, dict[str, Any]]:
        times = self.config.times or usual_law(self.schedule, low=0.02, high=0.98)
        x_t, t = self.judge().diffused(x, rng, "matching", times)
        real = self.guided(self.teacher, x_t.detach(), t, batch.cond, batch.null, self.config.guidance)
        if self.config.gan_weight > 0:
            fake, logits = self.discriminator().fixed(x_t, t, batch.cond, **told)
        else:
            fake = self.critic.value(x_t, t, batch.cond, **told)
        direction = matching_direction(x, fake, real, self.config.normalise)
        loss = pseudo_target_loss(x, direction)
        log = {"matching": loss.detach(), "direction": direction.abs().mean()}
        if self.config.gan_weight > 0:
            adversarial = student_loss(logits)
            loss = loss + self.config.gan_weight * adversarial
            log["adversarial"] = adversarial.detach()
        return loss, log

    def critic_update(
        self, x: Tensor, told: dict[str, Tensor], batch: Batch, rng: Rng
    ) -> tuple[Tensor, dict[str, Any]]:
        judge = self.judge()
        x_t, t = judge.diffused(x, rng, "fake")
        if self.config.gan_weight == 0:
            loss = judge.loss(self.critic(x_t, t, batch.cond, **told), x, t)
            return loss, {"denoising": loss.detach()}
        answer, fake = self.discriminator()(x_t, t, batch.cond, **told)
        real_t, real_time = judge.diffused(batch.x0, rng, "real")
        _, real = self.discriminator()(real_t, real_time, batch.cond, **told)
        denoising, telling = judge.loss(answer, x, t), discriminator_loss(real, fake)
        log = {"denoising": denoising.detach(), "telling": telling.detach(), "told": accuracy(real, fake)}
        return denoising + self.config.discriminator_weight * telling, log

    def judge(self) -> Critic:
        return Critic(self.critic, self.config.critic_times or usual_law(self.schedule))

    def discriminator(self) -> Discriminator:
        return Discriminator(self.critic, self.head, tap_name(self.critic.module, self.config.tap))

    def sampling(self, steps: int, **options: Any) -> solvers.Plan:
        """Ask at the first level; noise the answer to the next with fresh noise and ask again (section 4.4)."""
        grid = student_grid(self.schedule, steps, self.config.grid, self.config.levels)
        return solvers.plan("consistency", self.schedule, steps, grid=grid, prediction=self.prediction, **options)


def _head(built: Mapping[str, nn.Module], at: str) -> nn.Module:
    return make_head(built["critic"], at)
