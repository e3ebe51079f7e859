"""A run of a plan differentiated down to the plan's own numbers: its coefficients and the times its network is told.

Network calls are computed again in the backward pass, so that a run keeps its states and no activations, whatever its
number of steps, as 2202.05830 does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.linear import coefficient_dtype
from fewstep.errors import UserError
from fewstep.solvers.calls import conditions, evaluate, network_calls
from fewstep.solvers.memory import started
from fewstep.solvers.plans import Plan
from fewstep_kernels import lincomb

Loss = Callable[[Tensor, Tensor], Tensor]
Key = tuple[int, str, str]  # stage, output, input; or stage, "", "" for the time its network is told


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one run is compared on: noise [B, ...], what it should come to, and the network's condition."""

    noise: Tensor
    target: Tensor
    cond: Any = None
    uncond: Any = None


def numbers_of(plan: Plan) -> dict[Key, float]:
    """All that the times of a plan decide but its start, where every grid of one search is the same."""
    found: dict[Key, float] = {}
    for index, stage in enumerate(plan.stages):
        found[index, "", ""] = stage.network_time
        for output in stage.outputs:
            found |= {(index, output, name): value for name, value in stage.row(output).items()}
    return found


def check(solver: str, plan: Plan) -> None:
    """Raises UserError for a plan that `walked` cannot run."""
    if plan.stochastic_stages:
        raise UserError(
            f"solver {solver!r} draws noise in this plan; search the grid of a deterministic one such as ddim."
        )
    for stage in plan.stages:
        if stage.nonlinear:
            kinds = dict.fromkeys(part.kind for part in stage.nonlinear if part.kind != "map")
            raise UserError(
                f"solver {solver!r} changes estimates by {', '.join(kinds)} in this plan, which is no linear map; "
                "leave clip, thresholding or this guidance out."
            )
        if stage.others or stage.answers or len(stage.conditions) > 2:
            raise UserError(
                f"solver {solver!r} with this guidance is more than one network and a linear map a stage; "
                "search the grid of a plain one such as ddim."
            )


def slopes_of(
    plan: Plan, numbers: Mapping[Key, float], denoiser: Any, batches: Sequence[Batch], loss: Loss, needed: bool
) -> tuple[float, dict[Key, float]]:
    """The mean loss over batches with these numbers for the plan's, and where `needed` its derivatives by them."""
    table = {key: torch.tensor(value, dtype=torch.float64, requires_grad=needed) for key, value in numbers.items()}
    total, slopes = 0.0, dict.fromkeys(table, 0.0)
    size = sum(len(batch.noise) for batch in batches)
    for batch in batches:
        share = len(batch.noise) / size
        with torch.set_grad_enabled(needed):
            value = loss(walked(plan, table, denoiser, batch), batch.target)
        total += float(value.detach()) * share
        if needed:
            found = torch.autograd.grad(value, list(table.values()), allow_unused=True)
            for key, slope in zip(table, found):
                slopes[key] += 0.0 if slope is None else float(slope) * share
    return total, slopes


def walked(plan: Plan, table: Mapping[Key, Tensor], denoiser: Any, batch: Batch) -> Tensor:
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
