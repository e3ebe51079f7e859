"""What a run's checkpoint holds, and how a run goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.train import checkpoint
from fewstep.train.checkpoint import Checkpoint
from fewstep.train.pairs import PairSet
from fewstep.train.strategies import Strategy

if TYPE_CHECKING:
    from fewstep.config import Recipe
    from fewstep.train.trainer import Trainer

FOLDER = "checkpoints"
FIXED_KEYS = ("seed", "network", "schedule", "prediction", "data.batch_size", "method.name", "adapters")


def find(recipe: Recipe, strategy: Strategy, resume: bool) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, and what to tell about it; older ones make way when a run starts anew.

    Raises `UserError` for a checkpoint of another recipe, and where all there are are damaged.
    """
    folder = Path(recipe.output) / FOLDER
    if not resume:
        notices = []
        if strategy.leads and checkpoint.listed(folder):
            aside = checkpoint.set_aside(folder)
            notices.append(
                f"starting anew: the earlier run's checkpoints are now in {aside}; to go on with that run instead, "
                f"stop, move them back to {folder} and add --resume."
            )
        strategy.barrier()
        return None, notices
    step, problems = checkpoint.newest_good(folder)
    notices = [f"{problem}; using the checkpoint before it." for problem in problems]
    if step is None:
        return None, [*notices, f"no checkpoint in {folder}; starting at the beginning."]
    found = checkpoint.read(folder, step)
    ours, theirs = recipe.to_dict(), found.state["recipe"]
    for key in FIXED_KEYS:
        now, then = _at(ours, key), _at(theirs, key)
        if now != then:
            raise UserError(
                f"{key} is {now!r} but the checkpoint of update {step} was made with {then!r}; make them equal."
            )
    return found, notices


def save(run: Trainer) -> Path:
    """Write everything that resuming needs; every rank takes part, the leading one writes."""
    parts = {f"network.{name}": run.strategy.gather(run.modules[name]) for name in _changing(run)}
    parts |= {f"optimizer.{name}": engine.state() for name, engine in run.engines.items()}
    tensors: dict[str, Tensor] = {}
    method_state = checkpoint.split(run.method.state(), tensors)
    parts["method"] = tensors
    if run.pairs is not None:
        parts["pairs"] = run.pairs.tensors()
    state = {
        "recipe": run.recipe.to_dict(),
        "step": run.step,
        "stage": run.stage_index,
        "stage_updates": run.stage_updates,
        "engines": {name: engine.updates for name, engine in run.engines.items()},
        "averages": run.averages.state(),
        "replaced": sorted(run.replaced),
        "teacher": _teacher(run),
        "others": {role: origin["sha256"] for role, origin in run.provenance.get("others", {}).items()},
        "data": run.loader.state(),
        "method": method_state,
        "means": _means(run),
        "skipped": run.skipped(),
    }
    folder = run.output / FOLDER
    if run.strategy.leads:
        parts = {name: tensors for name, tensors in parts.items() if tensors}
        checkpoint.write(folder, run.step, Checkpoint(parts, state), run.recipe.train.keep_checkpoints)
    run.strategy.barrier()
    return folder / f"step_{run.step:06d}"


def restore_modules(run: Trainer, found: Checkpoint) -> None:
    """The networks' weights; before anything is sharded. Raises `UserError` where they are of other networks."""
    then, now = found.state.get("teacher"), _teacher(run)
    changed = [f"teacher {run.provenance['teacher']['path']}"] if then and now and then != now else []
    before = found.state.get("others", {})
    now_others = run.provenance.get("others", {})
    changed += [f"network others.{role}" for role, now in now_others.items() if before.get(role) != now["sha256"]]
    if changed:
        raise UserError(
            f"the {changed[0]} is not the one of the checkpoint of update {found.state['step']}, its weights or plans "
            "have changed; put that one back or start again without --resume."
        )
    run.replaced = set(found.state["replaced"])
    for name in _changing(run):
        part = f"network.{name}"
        if part not in found.parts:
            raise UserError(
                f"the checkpoint of update {found.state['step']} lacks network {name!r}; the method has changed."
            )
        try:
            run.modules[name].load_state_dict(found.parts[part])
        except RuntimeError:
            raise UserError(
                f"the checkpoint's network {name!r} has other parameters than the recipe's; "
                "use the recipe it came from."
            ) from None


def restore(run: Trainer, found: Checkpoint) -> None:
    """Everything else; once every network is in its place."""
    state = found.state
    run.step, run.stage_index, run.stage_updates = state["step"], state["stage"], state["stage_updates"]
    for name, engine in run.engines.items():
        engine.load_state(found.parts.get(f"optimizer.{name}", {}))
        engine.updates = state["engines"][name]
    run.averages.load_state(state["averages"])
    run.loader.load_state(state["data"])
    run.method.load_state(checkpoint.join(state["method"], found.parts.get("method", {})))
    if "pairs" in found.parts:
        held = {key: value.to(run.strategy.device) for key, value in found.parts["pairs"].items()}
        run.pairs = PairSet(held["noise"], held["images"], held.get("cond"))
    rank, world = run.strategy.rank, run.strategy.world
    partial = {
        name: (sums[rank] if len(sums) == world else sum(sums) / len(sums), weight, on_host)
        for name, (sums, weight, on_host) in state.get("means", {}).items()
    }
    run.means.go_on(partial, run.strategy.device)
    run.skipped_before = state.get("skipped", 0.0)
    run.notices.append(f"going on after update {run.step}.")


def _means(run: Trainer) -> dict[str, tuple[list[float], float, bool]]:
    """What the coming line of the log is to be the mean of: {name: (sum on each rank, weight, kept on the host)}."""
    partial, strategy = run.means.partial(), run.strategy
    sums = torch.zeros(strategy.world, len(partial), dtype=torch.float64, device=strategy.device)
    sums[strategy.rank] = torch.tensor([total for total, _, _ in partial.values()], dtype=torch.float64)
    columns = (strategy.mean(sums) * strategy.world).T.tolist()
    return {name: (column, *rest) for column, (name, (_, *rest)) in zip(columns, partial.items())}  # type: ignore[misc]


def _teacher(run: Trainer) -> str | None:
    """The SHA-256 of the artefact that is distilled, where there is one."""
    digest = run.provenance.get("teacher", {}).get("sha256")
    return None if digest is None else str(digest)


def _changing(run: Trainer) -> list[str]:
    """The networks whose weights a checkpoint must hold."""
    return [name for name in run.modules if name != "teacher" or name in run.replaced]


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content
