"""The training loop. It knows no method: a method is a generator of updates, and this runs them.

In one update the micro-batches' generators advance in lockstep, each loss is sent backward through the engine of the
network it names, the engine clips and steps, averages follow, and the generators resume with the new weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep_kernels as fk
from fewstep import artefact, methods, solvers
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError, choose
from fewstep.methods import Batch, Rng, TrainingStage, Update
from fewstep.train import checkpoint, networks, resuming, saving, staging
from fewstep.train.ema import Averages
from fewstep.train.interruption import Interrupted, Signals
from fewstep.train.networks import SAMPLING
from fewstep.train.pairs import PairSet
from fewstep.train.progress import Means, Progress
from fewstep.train.strategies import Engine, Strategy, launch, launched, start
from fewstep.train.strategies.single import Single


def train(recipe: Any, *, resume: bool = False) -> Path:
    """Run a recipe to its end and return the artefact's folder, in as many local processes as it asks for.

    Raises `UserError` for what the user can mend, `SystemExit` 130 after an interruption that left a checkpoint.
    """
    if recipe.train.ranks > 1 and not launched():
        launch(recipe, resume)
        return Path(recipe.output)
    strategy = start(recipe)
    try:
        return Trainer(recipe, strategy=strategy, resume=resume).run()
    finally:
        strategy.close()


class Trainer:
    """One run of one recipe.

    `teacher`, `loader` and `method` replace what the recipe names (for studies and tests); `run` trains and saves the
    artefact, `fit` trains only. After either, `modules` holds every network by name.
    """

    def __init__(
        self,
        recipe: Any,
        *,
        strategy: Strategy | None = None,
        resume: bool = False,
        teacher: Denoiser | None = None,
        loader: Any = None,
        method: methods.Method | None = None,
    ) -> None:
        self.recipe = recipe
        self.strategy = strategy or Single(torch.device("cpu"))
        self.output = Path(recipe.output)
        self.method = method or methods.get(recipe.method["name"])(recipe.method_config())
        methods.check(self.method)
        self.step = self.stage_index = self.stage_updates = 0
        self.pairs: PairSet | None = None
        self.means = Means()
        self.skipped_before = 0.0  # updates left out before the last line of the log, or before resuming
        self._skipped: list[Tensor] = []
        self._stop = False
        self.replaced: set[str] = set()  # frozen networks that a stage has written to
        self.provenance: dict[str, Any] = {}
        self.classes: int | None = None
        self._teacher_shape: tuple[int, ...] | None = None
        found, self.notices = resuming.find(recipe, self.strategy, resume)
        torch.manual_seed(recipe.seed)
        if recipe.teacher is not None and teacher is None:
            loaded = artefact.load(recipe.teacher)
            teacher, self.classes, self._teacher_shape = loaded.denoiser, loaded.classes, loaded.image_shape
            self.provenance["teacher"] = {"path": recipe.teacher, "sha256": loaded.digest}
            if loaded.kind == "student":
                self.notices.append(f"{recipe.teacher} is itself a student; its own teacher is usually the better one.")
        self.modules, averages = networks.make(recipe, self.method, self.strategy, teacher)
        if self._teacher_shape is not None and teacher is not None:
            networks.attempt_loaded("teacher", recipe.teacher, teacher, self._teacher_shape, self.classes)
        self.loader = loader if loader is not None else self._loader()
        result = self.modules[self.method.result]
        self._conditional = networks.fit(result, self.loader, self._teacher_shape)
        if self._conditional:
            self.classes = self.classes or getattr(self.loader, "classes", None)
        known = {"image shape": self._teacher_shape, "number of classes": self.classes}
        others = networks.guide(recipe, self.method, self.strategy, self._conditional, known)
        if others:
            self.provenance["others"] = others
        if recipe.network is not None and isinstance(result, Denoiser):
            networks.attempt(result, self.image_shape())
        self._sizes = networks.sizes(self.modules)
        if found is not None:
            resuming.restore_modules(self, found)
        self.engines: dict[str, Engine]
        self.engines, self.engine_of = networks.place(recipe, self.method, self.strategy, self.modules)
        self.averages = Averages(self.strategy, self.modules, averages, self.engine_of)
        if found is not None:
            resuming.restore(self, found)

    @property
    def stages(self) -> list[TrainingStage]:
        return [
            dataclasses.replace(stage, updates=self.recipe.train.updates) if stage.updates is None else stage
            for stage in self.method.stages()
        ]

    def run(self) -> Path:
        """Train what is left to train, then save the artefact; its folder."""
        saving.check(self)
        self.fit()
        return saving.save(self)

    def fit(self) -> None:
        """Train what is left. Raises `Interrupted` after a signal, `UserError` for a loss that is not finite."""
        train, stages = self.recipe.train, self.stages
        total = sum(stage.updates or 0 for stage in stages)
        self.progress = Progress(
            self.recipe.name, self.output, total, self.step, leads=self.strategy.leads, device=self.strategy.device
        )
        for sentence in [*self.notices, self._announcement(total)]:
            self.progress.say(sentence)
        with Signals(self._on_signal):
            try:
                for index in range(self.stage_index, len(stages)):
                    self._begin(index, stages[index])
                    while self.stage_updates < (stages[index].updates or 0):
                        self.iterate()
                        self.progress.advance()
                        if self.step % train.log_every == 0 or self.step == total:
                            self._log()
                        if train.sample_every and self.step % train.sample_every == 0:
                            self._sample_grid()
                        stopping = self.strategy.any(self._stop)
                        if (
                            stopping
                            or self.step == total
                            or (train.checkpoint_every and self.step % train.checkpoint_every == 0)
                        ):
                            written = self.save_checkpoint()
                        if stopping and self.step < total:
                            sentence = (
                                f"interrupted after update {self.step} of {total}; everything is in {written}: "
                                "give the same command with --resume to go on."
                            )
                            self.progress.say(sentence)
                            raise Interrupted(sentence)
                    self.stage_index, self.stage_updates = index + 1, 0
            finally:
                self.progress.close()

    def iterate(self) -> None:
        """One iteration of the method on one global batch."""
        seed = (self.recipe.seed * 0x9E3779B1 + self.step * 0x85EBCA77 + self.strategy.rank) % 2**63
        _seed(seed, self.strategy.device)  # dropout: nothing carries over, so resuming is exact
        batch = self._batch()
        count = self.recipe.train.accumulate
        size = len(batch) // count
        parts = [batch] if count == 1 else [batch.part(i * size, (i + 1) * size) for i in range(count)]
        runs = [self.method.iteration(part, Rng(self.recipe.seed, self.step, part.index)) for part in parts]
        while self._update(runs):
            pass
        self.step += 1
        self.stage_updates += 1

    def save(self) -> Path:
        """Write the artefact of the method's result, its sampling average where the recipe keeps one; its folder."""
        return saving.save(self)

    def save_checkpoint(self) -> Path:
        """Write everything that resuming needs; every rank takes part, the leading one writes."""
        return resuming.save(self)

    def image_shape(self) -> tuple[int, ...]:
        """[C, H, W] of what is trained on. Raises `UserError` where nothing tells it."""
        shape = getattr(self.loader, "image_shape", None) or self._teacher_shape
        if shape is None:
            raise UserError(
                "the shape of an image is not known: the loader tells none and there is no teacher artefact."
            )
        return tuple(shape)

    def skipped(self) -> float:
        """How many updates were left out so far, their gradient not being finite."""
        self.skipped_before += float(torch.stack(self._skipped).sum()) if self._skipped else 0.0
        self._skipped.clear()
        return self.skipped_before

    def _announcement(self, total: int) -> str:
        if self.step >= total:
            return f"{self.recipe.name}: all {total} updates are done; nothing is left to train"
        names = " and ".join(f"{name} ({count:,} parameters)" for name, count in self._sizes.items())
        places = (
            f"{self.strategy.world} x {self.strategy.device.type}" if self.strategy.world > 1 else self.strategy.device
        )
        return (
            f"{self.recipe.name}: {self.method.name} trains {names} on {places}, updates {self.step + 1} to {total} of "
            f"{self.recipe.data.batch_size} images, into {self.output}"
        )

    def _begin(self, index: int, stage: TrainingStage) -> None:
        """Enter a stage, unless a checkpoint brought us into the middle of it."""
        self.method.stage = stage
        self.stage_index = index
        if not self.stage_updates:
            staging.enter(self, stage)

    def _update(self, runs: list[Iterator[Update]]) -> bool:
        """Advance all micro-batches to their next update and take one optimiser step; False at the iteration's end."""
        named: str | None = None
        for position, run in enumerate(runs):
            update = next(run, None)
            name = update.network if update is not None else None
            if position and name != named:
                raise UserError(
                    f"the micro-batches of update {self.step} yield {named!r} and {name!r}; "
                    "methods must draw branch decisions with rng.same_for_all."
                )
            named = name
            if update is None:
                continue
            engine = self.engine_of.get(update.network)
            if engine is None:
                raise choose(f"network in an update of method {self.method.name!r}", update.network, self.engine_of)
            if position == 0:
                self._refuse_leaks(engine, waiting=True)
            self.means.add(f"loss/{update.network}", update.loss)
            for key, value in update.log.items():
                self.means.add(f"{update.network}/{key}", value)
            loss = update.loss / len(runs) if len(runs) > 1 else update.loss
            engine.backward(loss, last=position == len(runs) - 1)
            del update, loss
        if named is None:
            return False
        engine = self.engine_of[named]
        self._refuse_leaks(engine, waiting=False)
        norm = engine.step(self.averages.decays(engine.networks))
        self.means.add(f"gradient_norm/{engine.name}", norm)
        self._refuse_non_finite(engine, norm)
        for name in engine.networks:
            self.averages.after(name)
        return True

    def _refuse_leaks(self, turn: Engine, waiting: bool) -> None:
        """No gradient may wait in another engine than the one whose turn it is, nor in that one before its turn."""
        for engine in self.engines.values():
            if (engine is turn) == waiting and engine.has_gradients():
                raise UserError(
                    f"a loss leaked gradients into engine {engine.name!r} around the update of {turn.name!r}; "
                    "call that network with .fixed or .value, or detach its answer."
                )

    def _refuse_non_finite(self, engine: Engine, norm: Tensor) -> None:
        """At once on the CPU, where looking costs nothing; with the log elsewhere. The step itself was left out."""
        if norm.device.type == "cpu":
            if bool(torch.isfinite(norm)):
                return
            if self.recipe.train.non_finite == "raise":
                raise UserError(self._not_finite(engine.name))
        self._skipped.append((~torch.isfinite(norm)).float())

    def _not_finite(self, engine: str) -> str:
        last = checkpoint.listed(self.output / resuming.FOLDER)
        kept = f"the last checkpoint is {last[-1][1]}" if last else "there is no checkpoint yet"
        return (
            f"the gradient of engine {engine!r} is not finite at update {self.step} ({kept}); "
            "lower train.optimizer.lr, raise train.warmup, or set train.non_finite=skip."
        )

    def _log(self) -> None:
        names, means = self.means.tensor(self.strategy.device)
        values = dict(zip(names, self.strategy.mean(means).tolist()))
        skipped = self.skipped()
        if skipped:
            if self.recipe.train.non_finite == "raise" or skipped >= 10 * self.recipe.train.log_every:
                raise UserError(self._not_finite(next(iter(self.engines))))
            values["skipped"] = skipped
        values["learning_rate"] = next(iter(self.engines.values())).learning_rates()[0]
        self.progress.log(self.step, values)

    def _batch(self) -> Batch:
        batch = next(self.loader)
        if not self._conditional:
            batch = dataclasses.replace(batch, cond=None, null=None)
        if self.method.needs.data == "pairs" and self.pairs is not None:
            return self.pairs.batch(batch.index.to(self.strategy.device))
        return batch if batch.index.device == self.strategy.device else batch.to(self.strategy.device)

    def _sample_grid(self) -> None:
        from fewstep.runtime.images import save_grid

        module = self.modules.get(SAMPLING, self.modules[self.method.result])
        seeds = torch.arange(64, device=self.strategy.device) + self.recipe.seed * 0x1000003
        noise = fk.normal(seeds, self.image_shape())
        cond = torch.arange(64, device=self.strategy.device) % self.classes if self.classes else None
        plan = self.method.sampling(max(self.method.steps_offered))
        training = module.training
        module.eval()
        with torch.no_grad():
            images = solvers.sample(module, plan, noise, cond=cond, seeds=seeds)
        module.train(training)
        if self.strategy.leads:
            path = self.output / "samples" / f"step_{self.step:06d}.png"
            save_grid(images, path)
            self.progress.image(self.step, path)

    def _loader(self) -> Any:
        from fewstep import data

        return data.loader(
            self.recipe.data,
            batch_size=self.recipe.data.batch_size,
            rank=self.strategy.rank,
            world=self.strategy.world,
            seed=self.recipe.seed,
            device=str(self.strategy.device),
        )

    def _on_signal(self) -> None:
        self._stop = True


def _seed(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the generators in use, without its search of all devices (0.3 ms)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
