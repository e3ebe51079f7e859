"""Time grids searched by gradient descent on how good the samples are.  DDSS: Watson et al. 2022, arXiv:2202.05830.

A plan is a table of numbers that the grid decides. The loss is differentiated through a run of the plan down to these
numbers (`plan_slopes`), and from there to the grid by central differences of compiling it, which asks no network. So
any solver with a deterministic plan has its grid searched. The paper's loss is a kernel distance between features of
samples and of data; here it is what the caller names, by default the distance to given targets, such as the same noise
taken along many steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.solvers import registry
from fewstep.solvers.plan_slopes import Batch, Key, Loss, check, numbers_of, slopes_of
from fewstep.solvers.plans import Plan

LEAST_SHARE = 1e-9  # of the whole way that a step may take
_APART = 1e-5  # central differences in log share


@dataclasses.dataclass(frozen=True)
class Descent:
    """The best grid met, and the mean loss over batches at the start and after every round."""

    times: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return min(self.losses)


def paired_distance(samples: Tensor, targets: Tensor) -> Tensor:
    """The mean over samples of the root mean square of sample less target, both [B, ...].

    Not of the squares: few samples that end in another mode than their target would outweigh all others.
    """
    if samples.shape != targets.shape:
        raise UserError(
            f"targets are {list(targets.shape)} and samples {list(samples.shape)}; give one for each noise."
        )
    apart = (samples - targets).flatten(1)
    return torch.linalg.vector_norm(apart, dim=1).mean() / math.sqrt(apart.shape[1])


def kernel_distance(features: Callable[[Tensor], Tensor]) -> Loss:
    """The squared kernel distance between features [B, D] of two unpaired sets, k(a, b) = (a.b/D + 1)^3, unbiased: the
    kernel Inception distance where the features are Inception's (1801.01401, section 4)."""

    def distance(samples: Tensor, targets: Tensor) -> Tensor:
        a, b = (features(images).flatten(1).double() for images in (samples, targets))
        if min(len(a), len(b)) < 2:
            raise UserError(f"a kernel distance needs two samples a batch and got {len(a)}; give larger batches.")

        def mean(left: Tensor, right: Tensor) -> Tensor:
            kernel = (left @ right.T / left.shape[1] + 1.0) ** 3
            if left is not right:
                return kernel.mean()
            return (kernel.sum() - kernel.diagonal().sum()) / (len(left) * (len(left) - 1))

        return mean(a, a) + mean(b, b) - 2.0 * mean(a, b)

    return distance


