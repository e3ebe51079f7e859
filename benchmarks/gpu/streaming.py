"""The floors: kernels that only move bytes, with an operator's number of reads and writes, and one that does nothing.

Where Triton cannot run (a CPU without its interpreter) plain torch stands in; that is for trying the suite, not for
numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep_kernels import backends

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

Call = Callable[[], object]
BLOCKS = (1024, 2048, 4096)  # elements a program; the fastest of them is the floor

if triton is not None:

    @triton.jit
    def stream_kernel(sources, targets, count, BLOCK: tl.constexpr):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < count
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(len(sources)):
            total += tl.load(sources[k] + offsets, mask=inside, other=0.0).to(tl.float32)
        for m in tl.static_range(len(targets)):
            tl.store(targets[m] + offsets, total.to(targets[m].dtype.element_ty), mask=inside)

    @triton.jit
    def read_kernel(sources, sums, count, BLOCK: tl.constexpr):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < count
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(len(sources)):
            total += tl.load(sources[k] + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + tl.program_id(0), tl.sum(total, 0))

    @triton.jit
    def empty_kernel(x):
        pass


def runs_on(device: str) -> bool:
    return triton is not None and backends.runs_on("triton", device)


def streams(
    reads: int, writes: int, count: int, dtype: torch.dtype, device: str, in_place: bool = False
) -> dict[str, Call]:
    """Floors that read `reads` and write `writes` tensors of `count` elements; in_place: the first ones read."""
    sources = [torch.zeros(count, dtype=dtype, device=device) for _ in range(reads)]
    targets = sources[:writes] if in_place else [torch.empty(count, dtype=dtype, device=device) for _ in range(writes)]
    if not runs_on(device):
        return {"streaming (torch)": lambda: _by_torch(sources, targets)}
    return {f"streaming, blocks of {block}": _stream(sources, targets, count, block) for block in BLOCKS}


def _by_torch(sources: list[Tensor], targets: list[Tensor]) -> None:
    total = sources[0].sum() if not targets else sources[0]
    for source in sources[1:]:
        total = total + (source if targets else source.sum())
    for target in targets:
        target.copy_(total)


def _stream(sources: list[Tensor], targets: list[Tensor], count: int, block: int) -> Call:
    grid = (triton.cdiv(count, block),)
    if targets:
        return lambda: stream_kernel[grid](tuple(sources), tuple(targets), count, BLOCK=block, num_warps=block // 256)
    sums = torch.empty(grid[0], dtype=torch.float32, device=sources[0].device)
    return lambda: read_kernel[grid](tuple(sources), sums, count, BLOCK=block, num_warps=block // 256)


def nothing(device: str) -> Call:
    """A kernel that does nothing: what a launch costs the device."""
    x = torch.zeros(1, device=device)
    if not runs_on(device):
        return lambda: None
    return lambda: empty_kernel[(1,)](x, num_warps=4)
