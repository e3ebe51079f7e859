"""Data parallel: every rank holds everything; gradients are averaged while the last micro-batch's backward runs.

Not `torch.nn.parallel.DistributedDataParallel`: its reducer expects one forward a backward and knows no frozen calls,
while a method calls a network several times, nested, and in two ways. Hooks on the parameters need to know neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.methods import OptimizerConfig
from fewstep.train.strategies.base import Engine, Strategy
from fewstep.train.strategies.single import LocalEngine

BUCKET_ELEMENTS = 6 * 2**20


class _Bucket:
    """Parameters of one dtype whose gradients travel together, with one presence flag each behind them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.waiting = len(parameters)
        self.flat: Tensor | None = None
        self.work: Any = None

    def send(self) -> None:
        parts = [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in self.parameters]
        present = [float(p.grad is not None) for p in self.parameters]
        self.flat = torch.cat([*parts, parts[0].new_tensor(present)])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self, world: int) -> None:
        assert self.flat is not None
        self.work.wait()
        self.flat.div_(world)
        pieces = self.flat.split([*(p.numel() for p in self.parameters), len(self.parameters)])
        absent_here = any(p.grad is None for p in self.parameters)
        present = pieces[-1].tolist() if absent_here else [1.0] * len(self.parameters)
        for parameter, piece, share in zip(self.parameters, pieces, present):
            parameter.grad = piece.view_as(parameter) if share else None
        self.flat = self.work = None
        self.waiting = len(self.parameters)


class DdpEngine(LocalEngine):
    """A local engine whose gradients are averaged over ranks in buckets, sent in one order on every rank."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._armed = False
        self._next = 0
        self._buckets = _bucketed(list(reversed(self._trained)))
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        for parameter in self._trained:
            dist.broadcast(parameter.data, 0)
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._armed = last
        loss.backward()
        self._armed = False

    def step(self, decays: Mapping[str, Sequence[float]] | None = None) -> Tensor:
        for bucket in self._buckets[self._next :]:
            bucket.send()
        for bucket in self._buckets:
            bucket.receive(dist.get_world_size())
        self._next = 0
        return super().step(decays)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._armed:
            return
        self._bucket_of[parameter].waiting -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].waiting == 0:
            self._buckets[self._next].send()
            self._next += 1


class Ddp(Strategy):
    """Every rank holds everything."""

    name = "ddp"

    def engine(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, OptimizerConfig],
        *,
        clip: float | None,
        warmup: int,
        micro_batch: int,
        accumulate: int,
    ) -> Engine:
        return DdpEngine(name, networks, optimizers, clip, warmup)

    def mean(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world

    def any(self, flag: bool) -> bool:
        device = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        votes = torch.tensor(int(flag), device=device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _bucketed(parameters: list[nn.Parameter]) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    held: list[nn.Parameter] = []
    for parameter in parameters:
        full = held and sum(p.numel() for p in held) + parameter.numel() > BUCKET_ELEMENTS
        if held and (full or held[0].dtype != parameter.dtype):
            buckets.append(_Bucket(held))
            held = []
        held.append(parameter)
    return [*buckets, _Bucket(held)]