def descend(
    denoiser: Any,
    batches: Sequence[Batch],
    start: Sequence[float],
    *,
    solver: str = "ddim",
    loss: Loss = paired_distance,
    rounds: int = 100,
    rate: float = 0.1,
    guidance: Any = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Descent:
    """The best of the grids that Adam passes from `start` (N + 1 falling times) in `rounds` steps; its ends stay.

    loss(samples, targets) -> scalar; its mean over `batches`, weighted by their sizes, is what falls: the same batches
    every round, so that the same call gives the same grid. The steps' shares of the way from first to last time are a
    softmax, so no grid but a falling one is ever tried; `rate` is Adam's, in the logarithm of a share, and falls to 0
    as a cosine. options: the solver's own. progress is told each round and its loss. Raises UserError for what cannot
    be searched.
    """
    if not hasattr(denoiser, "prediction") or not hasattr(denoiser, "schedule"):
        raise UserError(
            f"a grid is searched for a Denoiser, which knows its schedule and prediction, and got a "
            f"{type(denoiser).__name__}; wrap it: Denoiser(net, schedule, prediction)."
        )
    _check(batches, rounds, rate)
    shares = _shares(start)
    given = dict(prediction=denoiser.prediction, guidance=guidance, **(options or {}))

    def compiled(logits: Tensor) -> Plan:
        times = _times(logits, start)
        return registry.plan(solver, denoiser.schedule, len(times) - 1, grid=times, **given)

    # where a share is floor + (1 - N floor) softmax
    logits = ((shares - LEAST_SHARE) / (1.0 - len(shares) * LEAST_SHARE)).log()
    check(solver, compiled(logits))
    logits.requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=rate, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    losses: list[float] = []
    best = tuple(float(t) for t in start)
    for number in range(rounds + 1):
        at = logits.detach()
        plan = compiled(at)
        sides = _sides(compiled, at) if number < rounds else []
        # a coefficient that is zero just here is in no table but those beside it
        near = dict.fromkeys([key for side in sides for numbers in side for key in numbers], 0.0)
        numbers = {**near, **numbers_of(plan)}
        value, slopes = slopes_of(plan, numbers, denoiser, batches, loss, needed=number < rounds)
        _finite(value, number, rate)
        if losses and value < min(losses):
            best = tuple(_times(at, start))
        losses.append(value)
        if progress is not None:
            progress(number, value)
        if number < rounds:
            logits.grad = _chained(sides, slopes)
            optimizer.step()
            decay.step()
    return Descent(best, tuple(losses))


def refine(
    denoiser: Any,
    batches: Sequence[Batch],
    plan: Plan,
    *,
    loss: Loss = paired_distance,
    rounds: int = 100,
    rate: float = 0.01,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Plan, tuple[float, ...]]:
    """The plan with coefficients of its own, the other half of DDSS: the best met, and the loss after every round.

    Each coefficient that is not zero is scaled by a factor that Adam moves from 1 with steps of `rate`, falling to 0 as
    a cosine; times stay, and what the network reads stays x at its scale. The plan samples as any other and survives
    JSON; its `options` still name the solver it came from. As `descend` otherwise.
    """
    _check(batches, rounds, rate)
    check(plan.solver, plan)
    numbers = numbers_of(plan)
    free = [key for key, value in numbers.items() if key[1] not in ("", "input") and value != 0.0]
    factors = torch.ones(len(free), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([factors], lr=rate, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    losses: list[float] = []
    best = numbers
    for number in range(rounds + 1):
        moved = _moved(plan, numbers, dict(zip(free, factors.tolist())))
        value, slopes = slopes_of(plan, moved, denoiser, batches, loss, needed=number < rounds)
        _finite(value, number, rate)
        if losses and value < min(losses):
            best = moved
        losses.append(value)
        if progress is not None:
            progress(number, value)
        if number < rounds:
            by_row = _of_inputs(plan, slopes)
            factors.grad = torch.tensor([by_row[key] * numbers[key] for key in free], dtype=torch.float64)
            optimizer.step()
            decay.step()
    stages = []
    for index, stage in enumerate(plan.stages):
        matrix = tuple(tuple(best[index, output, name] for name in stage.inputs) for output in stage.outputs)
        stages.append(dataclasses.replace(stage, matrix=matrix))
    return dataclasses.replace(plan, stages=tuple(stages)), tuple(losses)


def _moved(plan: Plan, numbers: Mapping[Key, float], factors: Mapping[Key, float]) -> dict[Key, float]:
    """The numbers, coefficients times their factors; what the next network reads follows x."""
    moved = {key: value * factors.get(key, 1.0) for key, value in numbers.items()}
    for index, output, name in moved:
        if output == "input":
            moved[index, output, name] = plan.stages[index + 1].input_scale * moved[index, "x", name]
    return moved


def _of_inputs(plan: Plan, slopes: Mapping[Key, float]) -> dict[Key, float]:
    """Slopes by the rows of x, what they do to the next network's input included."""
    found = dict(slopes)
    for (index, output, name), slope in slopes.items():
        if output == "input":
            found[index, "x", name] += plan.stages[index + 1].input_scale * slope
    return found


def _check(batches: Sequence[Batch], rounds: int, rate: float) -> None:
    if not batches:
        raise UserError("a search runs on batches of noise and targets and got none; give at least one.")
    if type(rounds) is not int or rounds < 1 or not rate > 0:
        raise UserError(f"rounds={rounds} and rate={rate}; give at least one whole round and a rate above 0.")
    if torch.is_inference_mode_enabled():
        raise UserError("a search takes derivatives, which torch.inference_mode() forbids; call it outside of that.")


def _finite(value: float, number: int, rate: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"the loss is {value} in round {number}; start elsewhere, or give a rate below {rate}.")


def _shares(start: Sequence[float]) -> Tensor:
    times = torch.tensor([float(t) for t in start], dtype=torch.float64)
    if len(times) < 3:
        raise UserError(f"a grid of {max(len(times) - 1, 0)} steps has no inner time to search; start from at least 2.")
    shares = (times[:-1] - times[1:]) / (times[0] - times[-1])
    if not bool((shares > LEAST_SHARE).all()):
        raise UserError(f"the start grid {[float(t) for t in start]} must be strictly falling; reorder its times.")
    return shares


def _times(logits: Tensor, start: Sequence[float]) -> list[float]:
    """Falling by construction: every step takes more than the floor, and the ends are the start's own."""
    first, last = float(start[0]), float(start[-1])
    shares = LEAST_SHARE + (1.0 - len(logits) * LEAST_SHARE) * torch.softmax(logits, 0)
    left = shares.flip(0).cumsum(0).flip(0)  # of the way, before each step
    return [first, *(last + (first - last) * left[1:]).tolist(), last]


def _sides(compiled: Callable[[Tensor], Plan], at: Tensor) -> list[tuple[dict[Key, float], dict[Key, float]]]:
    """The plan's numbers with each log share a little above and below."""
    return [
        (numbers_of(compiled(at + apart)), numbers_of(compiled(at - apart)))
        for apart in _APART * torch.eye(len(at)).double()
    ]


def _chained(sides: Sequence[tuple[dict[Key, float], dict[Key, float]]], slopes: Mapping[Key, float]) -> Tensor:
    """The loss's gradient by log share, from its `slopes` by the plan's numbers."""
    gradient = [
        sum(slope * (above.get(key, 0.0) - below.get(key, 0.0)) for key, slope in slopes.items()) / (2.0 * _APART)
        for above, below in sides
    ]
    return torch.tensor(gradient, dtype=torch.float64)
