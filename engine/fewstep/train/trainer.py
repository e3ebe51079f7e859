"""The training loop. It knows no method: a method is a generator of updates, and this runs them.

In one update the micro-batches' generators advance in lockstep, each loss is sent backward through the engine of the
network it names, the engine clips and steps, averages follow, and the generators resume with the new weights.
"""

from __future__ import annotations

import copy
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewstep_kernels as fk
from fewstep import artefact, methods, nets, solvers
from fewstep.diffusion import prediction as predictions
from fewstep.diffusion import schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError, choose
from fewstep.methods import Batch, Rng, TrainingStage, Update
from fewstep.nets.lora import Adapted
from fewstep.train import checkpoint, pairs
from fewstep.train.checkpoint import Checkpoint
from fewstep.train.ema import Average, Averages
from fewstep.train.progress import Means, Progress
from fewstep.train.strategies import Engine, Strategy, launch, launched, start
from fewstep.train.strategies.base import copy_module
from fewstep.train.strategies.single import Single

SAMPLING = "sampling_average"  # the student's average that is sampled from and saved
PLAN_STEPS = (1, 2, 4)
FIXED_KEYS = ("seed", "network", "schedule", "prediction", "data.batch_size", "method.name", "adapters")


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM, after the checkpoint was written; leaves the process with code 130."""

    def __init__(self, sentence: str) -> None:
        super().__init__(130)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


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
        self.step = self.stage_index = self.stage_updates = 0
        self.pairs: pairs.PairSet | None = None
        self.means = Means()
        self._stop = False
        self._skipped: list[Tensor] = []
        self._replaced: set[str] = set()  # frozen networks that a stage has written to
        self._provenance: dict[str, Any] = {}
        self.classes: int | None = None
        found = self._found(resume)
        torch.manual_seed(recipe.seed)
        self._build(teacher)
        self.loader = loader if loader is not None else self._loader()
        self.classes = self.classes or getattr(self.loader, "classes", None)
        if found is not None:
            self._restore_modules(found)
        self._place()
        if found is not None:
            self._restore(found)

    @property
    def stages(self) -> list[TrainingStage]:
        return [
            dataclasses.replace(stage, updates=self.recipe.train.updates) if stage.updates is None else stage
            for stage in self.method.stages()
        ]

    def run(self) -> Path:
        """Train what is left to train, then save the artefact; its folder."""
        self.fit()
        return self.save()

    def fit(self) -> None:
        """Train what is left. Raises `Interrupted` after a signal, `UserError` for a loss that is not finite."""
        train, stages = self.recipe.train, self.stages
        total = sum(stage.updates or 0 for stage in stages)
        self.progress = Progress(
            self.recipe.name, self.output, total, self.step, leads=self.strategy.leads, device=self.strategy.device
        )
        for sentence in self._notices:
            self.progress.say(sentence)
        with _signals(self._on_signal):
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
        """Write the artefact of the method's result, its sampling average where the recipe keeps one."""
        name = SAMPLING if SAMPLING in self.modules else self.method.result
        module = self.modules[name]
        state = self._whole_state(module)
        if self.strategy.leads:
            if not isinstance(module, Denoiser):
                raise UserError(
                    f"network {self.method.result!r} of method {self.method.name!r} is no denoiser and has no artefact."
                )
            whole = Denoiser(nets.build(_config(module.net)), module.schedule, module.prediction)
            whole.load_state_dict(state)
            artefact.save(
                self.output,
                denoiser=whole.eval().requires_grad_(False),
                plans={
                    steps: self.method.sampling(steps) for steps in getattr(self.method.config, "steps", PLAN_STEPS)
                },
                image_shape=self._image_shape(),
                classes=self.classes,
                provenance={**self._provenance, "recipe": self.recipe.to_dict(), "updates": self.step},
                kind="student" if "teacher" in self.modules else "teacher",
            )
        self.strategy.barrier()
        return self.output

    def save_checkpoint(self) -> Path:
        """Write everything that resuming needs; every rank takes part, the leading one writes."""
        parts = {f"network.{name}": self.strategy.gather(self.modules[name]) for name in self._changing()}
        parts |= {f"optimizer.{name}": engine.state() for name, engine in self.engines.items()}
        tensors: dict[str, Tensor] = {}
        method_state = checkpoint.split(self.method.state(), tensors)
        parts["method"] = tensors
        if self.pairs is not None:
            parts["pairs"] = self.pairs.tensors()
        state = {
            "recipe": self.recipe.to_dict(),
            "step": self.step,
            "stage": self.stage_index,
            "stage_updates": self.stage_updates,
            "engines": {name: engine.updates for name, engine in self.engines.items()},
            "averages": self.averages.state(),
            "replaced": sorted(self._replaced),
            "data": self.loader.state(),
            "method": method_state,
        }
        folder = self.output / "checkpoints"
        if self.strategy.leads:
            parts = {name: tensors for name, tensors in parts.items() if tensors}
            checkpoint.write(folder, self.step, Checkpoint(parts, state), self.recipe.train.keep_checkpoints)
        self.strategy.barrier()
        return folder / f"step_{self.step:06d}"

    def _build(self, teacher: Denoiser | None) -> None:
        """Make every module, on the device and whole; nothing is sharded yet."""
        recipe, method = self.recipe, self.method
        if recipe.teacher is not None and teacher is None:
            loaded = artefact.load(recipe.teacher)
            teacher, self.classes = loaded.denoiser, loaded.classes
            self._teacher_shape = tuple(loaded.image_shape)
            self._provenance["teacher"] = {"path": recipe.teacher, "sha256": loaded.digest}
        if teacher is None and method.needs.teacher:
            raise UserError(f"method {method.name!r} needs a teacher; set teacher to an artefact folder.")
        if method.needs.tangent and not self.strategy.exact_tangents:
            raise UserError(
                f"method {method.name!r} takes tangents (forward mode), which ZeRO-3 cannot; "
                "set train.zero_stage to 1 or 2."
            )
        if teacher is not None:
            method.schedule, method.prediction = teacher.schedule, teacher.prediction
        else:
            method.schedule = schedules.from_dict(_scheduled(recipe.schedule))
            method.prediction = predictions.from_dict(recipe.prediction)
        network = (lambda: nets.build(recipe.network)) if recipe.network is not None else None
        self.modules: dict[str, nn.Module] = methods.build(method, teacher, network, recipe.adapters)
        self._averages = [
            Average(name, str(spec.start), spec.average.decay)
            for name, spec in method.networks.items()
            if spec.average is not None
        ]
        if recipe.train.ema is not None:
            self.modules[SAMPLING] = copy.deepcopy(self.modules[method.result]).requires_grad_(False).eval()
            self._averages.append(Average(SAMPLING, method.result, recipe.train.ema.decay, recipe.train.ema.warmup))
        if teacher is not None:
            self.modules["teacher"] = teacher.requires_grad_(False)
        for module in self.modules.values():
            module.to(self.strategy.device)

    def _place(self) -> None:
        """Give trained modules to engines, the others to their homes, and all of them to the method."""
        train, specs = self.recipe.train, self.method.networks
        owned: dict[str, dict[str, nn.Module]] = {}
        for name, spec in specs.items():
            if spec.average is None and any(p.requires_grad for p in self.modules[name].parameters()):
                owned.setdefault(spec.engine or name, {})[name] = self.modules[name]
        micro_batch = self.recipe.data.batch_size // (self.strategy.world * train.accumulate)
        self.engines: dict[str, Engine] = {
            engine: self.strategy.engine(
                engine,
                networks,
                {name: specs[name].optimizer or train.optimizer for name in networks},
                clip=train.clip,
                warmup=train.warmup,
                micro_batch=micro_batch,
                accumulate=train.accumulate,
            )
            for engine, networks in owned.items()
        }
        self._engine_of = {name: self.engines[engine] for engine, networks in owned.items() for name in networks}
        for name, module in self.modules.items():
            engine = self._engine_of.get(name)
            home = module if engine is not None else self.strategy.frozen(module)
            if name != SAMPLING:
                setattr(self.method, name, self.strategy.network(home, engine.forward(name) if engine else None))
        self.averages = Averages(self.strategy, self.modules, self._averages, self._engine_of)

    def _begin(self, index: int, stage: TrainingStage) -> None:
        """Enter a stage: copies, restarts and pairs, unless a checkpoint brought us into the middle of it."""
        self.method.stage = stage
        self.stage_index = index
        if self.stage_updates:
            return
        for destination, source in stage.copies.items():
            for name in (destination, source):
                if name not in self.modules:
                    raise choose(f"network of stage {stage.name!r}", name, self.modules)
            copy_module(self.strategy, self.modules[source], self.modules[destination])
            refresh = getattr(self.strategy, "refresh", None)
            if refresh is not None:
                refresh(self.modules[destination])
            if destination not in self._engine_of:
                self._replaced.add(destination)
        for engine in stage.restart:
            if engine not in self.engines:
                raise choose(f"engine that stage {stage.name!r} restarts", engine, self.engines)
            self.engines[engine].restart()
        if stage.make is not None:
            network = getattr(self.method, stage.make.network)
            size = self.recipe.data.batch_size
            shape, device = self._image_shape(), self.strategy.device
            self.pairs = pairs.make(stage.make, network, shape, self.classes, self.recipe.seed, size, device)

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
            engine = self._engine_of.get(update.network)
            if engine is None:
                raise choose(f"network in an update of method {self.method.name!r}", update.network, self._engine_of)
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
        engine = self._engine_of[named]
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
        last = checkpoint.listed(self.output / "checkpoints")
        kept = f"the last checkpoint is {last[-1][1]}" if last else "there is no checkpoint yet"
        return (
            f"the gradient of engine {engine!r} is not finite at update {self.step} ({kept}); "
            "lower train.optimizer.lr, raise train.warmup, or set train.non_finite=skip."
        )

    def _log(self) -> None:
        names, means = self.means.tensor(self.strategy.device)
        values = dict(zip(names, self.strategy.mean(means).tolist()))
        if self._skipped:
            skipped = float(torch.stack(self._skipped).sum())
            if skipped and (self.recipe.train.non_finite == "raise" or skipped >= 10 * self.recipe.train.log_every):
                raise UserError(self._not_finite(next(iter(self.engines))))
            if self.strategy.device.type != "cpu":
                self._skipped.clear()
            values["skipped"] = skipped
        values["learning_rate"] = next(iter(self.engines.values())).learning_rates()[0]
        self.progress.log(self.step, values)

    def _batch(self) -> Batch:
        batch = next(self.loader)
        if self.method.needs.data == "pairs" and self.pairs is not None:
            return self.pairs.batch(batch.index.to(self.strategy.device))
        return batch if batch.index.device == self.strategy.device else batch.to(self.strategy.device)

    def _sample_grid(self) -> None:
        from fewstep.runtime.images import save_grid

        module = self.modules.get(SAMPLING, self.modules[self.method.result])
        seeds = torch.arange(64, device=self.strategy.device) + self.recipe.seed * 0x1000003
        noise = fk.normal(seeds, self._image_shape())
        cond = torch.arange(64, device=self.strategy.device) % self.classes if self.classes else None
        training = module.training
        module.eval()
        with torch.no_grad():
            images = solvers.sample(module, self.method.sampling(PLAN_STEPS[-1]), noise, cond=cond, seeds=seeds)
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

    def _image_shape(self) -> tuple[int, ...]:
        shape = getattr(self.loader, "image_shape", None) or getattr(self, "_teacher_shape", None)
        if shape is None:
            raise UserError(
                "the shape of an image is not known: the loader tells none and there is no teacher artefact."
            )
        return tuple(shape)

    def _whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state on the leading rank, an adapter merged into the teacher it corrects."""
        state = self.strategy.gather(module)
        net = getattr(module, "net", None)
        if not isinstance(net, Adapted):
            return state
        base = self.strategy.gather(self.modules["teacher"])
        if not self.strategy.leads:
            return state
        bare = [{name.removeprefix("net."): value for name, value in part.items()} for part in (base, state)]
        return {f"net.{name}": value for name, value in net.merged(*bare).items()}

    def _changing(self) -> list[str]:
        """The networks whose weights a checkpoint must hold."""
        return [name for name in self.modules if name != "teacher" or name in self._replaced]

    def _found(self, resume: bool) -> Checkpoint | None:
        """The checkpoint to go on from; older ones make way when a run starts anew."""
        folder = self.output / "checkpoints"
        self._notices: list[str] = []
        if not resume:
            if self.strategy.leads and checkpoint.listed(folder):
                aside = checkpoint.set_aside(folder)
                self._notices.append(
                    f"started anew; the earlier run's checkpoints are in {aside} (--resume would go on)."
                )
            self.strategy.barrier()
            return None
        step, problems = checkpoint.newest_good(folder)
        self._notices += [f"{problem}; using the checkpoint before it." for problem in problems]
        if step is None:
            self._notices.append(f"no checkpoint in {folder}; starting at the beginning.")
            return None
        found = checkpoint.read(folder, step)
        ours, theirs = self.recipe.to_dict(), found.state["recipe"]
        for key in FIXED_KEYS:
            now, then = _at(ours, key), _at(theirs, key)
            if now != then:
                raise UserError(
                    f"{key} is {now!r} but the checkpoint of update {step} was made with {then!r}; make them equal."
                )
        return found

    def _restore_modules(self, found: Checkpoint) -> None:
        self._replaced = set(found.state["replaced"])
        for name in self._changing():
            part = f"network.{name}"
            if part not in found.parts:
                raise UserError(
                    f"the checkpoint of update {found.state['step']} lacks network {name!r}; the method has changed."
                )
            try:
                self.modules[name].load_state_dict(found.parts[part])
            except RuntimeError:
                raise UserError(
                    f"the checkpoint's network {name!r} has other parameters than the recipe's; "
                    "use the recipe it came from."
                ) from None

    def _restore(self, found: Checkpoint) -> None:
        state = found.state
        self.step, self.stage_index, self.stage_updates = state["step"], state["stage"], state["stage_updates"]
        for name, engine in self.engines.items():
            engine.load_state(found.parts.get(f"optimizer.{name}", {}))
            engine.updates = state["engines"][name]
        self.averages.load_state(state["averages"])
        self.loader.load_state(state["data"])
        self.method.load_state(checkpoint.join(state["method"], found.parts.get("method", {})))
        if "pairs" in found.parts:
            held = {key: value.to(self.strategy.device) for key, value in found.parts["pairs"].items()}
            self.pairs = pairs.PairSet(held["noise"], held["images"], held.get("cond"))
        self._notices.append(f"going on after update {self.step}.")

    def _on_signal(self) -> None:
        self._stop = True


class _signals:
    """Ctrl-C and SIGTERM call `stop` once; a second one acts as usual."""

    def __init__(self, stop: Any) -> None:
        self.stop = stop
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._received)

    def _received(self, number: int, _frame: Any) -> None:
        self.stop()
        signal.signal(number, self.before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _seed(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the generators in use, without its search of all devices (0.3 ms)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _scheduled(section: dict[str, Any]) -> dict[str, Any]:
    options = dict(section)
    return schedules.get(options.pop("name"), **options).to_dict()


def _config(net: Any) -> dict[str, Any]:
    """What rebuilds the network."""
    if not hasattr(net, "config"):
        raise UserError(f"{type(net).__name__} has no .config that rebuilds it, so it cannot be saved as an artefact.")
    return dict(net.config)


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content
