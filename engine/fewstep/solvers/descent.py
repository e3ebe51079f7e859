"""Time grids searched by gradient descent on how good the samples are.  DDSS: Watson et al. 2022, arXiv:2202.05830.

A plan is a table of numbers that the grid decides. The loss is differentiated through a run of the plan down to these
numbers (network calls are computed again in the backward pass, so that a run keeps its states and no activations), and
from there to the grid by central differences of compiling it, which asks no network. So any solver with a deterministic
plan has its grid searched. The paper's loss is a kernel distance between features of samples and of data; here it is
what the caller names, by default the distance to given targets, such as the same noise taken along many steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.linear import coefficient_dtype
from fewstep.errors import UserError
from fewstep.solvers import registry
from fewstep.solvers.calls import conditions, evaluate, network_calls
from fewstep.solvers.memory import started
from fewstep.solvers.plans import Plan
from fewstep_kernels import lincomb

Loss = Callable[[Tensor, Tensor], Tensor]
LEAST_SHARE = 1e-9  # of the whole way that a step may take
_APART = 1e-5  # central differences in log share


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one run is compared on: noise [B, ...], what it should come to, and the network's condition."""

    noise: Tensor
    target: Tensor
    cond: Any = None
    uncond: Any = None


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
    if not batches:
        raise UserError("a grid is searched on batches of noise and targets and got none; give at least one.")
    if rounds < 1 or not rate > 0:
        raise UserError(f"rounds={rounds} and rate={rate}; give at least one round and a rate above 0.")
    shares = _shares(start)
    given = dict(prediction=denoiser.prediction, guidance=guidance, **(options or {}))

    def compiled(logits: Tensor) -> Plan:
        times = _times(logits, start)
        return registry.plan(solver, denoiser.schedule, len(times) - 1, grid=times, **given)

    # where a share is floor + (1 - N floor) softmax
    logits = ((shares - LEAST_SHARE) / (1.0 - len(shares) * LEAST_SHARE)).log()
    _check(solver, compiled(logits))
    logits.requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=rate, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    losses: list[float] = []
    best = tuple(float(t) for t in start)
    for number in range(rounds + 1):
        at = logits.detach()
        plan = compiled(at)
        sides = _sides(compiled, at) if number < rounds else []
        value, slopes = _slopes(plan, sides, denoiser, batches, loss)
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} in round {number}; give a smaller rate than {rate}, or another start."
            )
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


def _check(solver: str, plan: Plan) -> None:
    if plan.stochastic_stages:
        raise UserError(
            f"solver {solver!r} draws noise in this plan; search the grid of a deterministic one such as ddim."
        )
    for stage in plan.stages:
        if stage.others or stage.answers or stage.nonlinear or len(stage.conditions) > 2:
            raise UserError(
                f"solver {solver!r} with this guidance is more than one network and a linear map a stage; "
                "search the grid of a plain one such as ddim."
            )


Key = tuple[int, str, str]  # stage, output, input; or stage, "", "" for the time its network is told


def _numbers(plan: Plan) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for index, stage in enumerate(plan.stages):
        found[index, "", ""] = stage.network_time
        for output in stage.outputs:
            found |= {(index, output, name): value for name, value in stage.row(output).items()}
    return found


def _sides(compiled: Callable[[Tensor], Plan], at: Tensor) -> list[tuple[dict[Key, float], dict[Key, float]]]:
    """The plan's numbers with each log share a little above and below."""
    return [
        (_numbers(compiled(at + apart)), _numbers(compiled(at - apart)))
        for apart in _APART * torch.eye(len(at)).double()
    ]


def _chained(sides: Sequence[tuple[dict[Key, float], dict[Key, float]]], slopes: Mapping[Key, float]) -> Tensor:
    """The loss's gradient by log share, from its `slopes` by the plan's numbers."""
    gradient = [
        sum(slope * (above.get(key, 0.0) - below.get(key, 0.0)) for key, slope in slopes.items()) / (2.0 * _APART)
        for above, below in sides
    ]
    return torch.tensor(gradient, dtype=torch.float64)


def _slopes(
    plan: Plan,
    sides: Sequence[tuple[dict[Key, float], dict[Key, float]]],
    denoiser: Any,
    batches: Sequence[Batch],
    loss: Loss,
) -> tuple[float, dict[Key, float]]:
    """The mean loss over batches and, where there are `sides`, its derivatives by the plan's numbers."""
    # a coefficient that is zero just here is in no table but those beside it
    keys = dict.fromkeys([key for side in sides for numbers in side for key in numbers])
    numbers = {**dict.fromkeys(keys, 0.0), **_numbers(plan)}
    needed = bool(sides)
    table = {key: torch.tensor(value, dtype=torch.float64, requires_grad=needed) for key, value in numbers.items()}
    total, slopes = 0.0, dict.fromkeys(table, 0.0)
    size = sum(len(batch.noise) for batch in batches)
    for batch in batches:
        share = len(batch.noise) / size
        with torch.set_grad_enabled(needed):
            value = loss(_walked(plan, table, denoiser, batch), batch.target)
        total += float(value.detach()) * share
        if needed:
            found = torch.autograd.grad(value, list(table.values()), allow_unused=True)
            for key, slope in zip(table, found):
                slopes[key] += 0.0 if slope is None else float(slope) * share
    return total, slopes


def _walked(plan: Plan, table: Mapping[Key, Tensor], denoiser: Any, batch: Batch) -> Tensor:
    """The plan's samples, as the executor makes them, by the numbers of `table`."""
    noise, dtype = batch.noise, coefficient_dtype(batch.noise)
    asked = network_calls(plan, denoiser, 0, len(plan.stages))
    conds = conditions(denoiser, plan.stages, batch.cond, batch.uncond, (), None, len(noise))

    def mapped(inputs: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, ...]:
        return lincomb(inputs, rows.to(noise.device, dtype), dtypes=[noise.dtype] * len(rows))

    written: list[dict[str, dict[str, Tensor]]] = [{} for _ in plan.stages]
    for (index, output, name), value in table.items():
        if output:
            written[index].setdefault(output, {})[name] = value
    names, scales = started(plan.stages[0], plan.initial_scale, None)
    known = dict(zip(names, mapped([noise], torch.tensor(scales, dtype=torch.float64)[:, None])))
    for index, stage in enumerate(plan.stages):
        if stage.conditions:
            told = table[index, "", ""].to(noise.device, dtype).expand(len(stage.conditions) * len(noise))
            known |= evaluate(asked[index], stage, known, told, conds[stage.conditions], {}, True, checkpoint=True)
        rows = written[index]
        inputs = list(dict.fromkeys(name for row in rows.values() for name in row if name in known))
        zero = torch.zeros((), dtype=torch.float64)
        matrix = [torch.stack([row.get(name, zero) for name in inputs]) for row in rows.values()]
        values = mapped([known[name] for name in inputs], torch.stack(matrix))
        known.pop("input", None)
        known |= dict(zip(rows, values))
    return known["x"]
