"""Methods of other kinds on the real interface: they prove that it carries them, and nothing about their quality.

Flow schedule on points [B, 2]; networks answer with x0. Ported from the interface's design sketch.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import softplus

from fewstep.methods import Average, Method, Needs, NetworkSpec, TrainingStage, Update


class Judge(nn.Module):
    """(x, t) -> [B, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


JUDGE = NetworkSpec(start=lambda built: Judge(), read_out="plain")


def ddim(schedule, x, x0, t, s):
    ratio = (schedule.sigma(s) / schedule.sigma(t))[:, None]
    return ratio * x + (schedule.alpha(s)[:, None] - ratio * schedule.alpha(t)[:, None]) * x0


class CTM(Method):
    """Gradient through the averaged network's input, one K for all, two times, an adversary, an adaptive weight."""

    networks = {
        "student": NetworkSpec(inputs=("x", "t", "s"), read_out="jump"),
        "target": NetworkSpec("student", inputs=("x", "t", "s"), average=Average(0.9)),
        "disc": JUDGE,
    }

    def iteration(self, batch, rng):
        k = rng.same_for_all(1, 4)
        t = rng.uniform(batch, "t", 0.6, 1.0)
        u, e = t - 0.1 * k, torch.full_like(t, self.schedule.t_min)
        r = u * 0.5
        x_t, _ = self.noised(batch.x0, t, rng)
        x_u = x_t
        for i in range(k):
            x_u = self.teacher_step(x_u, t - 0.1 * i, t - 0.1 * (i + 1))
        answer = self.target.fixed(self.student(x_t, t, r), r, e)
        target = self.target.value(self.student.value(x_u, u, r), r, e)
        consistency = (answer - target).square().mean()
        denoising = (self.student(x_t, t, t * 0.9) - batch.x0).square().mean()
        sizes = [self.student.gradient_norm(loss, "last") for loss in (consistency, denoising)]
        weight = (sizes[0] / sizes[1].clamp_min(1e-6)).clamp(0.01, 10)
        yield Update("student", consistency + weight * denoising + softplus(-self.disc.fixed(answer, e)).mean())
        fake, real = self.disc(answer.detach(), e), self.disc(batch.x0, e)
        yield Update("disc", (softplus(fake) + softplus(-real)).mean())


class SCM(Method):
    """A tangent, then a call."""

    needs = Needs(tangent=True)

    def loss(self, batch, rng):
        t = rng.uniform(batch, "t", 0.1, 0.9)
        x_t, noise = self.noised(batch.x0, t, rng)
        f, df = self.student.tangent((x_t, t), (noise - batch.x0, torch.ones_like(t)))
        g = df / (df.norm(dim=1, keepdim=True) + 0.1)
        return (self.student(x_t, t) - f + g).square().mean()


class SiD(Method):
    """Two networks fixed, gradients through both to the student."""

    networks = {"student": NetworkSpec(), "critic": NetworkSpec()}

    def iteration(self, batch, rng):
        one = torch.full((len(batch),), self.schedule.t_max)
        x = self.student.value(rng.normal(batch.x0, "z of the critic"), one)
        t = rng.uniform(batch, "t of the critic", 0.05, 0.95)
        x_t, _ = self.noised(x, t, rng, "critic")
        yield Update("critic", (self.critic(x_t, t) - x).square().mean())
        x = self.student(rng.normal(batch.x0, "z"), one)
        t = rng.uniform(batch, "t", 0.05, 0.95)
        x_t, _ = self.noised(x, t, rng, "student")
        real, fake = self.teacher.fixed(x_t, t), self.critic.fixed(x_t, t)
        yield Update("student", ((real - fake) * (fake - x)).mean())


class Progressive(Method):
    """Stages that copy and restart."""

    def stages(self):
        for steps in (8, 4, 2):
            copies = {} if steps == 8 else {"teacher": "student"}
            yield TrainingStage(f"{steps} steps", 3, copies, ("student",), values={"steps": steps})

    def loss(self, batch, rng):
        steps = self.stage.values["steps"]
        t = (1 + rng.integers(batch, 0, steps, "node").to(batch.x0.dtype)) / steps
        u, e = t - 0.5 / steps, t - 1 / steps
        x_t, _ = self.noised(batch.x0, t, rng)
        x_u = ddim(self.schedule, x_t, self.teacher.value(x_t, t), t, u)
        x_e = ddim(self.schedule, x_u, self.teacher.value(x_u, u), u, e)
        ratio = (self.schedule.sigma(e) / self.schedule.sigma(t))[:, None]
        target = (x_e - ratio * x_t) / (self.schedule.alpha(e)[:, None] - ratio * self.schedule.alpha(t)[:, None])
        return (self.student(x_t, t) - target).square().mean()


class SFD(Method):
    """Several optimiser steps an iteration, on the student's own states and the teacher's recorded ones."""

    def iteration(self, batch, rng):
        times = torch.linspace(1, 0, 5).tolist()
        x = rng.normal(batch.x0, "z")
        recorded, x_t = [], x
        for a, e in pairwise(times):
            a, m, e = (torch.full((len(batch),), value) for value in (a, (a + e) / 2, e))
            x_t = ddim(self.schedule, x_t, self.teacher.value(x_t, a), a, m)
            x_t = ddim(self.schedule, x_t, self.teacher.value(x_t, m), m, e)
            recorded.append((a, e, x_t))
        for a, e, goal in recorded:
            answer = ddim(self.schedule, x, self.student(x, a), a, e)
            yield Update("student", (answer - goal).abs().sum() / len(batch))
            x = answer.detach()


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Parameter(torch.randn(16, 2))

    def forward(self):
        return self.pixels


class SDS(Method):
    """The student is pixels: a factory without inputs."""

    networks = {"student": NetworkSpec(start=lambda built: Pixels(), inputs=(), read_out="plain")}
    needs = Needs(data="none")

    def loss(self, batch, rng):
        x = self.student()
        t = rng.uniform(batch, "t", 0.02, 0.98)
        x_t, _ = self.noised(x.detach(), t, rng)
        h = x.detach() - self.teacher.value(x_t, t)
        return 0.5 * (x - (x - h).detach()).square().sum() / len(x)


class SFTPG(Method):
    """Recorded trajectories and many yields; policy gradient, critic and baseline."""

    networks = {"student": NetworkSpec(), "critic": JUDGE, "baseline": JUDGE}

    def iteration(self, batch, rng):
        x, path = rng.normal(batch.x0, "z"), []
        for i in range(4):
            t = torch.full((len(batch),), 1 - 0.25 * i)
            mean = ddim(self.schedule, x, self.student.value(x, t), t, t - 0.25)
            y = mean + 0.1 * rng.normal(x, f"noise {i}")
            path.append((x, t, y))
            x = y
        zero = torch.zeros(len(batch))
        for _ in range(5):
            yield Update("critic", (self.critic(batch.x0, zero) - self.critic(x, zero)).mean())
        reward = self.critic.value(x, zero)
        for before, t, after in path:
            mean = ddim(self.schedule, before, self.student(before, t), t, t - 0.25)
            log_probability = -(after - mean).square().mean(1, keepdim=True) / 0.02
            yield Update("student", ((reward - self.baseline.value(before, t)) * log_probability).mean())
            yield Update("baseline", (self.baseline(before, t) - reward).square().mean())


class KnowledgeDistillation(Method):
    """Pairs made before the stage; here made by the test's data function."""

    needs = Needs(data="pairs")

    def loss(self, batch, rng):
        z, goal = batch.pair
        return (self.student(z, torch.full((len(batch),), self.schedule.t_max)) - goal).square().mean()


class Unequal(Method):
    """Wrong on purpose: a branch decided by this micro-batch's own draw."""

    networks = {"student": NetworkSpec(), "other": NetworkSpec()}

    def iteration(self, batch, rng):
        name = "student" if int(batch.index[0]) % 32 == 0 else "other"
        yield Update(name, getattr(self, name)(batch.x0, rng.uniform(batch, "t")).square().mean())


class Leaking(Method):
    """Wrong on purpose: the critic is called, not fixed, in the student's turn."""

    networks = {"student": NetworkSpec(), "critic": NetworkSpec()}

    def loss(self, batch, rng):
        t = rng.uniform(batch, "t", 0.1, 0.9)
        return self.critic(self.student(batch.x0, t), t).square().mean()


ALL = (CTM, SCM, SiD, Progressive, SFD, SDS, SFTPG, KnowledgeDistillation)
__all__ = ["ALL", "Leaking", "Unequal"]
