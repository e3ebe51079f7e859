"""`fewstep search-grid`: the times at which a teacher should be asked, found from the teacher itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import artefact as artefacts
from fewstep.artefact import Artefact
from fewstep.data import digits, open_folder
from fewstep.errors import UserError, choose
from fewstep.evaluate import grid_descent
from fewstep.evaluate.grid_chunks import counted, device_of, labels, noise
from fewstep.solvers import grid_files, grids, search
from fewstep.solvers.grid_files import SearchedGrid

COSTS = ("gits", "gits-l1", "gits-l2", "bound", "analytic")
STEPS = (2, 4, 6, 8, 10)


def search_grid(
    teacher: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    cost: str = "gits",
    steps: Sequence[int] = STEPS,
    nodes: str | None = None,
    points: int = 60,
    samples: int = 256,
    batch: int = 64,
    growth: float | None = None,
    guidance: float | None = None,
    solver: str = "dpmpp_2m",
    data: str | None = None,
    sampler: str = "ddim",
    rounds: int = 100,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] = print,
) -> SearchedGrid:
    """Search grids of each of `steps` for a teacher's artefact, and write them to `out`; see `solvers.search`.

    cost: "gits", "gits-l1", "gits-l2" follow the teacher's own trajectories over `points` steps of the grid `nodes`
    (default: the schedule's), at `guidance`; "bound" and "analytic" are the variational bounds of ancestral sampling
    with the posterior's and the optimal variance, from `data` (default: what the teacher was trained on), unguided.
    "samples" and "kernel" are searched by gradient descent instead (`solvers.descent`), in `rounds` from the grid
    `nodes`: of the solver `sampler`, the distance to the same noise taken along `points` steps by `solver`, or the
    kernel distance between features of both (digits only, where features are known).
    samples: trajectories or images, the same whatever the `batch` (but for "kernel", whose distance is a batch's).
    growth: 1.15 for gits (its paper's), else 1; of dynamic programming only.
    Where `out` already holds this search nothing is asked of the teacher, and with other steps or growth only the
    search itself is done again. Raises UserError for what cannot be searched, and before any work for what is not
    writable.
    """
    _check(cost, steps, points, samples, batch)
    if cost in grid_descent.COSTS:
        if growth is not None:
            raise UserError(f"growth is {growth}, but cost {cost!r} is no sum over steps; leave growth out.")
        model = artefacts.load(teacher, device)
        asked = {"teacher": model.digest, "cost": cost, "points": points, "samples": samples, "seed": seed}
        asked |= {"nodes": nodes, "guidance": _scale(model, guidance), "solver": solver, "sampler": sampler}
        asked |= {"rounds": rounds} | ({"batch": batch} if cost == "kernel" else {})
        return grid_descent.descending(model, Path(out), _known(Path(out)), asked, steps, batch, progress)
    growth = (1.15 if cost.startswith("gits") else 1.0) if growth is None else float(growth)
    model = artefacts.load(teacher, device)
    asked = {"teacher": model.digest, "cost": cost, "points": points, "samples": samples, "seed": seed}
    if cost.startswith("gits"):
        asked |= {"nodes": nodes, "guidance": _scale(model, guidance), "solver": solver}
    else:
        asked |= {"nodes": nodes, "data": _source(model, data)}
    known = _known(Path(out))
    if known is not None and {k: v for k, v in known.searched.items() if k != "growth"} == asked:
        if known.searched.get("growth") == growth and set(steps) <= set(known.grids):
            progress(f"{os.fspath(out)} already holds this search")
            return known
        costs, times = torch.tensor(known.matrix(), dtype=torch.float64), known.nodes
    else:
        times = _nodes(model, nodes, points, cost)
        measured = _following if cost.startswith("gits") else _bounding
        costs = measured(model, times, samples, batch, asked, progress)

    found = search.search(costs, max(steps), growth)
    missing = [n for n in steps if n not in found]
    if missing:
        raise UserError(f"no way over these nodes has {missing[0]} steps; ask for other steps or more --points.")
    last = len(times) - 1
    grid = SearchedGrid(
        schedule=model.denoiser.schedule,
        searched={**asked, "growth": growth},
        nodes=tuple(times),
        costs=tuple(tuple(costs[i, i + 1 :].tolist()) for i in range(last)),
        grids={n: tuple(times[node] for node in found[n].nodes) for n in sorted(set(steps))},
        prices={n: found[n].cost for n in sorted(set(steps))},
        origin=repr(os.fspath(out)),
    )
    grid_files.write(grid, out)
    return grid


def table(grid: SearchedGrid) -> str:
    """One line for each number of steps: its cost and sigma/alpha at its times."""
    lines = [f"{'steps':>5} {'cost':>10}  sigma/alpha"]
    for steps, times in grid.grids.items():
        levels = " ".join(f"{grid.schedule.ratio(t):.4g}" for t in times)
        lines.append(f"{steps:>5} {grid.prices[steps]:>10.4g}  {levels}")
    return "\n".join(lines)


def _check(cost: str, steps: Sequence[int], points: int, samples: int, batch: int) -> None:
    if cost not in (*COSTS, *grid_descent.COSTS):
        raise choose("cost", cost, (*COSTS, *grid_descent.COSTS))
    if points < 2 or samples < 1 or batch < 1:
        raise UserError(
            f"points={points}, samples={samples} and batch={batch} must be at least 2, 1 and 1; give larger numbers."
        )
    if not steps or not all(1 <= n <= points for n in steps):
        raise UserError(f"steps are {list(steps)}; give numbers from 1 to the {points} steps between the nodes.")


def _scale(model: Artefact, guidance: float | None) -> float | None:
    if guidance is not None and guidance != 1.0 and model.classes is None:
        raise UserError(f"guidance is {guidance}, but this teacher knows no classes; leave guidance out.")
    return None if guidance in (None, 1.0) else float(guidance)  # type: ignore[arg-type]


def _source(model: Artefact, data: str | None) -> str:
    source = data or ((model.provenance.get("recipe") or {}).get("data") or {}).get("source")
    if source is None:
        raise UserError("this teacher does not say what it was trained on; give --data, 'digits' or a folder.")
    return str(source)


def _known(out: Path) -> SearchedGrid | None:
    """What is at `out`, None where nothing is; a file that is no searched grid is not overwritten."""
    if not out.exists():
        grid_files.writable(out)
        return None
    try:
        return grid_files.read(out)
    except UserError as error:
        raise UserError(f"{str(error)[:-1]}, or give another --out: it is not overwritten.") from None


def _nodes(model: Artefact, nodes: str | None, points: int, cost: str) -> tuple[float, ...]:
    schedule = model.denoiser.schedule
    if cost.startswith("gits"):
        return grids.times(nodes, schedule, points)
    name = nodes or ("karras" if schedule.name == "edm" else "uniform")
    inside = grids.times({"name": name, "end": schedule.t_min, "zero": "none"}, schedule, points - 1)
    return (*inside, schedule.t_clean)


def _following(
    model: Artefact, times: Sequence[float], samples: int, batch: int, asked: dict[str, Any], progress: Any
) -> Tensor:
    metric = {"gits": "dev", "gits-l1": "l1", "gits-l2": "l2"}[asked["cost"]]
    denoiser = model.denoiser
    total = torch.zeros(len(times), len(times), dtype=torch.float64)
    with counted(model, samples, batch, len(times) - 1, progress) as chunks:
        for index in chunks:
            part = search.trajectory_costs(
                denoiser,
                noise(model, asked["seed"], index),
                times,
                metric=metric,
                solver=asked["solver"],
                cond=labels(model, index),
                guidance=asked["guidance"],
            )
            total += part * (len(index) / samples)
    return total


def _bounding(
    model: Artefact, times: Sequence[float], samples: int, batch: int, asked: dict[str, Any], progress: Any
) -> Tensor:
    images, classes = _images(asked["data"], samples)
    if tuple(images.shape[1:]) != model.image_shape:
        raise UserError(
            f"the images of {asked['data']!r} have shape {list(images.shape[1:])} and the teacher makes "
            f"{list(model.image_shape)}; give --data with its own."
        )
    device, errors = device_of(model), torch.zeros(len(times) - 1, dtype=torch.float64)
    with counted(model, len(images), batch, len(times) - 1, progress) as chunks:
        for index in chunks:
            generator = torch.Generator(device).manual_seed(asked["seed"] * 2**32 + index[0])
            cond = None if model.classes is None else classes[index].to(device)
            found = search.second_moments(
                model.denoiser, images[index].to(device), times[:-1], cond=cond, generator=generator
            )
            errors += torch.tensor(found[0], dtype=torch.float64) * (len(index) / len(images))
    schedule = model.denoiser.schedule
    if asked["cost"] == "bound":
        return search.bound_costs(schedule, times, errors.tolist())
    # Gamma = E|eps_hat|^2 by way of 1 - Gamma = E Var(eps | x): its own estimate errs above 1 where sigma is large
    moments = [1.0 - error / schedule.ratio(t) ** 2 for error, t in zip(errors.tolist(), times)]
    return search.optimal_variance_costs(schedule, times, moments)


def _images(source: str, samples: int) -> tuple[Tensor, Tensor]:
    if source == "digits":
        images, labels = digits("train")
        return images[:samples], labels[:samples]
    folder = open_folder(source)
    count = min(samples, len(folder))
    spread = [i * len(folder) // count for i in range(count)]  # over all classes
    return torch.stack([folder.normalised(folder.read(i)) for i in spread]), folder.labels[spread]
