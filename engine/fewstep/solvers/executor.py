"""Runs any plan: one network call and one linear map a stage.

With gradients off it allocates only the first time: states live in buffers kept with the plan per shape, dtype, device
and thread, coefficients and times are tensors on the device, a guided stage is one call of doubled batch whose halves
are read as views, and nothing is read back by the host. With gradients, and inside a compiler or exporter, it allocates
and is a pure function.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from fewstep.diffusion import guidance as guiding
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.linear import coefficient_dtype
from fewstep.errors import UserError, choose
from fewstep.solvers.memory import Buffers, Tables, buffers_of, tracing
from fewstep.solvers.plans import Plan, Stage
from fewstep_kernels import lincomb

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
    denoiser: Any, plan: Plan, noise: Tensor, cond: Any = None, uncond: Any = None, seeds: Tensor | None = None
) -> Tensor:
    """x0 [B, ...] from standard normal noise; the plan scales it.

    denoiser: a Denoiser, or a bare net(x_scaled, t_net, cond). noise: [B, C, H, W] or [B, D]; or [B, 1 + S, ...]
    carrying the noise of the plan's S stochastic stages too. seeds: int64 [B], from which stochastic stages draw
    (Philox stream k for the k-th) when noise does not carry it. uncond: the condition of guidance's other half; the
    network's null condition if not given. Raises UserError for a wrong shape, a missing seed, or a denoiser that is not
    the plan's.
    """
    with torch.no_grad():
        return _run(plan, denoiser, noise, cond, uncond, seeds, answer=False).x


def execute(
    plan: Plan,
    networks: Any,
    noise: Tensor,
    *,
    cond: Any = None,
    uncond: Any = None,
    seeds: Tensor | None = None,
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
    kept = [name for stage in plan.stages[start:][:1] for name in stage.inputs if name == "base" or name[0] == "d"]
    if 0 < start < stop and kept:
        raise UserError(
            f"stage {start} of this plan reads {kept[0]!r}, kept by an earlier stage; start where only x is read."
        )
    with torch.no_grad() if gradient == "none" else contextlib.nullcontext():
        return _run(plan, networks, noise, cond, uncond, seeds, start, stop, gradient, tuple(record), checkpoint)


def _run(
    plan: Plan,
    networks: Any,
    noise: Tensor,
    cond: Any,
    uncond: Any,
    seeds: Tensor | None,
    start: int = 0,
    stop: int | None = None,
    gradient: str = "none",
    record: tuple[str, ...] = (),
    checkpoint: bool = False,
    answer: bool = True,
) -> Execution:
    stop = len(plan.stages) if stop is None else stop
    stages = plan.stages[start:stop]
    calls = _network_calls(plan, networks, start, stop)
    first, carried = _split_noise(plan, noise, seeds, stages)
    tables = Tables(plan, noise.device, coefficient_dtype(noise))
    reuse = gradient == "none" and not tracing()
    buffers = buffers_of(plan, first) if reuse else None
    conds = _conditions(networks, stages, cond, uncond, buffers)
    recorded: dict[str, list[Tensor]] = {name: [] for name in record}

    scale = plan.initial_scale if start == 0 else 1.0
    if not stages:
        x = lincomb([first], tables.start((scale,)), dtypes=[first.dtype])[0]
        return Execution(x, x, {name: [x] if name == "x" else [] for name in record})
    state = _started(tables, stages[0], first, scale, buffers)
    if "x" in recorded:
        recorded["x"].append(state["x"].clone() if reuse else state["x"])
    denoised: Tensor | None = None
    for index, stage in enumerate(stages, start):
        last = index + 1 == stop
        tracked = gradient == "all" or (gradient == "last" and last)
        with contextlib.nullcontext() if tracked else torch.no_grad():
            told = tables.times(index, first, buffers)
            columns = _evaluate(calls[index - start], stage, state, told, conds, tracked, checkpoint)
            known = {**state, **columns}
            inputs = [known[name] for name in stage.inputs if name != "noise"]
            drawn: dict[str, Any] = {}
            if stage.noise and carried is not None:
                inputs.append(carried[:, stage.noise])
            elif stage.noise:
                drawn = {"noise_seeds": seeds, "noise_stream": stage.noise}
            if "denoised" in recorded or (answer and last):
                terms = [state["x"], *columns.values()]
                denoised = lincomb(terms, tables.read_out(index))[0]
                if "denoised" in recorded:
                    recorded["denoised"].append(denoised)
            if "mean" in recorded:
                quiet = inputs[: len(stage.inputs) - bool(stage.noise)]
                recorded["mean"].append(lincomb(quiet, tables.mean(index))[0])
            out, names = _targets(plan, index, last, first, buffers)
            table = tables.matrix(index, repeated=len(names) > len(stage.outputs))
            values = lincomb(
                inputs, table, out=out, dtypes=None if out else [first.dtype] * len(stage.outputs), **drawn
            )
        state = {**state, **dict(zip(names, values))}
        if buffers is not None and "input" in names:
            state["input"] = buffers.doubled if plan.stages[index + 1].guided else buffers["input"]
        elif "input" not in names:
            state.pop("input", None)
        if "x" in recorded:
            recorded["x"].append(state["x"].clone() if reuse else state["x"])
    return Execution(state["x"], denoised if denoised is not None else state["x"], recorded)


Call = Callable[[Tensor, Tensor, Any, bool], Tensor]


def _network_calls(plan: Plan, networks: Any, start: int, stop: int) -> list[Call]:
    if isinstance(networks, (list, tuple)):
        if len(networks) != stop - start:
            raise UserError(
                f"{len(networks)} networks were given for {stop - start} stages; give one, or one per stage."
            )
        return [_network_call(plan, network) for network in networks]
    return [_network_call(plan, networks)] * (stop - start)


def _network_call(plan: Plan, network: Any) -> Call:
    module = getattr(network, "module", network)
    if isinstance(module, Denoiser):
        for what, own, planned in (
            ("prediction", module.prediction, plan.prediction),
            ("schedule", module.schedule, plan.schedule),
        ):
            if own != planned:
                raise UserError(
                    f"the denoiser's {what} {own!r} is not the plan's {planned!r}; "
                    f"compile the plan with {what}=denoiser.{what}."
                )

        def call(x: Tensor, t: Tensor, cond: Any, tracked: bool) -> Tensor:
            if not tracked and hasattr(network, "value"):
                return network.value(x, t, cond, as_network=True)
            return network(x, t, cond, as_network=True)

        return call
    if not callable(network):
        raise UserError(f"the network is {type(network).__name__}; give a Denoiser or a callable net(x, t, cond).")
    return lambda x, t, cond, tracked: network(x, t) if cond is None else network(x, t, cond)


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
    separate = stage.guided or stage.input_scale != 1.0
    scales = [scale, scale * stage.input_scale] if separate else [scale]
    if buffers is None:
        values = lincomb([first], tables.start(tuple(scales)), dtypes=[first.dtype] * len(scales))
        return dict(zip(("x", "input"), values))
    out = [buffers["x"]]
    if separate:
        out.append(buffers["input"])
    if stage.guided:
        out.append(buffers["second input"])
        scales.append(scales[-1])
    lincomb([first], tables.start(tuple(scales)), out=out)
    state = {"x": buffers["x"]}
    if separate:
        state["input"] = buffers.doubled if stage.guided else buffers["input"]
    return state


def _targets(
    plan: Plan, index: int, last: bool, first: Tensor, buffers: Buffers | None
) -> tuple[list[Tensor] | None, tuple[str, ...]]:
    """Where a stage writes: buffers, but for the final x, which the caller keeps."""
    names = plan.stages[index].outputs
    if buffers is None:
        return None, names
    out = [buffers[name] for name in names]
    if last:
        out[names.index("x")] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    if "input" in names and plan.stages[index + 1].guided:
        return [*out, buffers["second input"]], (*names, "second input")
    return out, names


def _conditions(
    networks: Any, stages: Sequence[Stage], cond: Any, uncond: Any, buffers: Buffers | None
) -> tuple[Any, Any]:
    """(for plain calls, for guided calls)."""
    if not any(stage.guided for stage in stages):
        return cond, None
    if uncond is None:
        owner = networks[0] if isinstance(networks, (list, tuple)) else networks
        if cond is None:
            raise UserError("this plan is guided and got no condition; give cond, or compile it with guidance=None.")
        if not hasattr(owner, "null"):
            raise UserError(f"this plan is guided and {type(owner).__name__} has no null(cond); give uncond.")
        uncond = owner.null(cond)
    if buffers is None or not isinstance(cond, Tensor) or not isinstance(uncond, Tensor):
        return cond, guiding.joined(cond, uncond)
    if cond.shape != uncond.shape or cond.dtype != uncond.dtype:
        raise UserError(
            f"cond is {cond.dtype} {list(cond.shape)} and uncond {uncond.dtype} {list(uncond.shape)}; they must match."
        )
    shape = (2 * cond.shape[0], *cond.shape[1:])
    both = buffers.keep(("cond", shape, cond.dtype), lambda: torch.empty(shape, dtype=cond.dtype, device=cond.device))
    return cond, guiding.joined(cond, uncond, out=both)


def _evaluate(
    call: Call,
    stage: Stage,
    state: Mapping[str, Tensor],
    told: Tensor,
    conds: tuple[Any, Any],
    tracked: bool,
    checkpoint: bool,
) -> dict[str, Tensor]:
    """The network's columns."""
    x = state["x"]
    batch = x.shape[0]
    read = state.get("input", x)
    if stage.guided and "input" in state and read.shape[0] == batch:
        read = torch.cat([read, read])
    cond = conds[1] if stage.guided else conds[0]
    if checkpoint and tracked and torch.is_grad_enabled():
        output = recompute(call, read, told, cond, tracked, use_reentrant=False)
    else:
        output = call(read, told, cond, tracked)
    if not isinstance(output, Tensor) or output.shape[1:] != x.shape[1:]:
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"the network answered {given} to an input of shape {list(x.shape)}; they must be alike.")
    if not stage.guided:
        return {"cond": output}
    return {"cond": output[:batch], "uncond": output[batch:]}
