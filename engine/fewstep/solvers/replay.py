"""A plain plan run again: everything that a run could find out anew is put down once with the plan's buffers.

A stage is then one network call and one native call. Plain are the plans that ask one network for one answer under at
most two conditions and have nothing but a map between them; whatever else, or anything that watches (a compiler, a
mode, a profiler), is the executor's. The bits are the executor's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.solvers.calls import Asked, split
from fewstep.solvers.memory import Buffers, Tables, reads_apart, started, targets
from fewstep.solvers.plans import Plan, Stage
from fewstep_kernels import lincomb
from fewstep_kernels.backends import backend
from fewstep_kernels.lincomb_prepared import PreparedLincomb, Share
from fewstep_kernels.registration import quiet

_ANSWER, _STATE, _NOISE = range(3)  # what a map is given at each call: the network's answer, a run's x, carried noise


@dataclasses.dataclass(frozen=True)
class Turn:
    """One map and the network call before it, if any."""

    write: PreparedLincomb
    table: Tensor
    buffers: tuple[Tensor, ...]  # that it writes
    conditions: tuple[str, ...] = ()
    read: Tensor | None = None
    told: Tensor | None = None
    landing: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    noise: int = 0  # its place in carried noise, or its stream
    drawn: bool = False


class Replay:
    """One plan's turns for one set of buffers; for one thread at a time, as the buffers are."""

    def __init__(self, plan: Plan, first: Tensor, buffers: Buffers, tables: Tables, carried: bool) -> None:
        x, stages = buffers["x"], plan.stages
        names, scales = started(stages[0], plan.initial_scale, buffers)
        out = [buffers[name] for name in names]
        table = tables.start(scales)
        self.first = Turn(PreparedLincomb([Share(_STATE)], table, out, x), table, tuple(out))
        self.turns: list[Turn] = []
        for index, stage in enumerate(stages):
            asked = len(stage.conditions)
            read = told = None
            landing = {}
            if asked:
                read = buffers.input_of(asked) if reads_apart(stage) else x
                told = tables.times(index, asked, first, buffers)
                if stage.landing is not None:
                    landing["s"] = tables.landing(index, told.shape[0], first, buffers)
            drawn = bool(stage.noise) and not carried
            given: dict[str, Tensor | Share] = {"noise": Share(_NOISE)}
            given |= {name: Share(_ANSWER, part, asked) for part, name in enumerate(stage.conditions)}
            inputs = [given.get(name) or buffers[name] for name in (stage.inputs[:-1] if drawn else stage.inputs)]
            names = targets(plan, index, buffers)
            made: list[Tensor | Share] = [buffers[name] for name in names]
            if index + 1 == len(stages):
                made[names.index("x")] = Share(_STATE)
            table = tables.matrix(index, names)
            write = PreparedLincomb(inputs, table, made, x, stage.noise if drawn else None)
            kept = tuple(y for y in made if isinstance(y, Tensor))
            self.turns.append(Turn(write, table, kept, stage.conditions, read, told, landing, stage.noise, drawn))

    def run(
        self,
        calls: Sequence[Asked],
        conds: Mapping[tuple[str, ...], Any],
        first: Tensor,
        carried: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor:
        """x at the last stage's target, a new tensor."""
        self._write(self.first, (None, first, None), None)
        x = torch.empty(first.shape, dtype=first.dtype, device=first.device)
        for turn, call in zip(self.turns, calls):
            answer = None
            if turn.read is not None:
                assert turn.told is not None
                answer = call(turn.read, turn.told, conds[turn.conditions], False, turn.landing)
            noise = carried[:, turn.noise] if turn.noise and carried is not None else None
            self._write(turn, (answer, x, noise), seeds if turn.drawn else None)
        return x

    def _write(self, turn: Turn, given: tuple[Any, Tensor, Tensor | None], seeds: Tensor | None) -> None:
        if turn.write(given, seeds):
            if turn.buffers:
                torch.autograd.graph.increment_version(turn.buffers)
            return
        if turn.read is not None:  # an answer that is not plain, or not an answer
            given = (split(given[0], 1, turn.write.like)[0], *given[1:])
        inputs, out = turn.write.tensors(given)
        lincomb(inputs, turn.table, noise_seeds=seeds, noise_stream=turn.noise if turn.drawn else 0, out=out)


def _is_plain(plan: Plan) -> bool:
    previous: Stage | None = None
    for stage in plan.stages:
        if previous is not None and reads_apart(stage) and "input" not in previous.outputs:
            return False
        names = {"x", "base", "noise", *stage.conditions, *(n for s in plan.stages for n in s.outputs if n != "input")}
        if (
            len(stage.conditions) > 2
            or stage.answers
            or stage.others
            or stage.nonlinear
            or not {*stage.inputs} <= names
        ):
            return False
        previous = stage
    return bool(plan.stages)


def replay_of(plan: Plan, first: Tensor, buffers: Buffers, tables: Tables, carried: bool) -> Replay | None:
    """The plan's turns, made on first use; None where the executor must run it: see the module."""
    if not quiet():
        return None
    key = ("replay", carried, backend("lincomb", first.device))
    if key not in buffers:
        with torch.inference_mode(False):
            buffers[key] = Replay(plan, first, buffers, tables, carried) if _is_plain(plan) else None
    found: Replay | None = buffers[key]
    return found
