"""How good every solver's samples are for the network calls they take: on a mixture where the truth is known, and on
the digits teacher.

The mixture: ten Gaussians in 64 dimensions on the edm schedule. Deterministic solvers are held to the exact end of the
path through their noise; stochastic ones to the law, by the sliced Wasserstein distance: the mean over directions of
W1 = int |F_n - F| between the samples' projection and the mixture's, which is a mixture on the line and known. The
digits: the Frechet distance of fewstep.evaluate, unguided. Solvers run on their default grids: Karras for all but scm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
import fewstep_kernels as fk
from fewstep import solvers
from fewstep.analytic import Mixture
from fewstep.data.digits import CLASSES, digits
from fewstep.errors import UserError
from fewstep.evaluate.features import digit_classifier
from fewstep.evaluate.frechet import frechet_distance, moments

BUDGETS = (4, 5, 6, 8, 10, 14, 20, 30, 50, 80)
DIGIT_BUDGETS = (4, 6, 8, 12, 16, 24, 32)
DIMENSIONS, COMPONENTS, DIRECTIONS = 64, 10, 64
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dpmpp_3m", {"curvature": "half_weight"}),
    ("heun", {"churn": 10.0, "churn_low": 0.05, "churn_high": 50.0}),
    ("restart", {"intervals": [[3, 1, 0.2, 1.0]]}),
    ("sa", {"strength": 0.0}),
    ("unipc", {"order": 3}),
)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A solver with options, at the most steps that each budget of network calls allows: {calls: plan}."""

    name: str
    plans: Mapping[int, solvers.Plan]

    @property
    def stochastic(self) -> bool:
        return any(plan.stochastic_stages for plan in self.plans.values())


def mixture() -> Mixture:
    draw = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(COMPONENTS, DIMENSIONS, dtype=torch.float64, generator=draw)
    stds = 0.25 + 0.25 * torch.rand(COMPONENTS, dtype=torch.float64, generator=draw)
    return Mixture([1.0] * COMPONENTS, means, stds)


def within(name: str, options: Mapping[str, Any], budget: int, teacher: fewstep.Denoiser) -> solvers.Plan | None:
    """The plan with most steps that calls the network at most `budget` times and more than half as often, if any."""
    for steps in range(budget, 0, -1):
        with contextlib.suppress(UserError):
            plan = solvers.plan(name, teacher.schedule, steps, prediction=teacher.prediction, **options)
            if budget < 2 * plan.evaluations <= 2 * budget:
                return plan
    return None


def samplers(
    teacher: fewstep.Denoiser, budgets: Sequence[int], names: Sequence[str] = ()
) -> tuple[list[Sampler], list[str]]:
    """Every registered solver and the variants above, and those that do not run on a plain teacher."""
    wanted: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in names or solvers.names()]
    found, left_out = [], []
    for name, options in wanted + ([] if names else list(VARIANTS)):
        shown = [f"{key}={value}" for key, value in options.items() if not key.startswith("churn_")]
        plans = [within(name, options, budget, teacher) for budget in budgets]
        kept = {plan.evaluations: plan for plan in plans if plan is not None and not plan.roles}
        if kept:
            found.append(Sampler(" ".join([name, *shown]), kept))
        else:
            left_out.append(name)
    return found, left_out


def joined(curves: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The curves, those with equal points under one name: solvers that are the same thing here."""
    groups: list[tuple[list[str], dict[str, Any]]] = []
    for name, curve in curves.items():
        for names, other in groups:
            if equal(curve["points"], other["points"]):
                names.append(name)
                break
        else:
            groups.append(([name], curve))
    return {" = ".join(names): curve for names, curve in groups}


def equal(one: Mapping[int, dict[str, float]], other: Mapping[int, dict[str, float]]) -> bool:
    """Whether two curves' points agree but for rounding, which a network in float32 amplifies."""
    return one.keys() == other.keys() and all(
        a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-4))
        for calls in one
        for a, b in zip(one[calls].values(), other[calls].values())
    )


