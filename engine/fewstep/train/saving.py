"""The artefact a run ends with, and what must be there for it before the run begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fewstep import artefact, methods, nets
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.nets.lora import Adapted
from fewstep.train.networks import SAMPLING
from fewstep.train.strategies import Strategy

if TYPE_CHECKING:
    from fewstep.train.trainer import Trainer


def check(run: Trainer) -> None:
    """Raises `UserError` now for what would keep `save` from writing an artefact after the training."""
    methods.plans(run.method)
    run.image_shape()
    module = run.modules[run.method.result]
    if not isinstance(module, Denoiser):
        raise UserError(
            f"network {run.method.result!r} of method {run.method.name!r} is no denoiser and has no artefact."
        )
    artefact.network_config(module.net)


def save(run: Trainer) -> Path:
    """Write the artefact of the method's result, its sampling average where the recipe keeps one; its folder.

    Every rank takes part, the leading one writes.
    """
    module: Any = run.modules[SAMPLING if SAMPLING in run.modules else run.method.result]
    state = _whole_state(run.strategy, run.modules, module)
    if run.strategy.leads:
        check(run)
        whole = Denoiser(nets.build(artefact.network_config(module.net)), module.schedule, module.prediction)
        whole.load_state_dict(state)
        artefact.save(
            run.output,
            denoiser=whole.eval().requires_grad_(False),
            plans=methods.plans(run.method),
            image_shape=run.image_shape(),
            classes=run.classes,
            provenance={**run.provenance, "recipe": run.recipe.to_dict(), "updates": run.step},
            kind="student" if "teacher" in run.modules else "teacher",
        )
    run.strategy.barrier()
    return run.output


def _whole_state(strategy: Strategy, modules: Mapping[str, nn.Module], module: nn.Module) -> dict[str, Tensor]:
    """The module's state on the leading rank, an adapter merged into the teacher it corrects."""
    state = strategy.gather(module)
    net = getattr(module, "net", None)
    if not isinstance(net, Adapted):
        return state
    base = strategy.gather(modules["teacher"])
    if not strategy.leads:
        return state
    bare = [{name.removeprefix("net."): value for name, value in part.items()} for part in (base, state)]
    return {f"net.{name}": value for name, value in net.merged(*bare).items()}
