"""Entering a stage of a method: copies, restarts and pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.errors import choose
from fewstep.methods import TrainingStage
from fewstep.train import pairs
from fewstep.train.strategies.base import copy_module

if TYPE_CHECKING:
    from fewstep.train.trainer import Trainer


def enter(run: Trainer, stage: TrainingStage) -> None:
    """Make the stage's copies, restart its engines' optimisers and generate its pairs; all ranks alike."""
    for destination, source in stage.copies.items():
        for name in (destination, source):
            if name not in run.modules:
                raise choose(f"network of stage {stage.name!r}", name, run.modules)
        copy_module(run.strategy, run.modules[source], run.modules[destination])
        refresh = getattr(run.strategy, "refresh", None)
        if refresh is not None:
            refresh(run.modules[destination])
        if destination not in run.engine_of:
            run.replaced.add(destination)
    for engine in stage.restart:
        if engine not in run.engines:
            raise choose(f"engine that stage {stage.name!r} restarts", engine, run.engines)
        run.engines[engine].restart()
    if stage.make is not None:
        network = getattr(run.method, stage.make.network)
        size, device = run.recipe.data.batch_size, run.strategy.device
        run.pairs = pairs.make(stage.make, network, run.image_shape(), run.classes, run.recipe.seed, size, device)
