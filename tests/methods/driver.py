"""A trainer in one page, to test methods without the real one. It knows no method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fewstep_kernels as fk
from fewstep.diffusion.denoiser import Denoiser
from fewstep.methods import Batch, Method, Rng, build
from fewstep.nets import Network


@dataclass
class Run:
    networks: dict[str, Network]
    updates: dict[str, int] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def attach(
    method: Method, teacher: Denoiser | None, network: Callable[[], nn.Module] | None = None
) -> dict[str, Network]:
    """Build the networks of `method` and set them on it."""
    if teacher is not None:
        method.schedule, method.prediction = teacher.schedule, teacher.prediction
        teacher.requires_grad_(False)
    networks = {name: Network(module) for name, module in build(method, teacher, network).items()}
    if teacher is not None:
        networks["teacher"] = Network(teacher)
    for name, value in networks.items():
        setattr(method, name, value)
    return networks


def train(
    method: Method,
    data: Callable[[Tensor], Batch],
    teacher: Denoiser | None,
    *,
    network: Callable[[], nn.Module] | None = None,
    updates: int = 4,
    accumulate: int = 2,
    size: int = 16,
    seed: int = 0,
    lr: float = 1e-3,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
) -> Run:
    """`updates` iterations a stage (or what the stage says) of `accumulate` micro-batches of `size`."""
    torch.manual_seed(seed)
    run = Run(attach(method, teacher, network))
    engines: dict[str, list[str]] = {}
    for name, spec in method.networks.items():
        if spec.average is None:
            engines.setdefault(spec.engine or name, []).append(name)
    parameters = {e: [p for n in ns for p in run.networks[n].module.parameters()] for e, ns in engines.items()}
    rates = {e: spec.optimizer.lr if (spec := method.networks[e]).optimizer else lr for e in engines}
    optimizers = {e: optimizer(ps, lr=rates[e]) for e, ps in parameters.items()}
    step = 0
    for stage in method.stages():
        method.stage = stage
        for destination, source in stage.copies.items():
            run.networks[destination].module.load_state_dict(run.networks[source].module.state_dict())
        for engine in stage.restart:
            optimizers[engine] = optimizer(parameters[engine], lr=rates[engine])
        for _ in range(updates if stage.updates is None else stage.updates):
            generators = []
            for micro in range(accumulate):
                index = torch.arange(size) + (step * accumulate + micro) * size
                generators.append(method.iteration(data(index), Rng(seed, step, index)))
            while (engine := _advance(method, generators, run, accumulate)) is not None:
                for other, theirs in parameters.items():
                    if other != engine:
                        assert all(p.grad is None for p in theirs), f"the loss of {engine} leaked into {other}"
                optimizers[engine].step()
                optimizers[engine].zero_grad(set_to_none=True)
                run.updates[engine] = run.updates.get(engine, 0) + 1
                _average(method, run, engines[engine])
            step += 1
    return run


def _advance(method: Method, generators: list, run: Run, accumulate: int) -> str | None:
    """One update of every micro-batch in lockstep; each graph is freed before the next is built."""
    yielded: set[str | None] = set()
    total = 0.0
    for generator in generators:
        update = next(generator, None)
        yielded.add(None if update is None else update.network)
        if update is not None:
            (update.loss / accumulate).backward()
            total += float(update.loss.detach()) / accumulate
    if len(yielded) != 1:
        raise RuntimeError(
            f"micro-batches must yield the same updates and yielded {yielded}; draw branches with same_for_all"
        )
    name = yielded.pop()
    if name is None:
        return None
    run.losses.setdefault(name, []).append(total)
    run.order.append(name)
    return method.networks[name].engine or name


def _average(method: Method, run: Run, stepped: list[str]) -> None:
    for name, spec in method.networks.items():
        if spec.average is not None and spec.start in stepped:
            ours = list(run.networks[name].module.parameters())
            theirs = list(run.networks[str(spec.start)].module.parameters())
            fk.ema_update(ours, [p.detach() for p in theirs], spec.average.decay)
