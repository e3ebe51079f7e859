"""Grids of a teacher by gradient descent through the sampler, for `fewstep search-grid`.  See `solvers.descent`."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fewstep import solvers
from fewstep.artefact import Artefact
from fewstep.errors import UserError
from fewstep.evaluate.features import digit_classifier
from fewstep.evaluate.grid_chunks import counted, device_of, labels, noise
from fewstep.solvers import descent, grid_files, grids
from fewstep.solvers.grid_files import SearchedGrid
from fewstep.solvers.plan_slopes import Batch

COSTS = ("samples", "kernel")


def descending(
    model: Artefact,
    out: Path,
    known: SearchedGrid | None,
    asked: dict[str, Any],
    steps: Sequence[int],
    batch: int,
    progress: Callable[[str], None],
) -> SearchedGrid:
    """What is missing at `out`, each number of steps written when it is found."""
    grid = SearchedGrid(model.denoiser.schedule, asked, (), (), {}, {}, repr(os.fspath(out)))
    if known is not None and known.searched == asked:
        grid = known
    missing = sorted(set(steps) - set(grid.grids))
    if not missing:
        progress(f"{out} already holds this search")
        return grid
    starts = _starts(model, asked, missing)
    kernel = asked["cost"] == "kernel"
    loss = descent.kernel_distance(_features(model)) if kernel else descent.paired_distance
    batches = _references(model, asked, batch, progress)
    for n in missing:
        with tqdm(
            total=asked["rounds"] + 1, desc=f"{n} steps", dynamic_ncols=True, disable=not sys.stderr.isatty()
        ) as bar:

            def shown(_: int, value: float, bar: Any = bar) -> None:
                bar.set_postfix(loss=f"{value:.4g}", refresh=False)
                bar.update()

            found = descent.descend(
                model.denoiser,
                batches,
                starts[n],
                solver=asked["sampler"],
                loss=loss,
                rounds=asked["rounds"],
                guidance=asked["guidance"],
                progress=shown,
            )
        progress(f"search-grid: {n} steps, {asked['cost']} {found.loss:.4g}; {found.losses[0]:.4g} at the start")
        times, prices = {**grid.grids, n: found.times}, {**grid.prices, n: found.loss}
        grid = dataclasses.replace(grid, grids=dict(sorted(times.items())), prices=prices)
        grid_files.write(grid, out)
    return grid


def _starts(model: Artefact, asked: dict[str, Any], steps: Sequence[int]) -> dict[int, tuple[float, ...]]:
    """The grids to start from, which must begin and end where the reference does."""
    schedule = model.denoiser.schedule
    reference = grids.times(asked["nodes"], schedule, asked["points"])
    starts = {n: grids.times(asked["nodes"], schedule, n) for n in steps}
    for n, times in starts.items():
        if n < 2:
            raise UserError(f"a grid of {n} step has no inner time to search; give --steps of at least 2.")
        if (times[0], times[-1]) != (reference[0], reference[-1]):
            raise UserError(
                f"grid {asked['nodes']!r} goes from {times[0]:g} to {times[-1]:g} in {n} steps and from "
                f"{reference[0]:g} to {reference[-1]:g} in {asked['points']}; give --nodes whose ends do not move."
            )
    return starts


def _references(model: Artefact, asked: dict[str, Any], batch: int, progress: Any) -> list[Batch]:
    """Noise and where `points` steps take it, in chunks."""
    denoiser = model.denoiser
    plan = solvers.plan(
        asked["solver"],
        denoiser.schedule,
        asked["points"],
        grid=asked["nodes"],
        prediction=denoiser.prediction,
        guidance=asked["guidance"],
    )
    if plan.stochastic_stages:
        raise UserError(f"solver {asked['solver']!r} draws noise; walk the teacher by one such as dpmpp_2m or heun.")
    found = []
    with counted(model, asked["samples"], batch, plan.evaluations, progress) as chunks:
        for index in chunks:
            start, cond = noise(model, asked["seed"], index), labels(model, index)
            found.append(Batch(start, solvers.sample(denoiser, plan, start, cond), cond))
    return found


def _features(model: Artefact) -> Callable[[Tensor], Tensor]:
    if model.image_shape != (1, 8, 8):
        raise UserError(
            f"cost 'kernel' compares features of digits and this teacher makes {list(model.image_shape)}; "
            "take cost 'samples', or fewstep.solvers.descent with features of your own."
        )
    return copy.deepcopy(digit_classifier()).to(device_of(model))
