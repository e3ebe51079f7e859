"""What a method must declare, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fewstep.errors import UserError, choose
from fewstep.methods.base import Method, MethodConfig, NetworkSpec
from fewstep.solvers import Plan


def check(method: Method) -> None:
    """Raises `UserError`, one sentence, where the declarations of `Method` are missing or do not fit each other."""
    kind = type(method)
    who = f"method {method.name or kind.__name__!r}"
    if not isinstance(method.config, MethodConfig):
        raise UserError(f"{who} has a Config that is no fewstep.methods.MethodConfig; derive it from that.")
    if kind.loss is Method.loss and kind.iteration is Method.iteration:
        raise UserError(f"{who} defines neither loss(batch, rng) nor iteration(batch, rng); define one of them.")
    networks = method.networks
    if not isinstance(networks, Mapping) or not all(isinstance(spec, NetworkSpec) for spec in networks.values()):
        raise UserError(f"{who} has networks {networks!r}; it must be a mapping from names to NetworkSpec.")
    if method.result not in networks:
        raise choose(f"result of {who},", method.result, networks)
    steps = method.steps_offered
    whole = isinstance(steps, Sequence) and all(type(number) is int and number >= 1 for number in steps)
    if not whole or not steps:
        raise UserError(
            f"{who} has steps_offered {steps!r}; it must be a list of numbers of evaluations from 1, such as (1, 2, 4)."
        )


def plans(method: Method) -> dict[int, Plan]:
    """The plan of `sampling` for each of `steps_offered`, which the artefact records.

    The method's networks and schedule must be set. Raises `UserError` where `sampling` is not defined or gives
    something else.
    """
    if type(method).sampling is Method.sampling:
        raise UserError(
            f"method {method.name!r} defines no sampling(steps), the plan its artefact is sampled with; define it."
        )
    made = {}
    for steps in sorted(set(method.steps_offered)):
        made[steps] = method.sampling(steps)
        if not isinstance(made[steps], Plan):
            raise UserError(
                f"method {method.name!r} answers sampling({steps}) with {type(made[steps]).__name__}; it must be a "
                "Plan such as fewstep.solvers.plan makes."
            )
    return made
