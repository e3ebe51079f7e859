"""How a stage asks its networks: who is called, with what, and what columns come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from fewstep.diffusion import guidance as guiding
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from fewstep.solvers.memory import Buffers, Tables, tracing
from fewstep.solvers.plans import Call, Plan, Stage, column
from fewstep_kernels import lincomb

# a network as the executor asks it: (x, t, cond, with gradients, further named inputs) -> answer
Asked = Callable[[Tensor, Tensor, Any, bool, Mapping[str, Tensor]], Any]


def network_calls(plan: Plan, networks: Any, start: int, stop: int) -> list[Asked]:
    """The plan's own network for each of the stages."""
    told = any(stage.landing is not None for stage in plan.stages[start:stop])
    if isinstance(networks, (list, tuple)):
        if len(networks) != stop - start:
            raise UserError(
                f"{len(networks)} networks were given for {stop - start} stages; give one, or one per stage."
            )
        return [_watched(_network_call(plan, network, plan.prediction, told)) for network in networks]
    return [_watched(_network_call(plan, networks, plan.prediction, told))] * (stop - start)


def other_calls(plan: Plan, stages: Sequence[Stage], others: Mapping[str, Any] | None) -> dict[str, Asked]:
    """The networks of further roles."""
    calls = {call.role: call for stage in stages for call in stage.others}
    given = others or {}
    for role in calls.keys() - given.keys():
        raise UserError(
            f"this plan asks a network in the role {role!r} and got none; give others={{{role!r}: network}}."
        )
    return {role: _watched(_network_call(plan, given[role], call.prediction)) for role, call in calls.items()}


def _watched(asked: Asked) -> Asked:
    """Refuses a network that writes into what it reads: that may be the sampler's own state."""
    if tracing():
        return asked

    def call(x: Tensor, t: Tensor, cond: Any, tracked: bool, named: Mapping[str, Tensor]) -> Any:
        if x.is_inference():  # it counts no versions
            return asked(x, t, cond, tracked, named)
        version = x._version
        answer = asked(x, t, cond, tracked, named)
        if x._version != version:
            raise UserError("the network wrote into its input, the sampler's state; let it work on a copy: x.clone().")
        return answer

    return call


def _network_call(plan: Plan, network: Any, prediction: Prediction | None, told: bool = False) -> Asked:
    """told: whether the network is told where it lands. prediction: what a denoiser must predict; None for any."""
    module = getattr(network, "module", network)
    module = getattr(module, "_orig_mod", module)  # of torch.compile(denoiser)
    jumps = not isinstance(module, Denoiser) and isinstance(getattr(module, "denoiser", None), Denoiser)
    if jumps and module.two_times and not told:
        raise UserError(
            "the network is told where it lands and this plan does not say; compile it with two_times=True."
        )
    if isinstance(module, Denoiser) or jumps:
        for what, own, planned in (
            ("prediction", module.prediction, prediction or module.prediction),
            ("schedule", module.schedule, plan.schedule),
        ):
            if own != planned:
                raise UserError(
                    f"the denoiser's {what} {own!r} is not the plan's {planned!r}; "
                    f"compile the plan with {what}=denoiser.{what}."
                )

        def call(x: Tensor, t: Tensor, cond: Any, tracked: bool, named: Mapping[str, Tensor]) -> Any:
            if not tracked and hasattr(network, "value"):
                return network.value(x, t, cond=cond, as_network=True, **named)
            return network(x, t, cond=cond, as_network=True, **named)

        return call
    if not callable(network):
        raise UserError(f"the network is {type(network).__name__}; give a Denoiser or a callable net(x, t, cond).")
    return lambda x, t, cond, tracked, named: network(x, t, **named) if cond is None else network(x, t, cond, **named)


