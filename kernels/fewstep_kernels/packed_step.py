"""`adamw_ema_step` of one group of an optimiser, its table kept from one step to the next.

Looking at every tensor and writing its row costs some 15 microseconds a parameter on the host, more than the step
itself on networks below a million parameters. What is kept is checked at every step by identity and address; only the
gradients' addresses, which move whenever they are set to None between steps, are written anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from operator import is_

import torch
from torch import Tensor

from . import backends, ema
from .adamw_ema import EMPTY, GRADIENT, ROW, check_scalars, run_table, table_of
from .ema import Scalar

NOTHING: dict[str, Tensor] = {}
_values, _address, _contiguous = dict.values, Tensor.data_ptr, Tensor.is_contiguous


class PackedStep:
    """A group's tensors as they were when it was packed; `pack` gives None where they are not all plain."""

    def __init__(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor | None],
        states: Sequence[dict[str, Tensor] | None],
        averages: Sequence[Sequence[Tensor]],
        weight_decays: Sequence[float],
        copies: Sequence[Tensor | None],
        origins: Sequence[int],
    ) -> None:
        self._parameters, self._profiles = parameters, len(averages)
        self._owners = [state if state is not None else NOTHING for state in states]
        self._values = [x for state in self._owners for x in state.values()]
        self._identities = [*map(id, self._values)]
        moments = [
            (None, None, None) if g is None else (s["exp_avg"], s["exp_avg_sq"], s["step"])
            for s, g in zip(self._owners, gradients)
        ]
        flat = [average for profile in averages for average in profile]
        targets = [copy for copy in copies if copy is not None]
        self._written = [p for p, g in zip(parameters, gradients) if g is not None]
        self._written += [x for own in moments for x in own if x is not None]
        self._written += [*flat, *targets]
        self._fixed = [*{id(x): x for x in (*parameters, *self._values, *flat, *targets)}.values()]
        self._addresses = [x.data_ptr() for x in self._fixed]
        self._moving = [g is not None for g in gradients]
        self._kinds = [(g.dtype, g.layout) for g in gradients if g is not None]
        self._laid = [p.is_contiguous() for p, g in zip(parameters, gradients) if g is not None]
        self._strides = [(p, p.stride()) for p in parameters if not p.is_contiguous()]
        self._contiguous = [p.is_contiguous() for p in parameters]
        owns = zip(*averages) if averages else [()] * len(parameters)
        self._table = table_of(
            (p, g, *own, decay, copy, origin, average)
            for p, g, own, decay, copy, origin, average in zip(
                parameters, gradients, moments, weight_decays, copies, origins, owns
            )
        )

    @classmethod
    def pack(
        cls,
        parameters: list[Tensor],
        states: Sequence[dict[str, Tensor] | None],
        averages: Sequence[Sequence[Tensor]],
        weight_decays: Sequence[float],
        copies: Sequence[Tensor | None],
        origins: Sequence[int],
    ) -> PackedStep | None:
        """Of parameters with their gradients. The caller has had `adamw_ema_step` check that everything fits."""
        device = parameters[0].device
        if backends.choose("adamw_ema_step", device.type)[0] == "reference":
            return None
        gradients = [p.grad for p in parameters]
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients)):
            state = states[i] or NOTHING
            moments = () if gradient is None else (gradient, state["exp_avg"], state["exp_avg_sq"])
            own = [x for x in (*moments, copies[i], *(profile[i] for profile in averages)) if x is not None]
            if not all(ema.fits(x, parameter) for x in own):
                return None
        return cls(parameters, gradients, states, averages, weight_decays, copies, origins)

    def current(self, parameters: Sequence[Tensor], states: Sequence[dict[str, Tensor] | None]) -> bool:
        """Whether the tensors are those that were packed, where they were; if so, writes the gradients' addresses."""
        own = self._parameters
        if len(parameters) != len(own) or not all(map(is_, parameters, own)):
            return False
        if any(a is not b and (a or b) for a, b in zip(states, self._owners)):
            return False
        values = chain.from_iterable(map(_values, self._owners))
        if [*map(id, values)] != self._identities or [*map(_address, self._fixed)] != self._addresses:
            return False
        gradients = [p.grad for p in own]
        if [g is not None for g in gradients] != self._moving or [*map(_contiguous, own)] != self._contiguous:
            return False
        given = [g for g in gradients if g is not None]
        if [(g.dtype, g.layout) for g in given] != self._kinds or [*map(_contiguous, given)] != self._laid:
            return False
        for parameter, stride in self._strides:
            if parameter.stride() != stride or (parameter.grad is not None and parameter.grad.stride() != stride):
                return False
        addresses = [0 if g is None else g.data_ptr() or EMPTY for g in gradients]
        self._table[GRADIENT :: ROW + 2 * self._profiles] = array("q", addresses)
        return True

    def step(
        self,
        lr: Scalar,
        betas: tuple[float, float],
        epsilon: float,
        gradient_scale: Scalar,
        guard: Tensor | None,
        seed: int | None,
        update: Scalar,
        decays: Sequence[Scalar],
    ) -> None:
        """`adamw_ema_step`, after `current` said yes."""
        anchor = self._parameters[0]
        check_scalars(anchor.device, lr, betas, gradient_scale, guard, decays)
        scalars = (lr, *betas, epsilon, gradient_scale, 0.0 if guard is None else guard, update, *decays)
        run_table(self._table, len(self._parameters), self._profiles, anchor, scalars, seed)
        torch.autograd.graph.increment_version(self._written)
