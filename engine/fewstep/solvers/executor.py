"""Runs any plan: one network call and one linear map a stage, and what a stage names beside them.

With gradients off it allocates only the first time: states live in buffers kept with the plan per shape, dtype, device
and thread, coefficients and times are tensors on the device, a guided stage is one call of a joined batch whose shares
are read as views, and nothing is read back by the host. (Parts between network and map may allocate.) With gradients,
and inside a compiler or exporter, it allocates and is a pure function.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.linear import coefficient_dtype
from fewstep.errors import UserError, choose
from fewstep.solvers import parts
from fewstep.solvers.calls import conditions, evaluate, network_calls, other_calls, read_by, split
from fewstep.solvers.memory import Buffers, Tables, buffers_of, noises, reads_apart, started, targets, tracing
from fewstep.solvers.plans import Plan, Stage, is_slot
from fewstep.solvers.reading import MOMENTUM
from fewstep.solvers.replay import replay_of
from fewstep_kernels import lincomb, normal

RECORDS = ("x", "denoised", "mean")


@dataclasses.dataclass(frozen=True)
class Execution:
    """What a run gives: `x` at the last stage's target, `denoised` (that stage's read-out), and what was recorded.

    recorded["x"] has one state more than stages run (the first is where it started); "denoised" and "mean" (x before
    its noise was added) have one per stage.
    """

    x: Tensor
    denoised: Tensor
    recorded: Mapping[str, list[Tensor]]


def sample(
    denoiser: Any,
    plan: Plan,
    noise: Tensor,
    cond: Any = None,
    uncond: Any = None,
    seeds: Tensor | None = None,
    *,
    negatives: Sequence[Any] = (),
    others: Mapping[str, Any] | None = None,
) -> Tensor:
    """x0 [B, ...] from standard normal noise; the plan scales it.

    denoiser: a Denoiser, or a bare net(x_scaled, t_net, cond). noise: [B, C, H, W] or [B, D]; or [B, 1 + S, ...]
    carrying the noise of the plan's S stochastic stages too. seeds: int64 [B], from which stochastic stages draw
    (Philox stream k for the k-th) when noise does not carry it. uncond: the condition of guidance's other half (a
    negative prompt's, say); the network's null condition if not given. negatives: the conditions of perpendicular
    guidance. others: the networks of further roles a plan names (`plan.roles`), each called like the denoiser. Raises
    UserError for a wrong shape, a missing seed, condition or network, or a denoiser that is not the plan's.
    """
    with torch.no_grad():
        return _run(plan, denoiser, noise, cond, uncond, seeds, negatives, others, answer=False).x


def execute(
    plan: Plan,
    networks: Any,
    noise: Tensor,
    *,
    cond: Any = None,
    uncond: Any = None,
    seeds: Tensor | None = None,
    negatives: Sequence[Any] = (),
    others: Mapping[str, Any] | None = None,
    start: int = 0,
    stop: int | None = None,
    gradient: str = "none",
    record: Sequence[str] = (),
    checkpoint: bool = False,
) -> Execution:
    """Runs stages start to stop (excluded) of a plan.

    networks: a Denoiser, a method's Network, a bare net, or a sequence of these with one per stage. From start = 0,
    `noise` is standard normal and is scaled by the plan (a rising plan takes the state itself); from a later start it
    is the state x at that stage, which must not read what earlier stages kept; with stop = start no stage runs and x is
    where it would start. gradient: through no stage, the last one run, or all. record: of "x", "denoised", "mean".
    checkpoint: recompute network calls in the backward pass instead of keeping their activations.
    """
    _check(plan)
    if gradient not in ("none", "last", "all"):
        raise choose("gradient", gradient, ("none", "last", "all"))
    for name in record:
        if name not in RECORDS:
            raise choose("record", name, RECORDS)
    stop = len(plan.stages) if stop is None else stop
    if not 0 <= start <= stop <= len(plan.stages):
        raise UserError(
            f"start={start} and stop={stop} do not name stages of a plan of {len(plan.stages)}; "
            f"give 0 <= start <= stop <= {len(plan.stages)}."
        )
    kept = [name for stage in plan.stages[start:][:1] for name in _kept_inputs(stage)]
    if 0 < start < stop and kept:
        raise UserError(
            f"stage {start} of this plan reads {kept[0]!r}, kept by an earlier stage; start where only x is read."
        )
    with torch.no_grad() if gradient == "none" else contextlib.nullcontext():
        given = (cond, uncond, seeds, negatives, others)
        return _run(plan, networks, noise, *given, start, stop, gradient, tuple(record), checkpoint)


def _check(plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise UserError(f"the plan is {plan!r}; give one made by fewstep.solvers.plan(name, schedule, steps).")


def _kept_inputs(stage: Stage) -> list[str]:
    """Registers that an earlier stage must have filled."""
    made: set[str] = set()
    kept = []
    for part in stage.nonlinear:
        kept += [name for name in part.inputs if name == MOMENTUM and name not in made]
        made |= {*part.outputs}
    return kept + [name for name in stage.inputs if name == "base" or is_slot(name)]


def _run(
    plan: Plan,
    networks: Any,
    noise: Tensor,
    cond: Any,
    uncond: Any,
    seeds: Tensor | None,
    negatives: Sequence[Any] = (),
    others: Mapping[str, Any] | None = None,
    start: int = 0,
    stop: int | None = None,
    gradient: str = "none",
    record: tuple[str, ...] = (),
    checkpoint: bool = False,
    answer: bool = True,
) -> Execution:
    _check(plan)
    stop = len(plan.stages) if stop is None else stop
    stages = plan.stages[start:stop]
    calls = network_calls(plan, networks, start, stop)
    asked = other_calls(plan, stages, others)
    first, carried = _split_noise(plan, noise, seeds, stages)
    tables = Tables(plan, noise.device, coefficient_dtype(noise))
    reuse = gradient == "none" and not tracing()
    buffers = buffers_of(plan, first) if reuse else None
    conds = conditions(networks, stages, cond, uncond, negatives, buffers, first.shape[0])
    if buffers is not None and not (answer or record or start) and stop == len(plan.stages):
        replay = replay_of(plan, first, buffers, tables, carried is not None)
        if replay is not None:
            x = replay.run(calls, conds, first, carried, seeds)
            return Execution(x, x, {})
    recorded: dict[str, list[Tensor]] = {name: [] for name in record}

    scale = plan.initial_scale if start == 0 else 1.0
    if not stages:
        x = lincomb([first], tables.start((scale,)), dtypes=[first.dtype])[0]
        return Execution(x, x, {name: [x] if name == "x" else [] for name in record})
    known = _started(tables, stages[0], first, scale, buffers)
    if "x" in recorded:
        recorded["x"].append(known["x"].clone() if reuse else known["x"])
    denoised: Tensor | None = None
    for index, stage in enumerate(stages, start):
        last = index + 1 == stop
        tracked = gradient == "all" or (gradient == "last" and last)
        with contextlib.nullcontext() if tracked else torch.no_grad():
            if stage.conditions:
                told = tables.times(index, len(stage.conditions), first, buffers)
                named = {} if stage.landing is None else {"s": tables.landing(index, told.shape[0], first, buffers)}
                cond_of = conds[stage.conditions]
                known.update(evaluate(calls[index - start], stage, known, told, cond_of, named, tracked, checkpoint))
            for number, call in enumerate(stage.others):
                told = tables.other_times(index, number, first, buffers)
                read = read_by(call, index, number, stage, known, tables, buffers)
                answers = asked[call.role](read, told, cond, tracked, {})
                known.update(zip(call.columns, split(answers, len(call.columns), known["x"])))
            drawn: dict[str, Any] = {}
            if stage.noise and carried is not None:
                known["noise"] = carried[:, stage.noise]
            elif stage.noise and stage.nonlinear:
                assert seeds is not None
                known["noise"] = normal(seeds, first.shape[1:], stream=stage.noise, dtype=tables.dtype)
            elif stage.noise:
                drawn = {"noise_seeds": seeds, "noise_stream": stage.noise}
            for number, part in enumerate(stage.nonlinear):
                matrix = tables.part(index, number) if part.matrix else None
                kept = None if buffers is None else [buffers[name] for name in part.outputs]
                made = parts.run(part, [known[name] for name in part.inputs], matrix, kept, tables.dtype)
                known.update(zip(part.outputs, made))
            inputs = [known[name] for name in (stage.inputs[:-1] if drawn else stage.inputs)]
            if "denoised" in recorded or (answer and last):
                denoised = _denoised(stage, index, known, tables)
                if "denoised" in recorded:
                    recorded["denoised"].append(denoised)
            if "mean" in recorded:
                quiet = inputs[: len(stage.inputs) - noises(stage.inputs)]
                recorded["mean"].append(lincomb(quiet, tables.mean(index), dtypes=[first.dtype])[0])
            names = targets(plan, index, buffers)
            out = None if buffers is None else [buffers[name] for name in names]
            if out and last:  # the caller keeps it
                out[names.index("x")] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
            dtypes = None if out else [first.dtype] * len(names)
            values = lincomb(inputs, tables.matrix(index, names), out=out, dtypes=dtypes, **drawn)
        known.update(zip(names, values))
        if "input" not in stage.outputs:
            known.pop("input", None)
        elif buffers is not None:
            known["input"] = buffers.input_of(len(plan.stages[index + 1].conditions))
        if "x" in recorded:
            recorded["x"].append(known["x"].clone() if reuse else known["x"])
    return Execution(known["x"], denoised if denoised is not None else known["x"], recorded)


def _split_noise(
    plan: Plan, noise: Tensor, seeds: Tensor | None, stages: Sequence[Stage]
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        given = str(noise.dtype) if isinstance(noise, Tensor) else type(noise).__name__
        raise UserError(f"noise is {given}; give a floating-point tensor [B, C, H, W] of standard normal numbers.")
    stochastic = plan.stochastic_stages
    if noise.ndim not in (2, 3, 4, 5):
        raise UserError(f"noise has shape {list(noise.shape)}; give [B, C, H, W], or [B, {1 + stochastic}, C, H, W].")
    if seeds is not None and (
        not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.shape != noise.shape[:1]
    ):
        given = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise UserError(f"seeds are {given}; give an int64 tensor with one seed per sample, [{noise.shape[0]}].")
    if noise.ndim in (3, 5):
        if noise.shape[1] != 1 + stochastic:
            raise UserError(
                f"noise has shape {list(noise.shape)} and this plan has {stochastic} stochastic stages; "
                f"give [B, {1 + stochastic}, ...] or, with seeds, [B, ...]."
            )
        return noise[:, 0], noise
    if seeds is None and any(stage.noise for stage in stages):
        raise UserError(
            f"this plan draws noise in {stochastic} stages and got neither seeds nor their noise; "
            f"give seeds (int64 [B]) or noise [B, {1 + stochastic}, ...]."
        )
    return noise, None


def _started(tables: Tables, stage: Stage, first: Tensor, scale: float, buffers: Buffers | None) -> dict[str, Tensor]:
    """Registers "x" and, where the network reads something else, "input"."""
    names, scales = started(stage, scale, buffers)
    out = None if buffers is None else [buffers[name] for name in names]
    values = lincomb([first], tables.start(scales), out=out, dtypes=None if out else [first.dtype] * len(names))
    known = dict(zip(names, values))
    if reads_apart(stage) and buffers is not None:
        known["input"] = buffers.input_of(len(stage.conditions))
    return known


def _denoised(stage: Stage, index: int, known: Mapping[str, Tensor], tables: Tables) -> Tensor:
    """The stage's read-out; x itself where no network was asked."""
    x = known["x"]
    if not stage.read_out:
        return x.clone()
    return lincomb([known[name] for name, _ in stage.read_out], tables.read_out(index), dtypes=[x.dtype])[0]