def conditions(
    networks: Any,
    stages: Sequence[Stage],
    cond: Any,
    uncond: Any,
    negatives: Sequence[Any],
    buffers: Buffers | None,
    batch: int,
) -> dict[tuple[str, ...], Any]:
    """What each kind of call is told; every condition that is a tensor holds one for each of `batch` samples."""
    kinds = {stage.conditions for stage in stages if stage.conditions}
    names = {name for kind in kinds for name in kind}
    wanted = len(names - {"cond", "uncond"})
    if len(negatives) != wanted and (wanted or len(negatives)):
        raise UserError(f"this plan takes {wanted} negatives and got {len(negatives)}; give that many conditions.")
    if names - {"cond"} and cond is None:
        raise UserError("this plan is guided and got no condition; give cond, or compile it with guidance=None.")
    if "uncond" in names and uncond is None:
        owner = networks[0] if isinstance(networks, (list, tuple)) else networks
        if not hasattr(owner, "null"):
            raise UserError(f"this plan is guided and {type(owner).__name__} has no null(cond); give uncond.")
        uncond = owner.null(cond)
    given = {"cond": cond, "uncond": uncond, **{f"negative {k}": one for k, one in enumerate(negatives)}}
    for name, one in given.items():
        if isinstance(one, Tensor) and (one.ndim == 0 or one.shape[0] != batch):
            raise UserError(
                f"{name} is {one.dtype} {list(one.shape)} and noise holds {batch} samples; give one condition for each."
            )
    return {kind: _joined([given[name] for name in kind], kind, buffers) for kind in kinds}


def _joined(conds: Sequence[Any], kind: tuple[str, ...], buffers: Buffers | None) -> Any:
    first = conds[0]
    if len(conds) == 1:
        return first
    if buffers is None or not all(isinstance(one, Tensor) for one in conds):
        return guiding.joined(*conds)
    for name, one in zip(kind, conds):
        if one.shape != first.shape or one.dtype != first.dtype:
            raise UserError(
                f"cond is {first.dtype} {list(first.shape)} and {name} {one.dtype} {list(one.shape)}; they must match."
            )
    shape = (len(conds) * first.shape[0], *first.shape[1:])
    both = buffers.keep(("cond", shape, first.dtype), lambda: first.new_empty(shape))
    return guiding.joined(*conds, out=both)


def evaluate(
    call: Asked,
    stage: Stage,
    known: Mapping[str, Tensor],
    told: Tensor,
    cond: Any,
    named: Mapping[str, Tensor],
    tracked: bool,
    checkpoint: bool,
) -> dict[str, Tensor]:
    """The columns of the plan's own network."""
    x = known["x"]
    batch, asked = x.shape[0], len(stage.conditions)
    read = known.get("input", x)
    if asked > 1 and read.shape[0] == batch:
        read = torch.cat([read] * asked)
    if checkpoint and tracked and torch.is_grad_enabled():
        output = recompute(call, read, told, cond, tracked, named, use_reentrant=False)
    else:
        output = call(read, told, cond, tracked, named)
    answers = split(output, 1 + len(stage.answers), x)
    if asked == 1 and not stage.answers:
        return {"cond": answers[0]}
    return {
        column(condition, name): answer[place * batch : (place + 1) * batch]
        for place, condition in enumerate(stage.conditions)
        for name, answer in zip(("", *stage.answers), answers)
    }


def split(output: Any, count: int, x: Tensor) -> Sequence[Tensor]:
    """A network's answers: what it returned, or as many equal shares of its channels."""
    given = output
    if isinstance(output, Tensor):
        output = [output] if count == 1 else list(output.split(x.shape[1], dim=1))
    fits = isinstance(output, (list, tuple)) and len(output) == count
    if not fits or not all(isinstance(one, Tensor) and one.shape[1:] == x.shape[1:] for one in output):
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        several = "they must be alike" if count == 1 else f"give {count} of its channels, or {count} tensors like it"
        raise UserError(f"the network answered {shape} to an input of shape {list(x.shape)}; {several}.")
    return output


def read_by(
    call: Call,
    index: int,
    number: int,
    stage: Stage,
    known: Mapping[str, Tensor],
    tables: Tables,
    buffers: Buffers | None,
) -> Tensor:
    """What a further network reads: x at the scale it asks for."""
    x = known["x"]
    if call.input_scale == 1.0:
        return x
    if call.input_scale == stage.input_scale and "input" in known:
        return known["input"][: x.shape[0]]
    out = None if buffers is None else [buffers.keep(("input of", call.role), lambda: torch.empty_like(x))]
    return lincomb([x], tables.start((call.input_scale,)), out=out, dtypes=None if out else [x.dtype])[0]