def sliced(samples: Tensor, data: Mixture) -> float:
    """The sliced Wasserstein-1 distance of samples [N, D] to the mixture, over fixed directions."""
    draw = torch.Generator().manual_seed(7)
    directions = torch.randn(DIRECTIONS, DIMENSIONS, dtype=torch.float64, generator=draw)
    directions /= directions.norm(dim=1, keepdim=True)
    total = 0.0
    for direction in directions:
        points = (samples.double() @ direction).sort().values
        centres, stds = data.means @ direction, data.stds
        low = min(float(points[0]), float((centres - 8 * stds).min()))
        high = max(float(points[-1]), float((centres + 8 * stds).max()))
        line = torch.linspace(low, high, 4001, dtype=torch.float64)
        exact = (torch.special.ndtr((line[:, None] - centres) / stds) * data.weights).sum(1)
        empirical = torch.searchsorted(points, line, right=True).double() / len(points)
        total += float(torch.trapezoid((empirical - exact).abs(), line))
    return total / DIRECTIONS


def on_mixture(
    paths: int, draws: int, budgets: Sequence[int] = BUDGETS, names: Sequence[str] = (), progress: Callable = print
) -> dict[str, Any]:
    """Errors by solver and network calls; `paths` noises for the deterministic, `draws` for the stochastic ones."""
    data, schedule = mixture(), fewstep.schedules.get("edm")
    teacher = data.teacher(schedule, "edm")
    noise = torch.randn(max(paths, draws), DIMENSIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = schedule.sigma(schedule.t_max) * noise[:paths]
    exact = data.flow_map(start, schedule, schedule.t_max, schedule.t_clean)
    found, left_out = samplers(teacher, budgets, names)
    curves: dict[str, dict[str, Any]] = {}
    for sampler in found:
        points = {}
        for calls, plan in sampler.plans.items():
            if sampler.stochastic:
                ends = solvers.sample(teacher, plan, noise[:draws], seeds=torch.arange(draws))
                points[calls] = {"sliced_wasserstein": sliced(ends, data)}
            else:
                away = (solvers.sample(teacher, plan, noise[:paths]) - exact).square().mean(1).sqrt()
                points[calls] = {"median": float(away.median()), "root_mean_square": float(away.square().mean().sqrt())}
        curves[sampler.name] = {"stochastic": sampler.stochastic, "points": points}
        progress(
            f"mixture  {sampler.name:46} " + "  ".join(f"{c}: {next(iter(p.values())):.2e}" for c, p in points.items())
        )
    floor = [sliced(data.sample(draws, torch.Generator().manual_seed(seed)), data) for seed in range(3)]
    return {
        "data": f"{COMPONENTS} Gaussians in {DIMENSIONS} dimensions, edm schedule, Karras grid, float64",
        "paths": paths,
        "draws": draws,
        "floor": sum(floor) / len(floor),
        "curves": joined(curves),
        "left_out": left_out,
    }


def on_digits(
    teacher_folder: Path,
    count: int,
    budgets: Sequence[int] = DIGIT_BUDGETS,
    names: Sequence[str] = (),
    batch: int = 250,
    progress: Callable = print,
) -> dict[str, Any]:
    """Frechet distances to the held-out digits of `count` unguided samples, labels i mod 10, seeds i."""
    artefact = fewstep.load(teacher_folder).artefact
    teacher, classifier = artefact.denoiser.eval(), digit_classifier()
    target = moments(classifier.features(digits("held_out")[0]))
    found, left_out = samplers(teacher, budgets, names)
    curves: dict[str, dict[str, Any]] = {}
    seeds = torch.arange(count)
    noise = fk.normal(seeds, artefact.image_shape)

    def images(plan: solvers.Plan) -> Iterator[Tensor]:
        for part in seeds.split(batch):
            yield solvers.sample(teacher, plan, noise[part], part % CLASSES, seeds=part)

    for sampler in found:
        points = {}
        for calls, plan in sampler.plans.items():
            drawn = torch.cat(list(images(plan)))
            finite = bool(drawn.isfinite().all())
            points[calls] = {"frechet": frechet_distance(classifier.features(drawn), target) if finite else None}
        curves[sampler.name] = {"stochastic": sampler.stochastic, "points": points}
        progress(f"digits  {sampler.name:46} " + "  ".join(f"{calls}: {p['frechet']}" for calls, p in points.items()))
    real = frechet_distance(classifier.features(digits("train")[0]), target)
    return {"teacher": artefact.digest, "count": count, "floor": real, "curves": joined(curves), "left_out": left_out}
