"""lincomb against what a sampler's step and noising cost otherwise: diffusers' schedulers with their pipelines'
guidance, the same expression in eager and compiled torch, and a copy of the same bytes.

    OMP_NUM_THREADS=2 python benchmarks/kernels/lincomb.py

Latents [16, 4, 128, 128] float32. A guided step is written where the sampler's executor writes it: over the state, the
first half of the network's joined input, and over the oldest of the history. That is why it may be faster than a
copy of as many bytes, which fetches every line that it overwrites. No time is printed for a candidate whose values fail
against float64. The host's part of a call: benchmarks/host_cost.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import asked, copy_of, interleaved, publish, summary
from torch import Tensor

from fewstep_kernels import backend, lincomb, normal

SHAPE = (16, 4, 128, 128)
STEPS, INDEX, SCALE = 20, 10, 3.0
SIZE = 16 * 4 * 128 * 128 * 4


def check(name: str, found: list[Tensor], truth: list[Tensor]) -> None:
    for y, expected in zip(found, truth, strict=True):
        error = (y.double() - expected).abs().max().item()
        if not error < 1e-4:  # float32 roundings of numbers below 100, schedulers' float32 tables among them
            raise SystemExit(f"{name} is wrong by {error}: no times are printed.")


def scheduler_step(name: str) -> Callable[..., list[Tensor]]:
    """One step in the middle of a run, as the pipeline takes it: guidance, scheduler.step, the next doubled input.

    step(x, cond, uncond, *history) gives [both halves of the next input, what the scheduler keeps of this step].
    """
    import diffusers

    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if name == "DDIMScheduler":
        options |= {"clip_sample": False}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(STEPS)
    moment = scheduler.timesteps[INDEX]

    def step(x: Tensor, cond: Tensor, uncond: Tensor, *history: Tensor) -> list[Tensor]:
        output = uncond + SCALE * (cond - uncond)
        scheduler._step_index = INDEX
        if history:
            scheduler.lower_order_nums = 2
            scheduler.model_outputs = [None, history[0]]
        if len(history) > 1:
            scheduler.last_sample, scheduler.this_order = history[1], 2
            scheduler.model_outputs = [history[2], history[0]]
            scheduler.timestep_list = [scheduler.timesteps[INDEX - 2], scheduler.timesteps[INDEX - 1]]
        x = scheduler.step(output, moment, x, return_dict=False)[0]
        both = torch.cat([x, x])
        kept = [scheduler.model_outputs[-1]] if history else []
        return [both, *kept, *([scheduler.last_sample] if len(history) > 1 else [])]

    return step


def coefficients(step: Callable[..., list[Tensor]], inputs: int) -> Tensor:
    """[M, K] of a linear step: what it answers to the unit vectors. The doubled input counts as two rows."""
    both, *kept = step(*torch.eye(inputs).view(inputs, 1, 1, 1, inputs))
    return torch.cat([both.view(2, inputs), *(row.view(1, inputs) for row in kept)])


def guided_step(name: str, scheduler: str, history: int, rounds: int) -> dict:
    """One guided step: our single pass, diffusers' own, and the same expression in torch."""
    step = scheduler_step(scheduler)
    columns = 3 + history
    table = coefficients(step, columns)
    rows = len(table)
    answer = torch.randn(2 * SHAPE[0], *SHAPE[1:])  # the network's: its halves are read in place
    inputs = [torch.randn(SHAPE), *answer.split(SHAPE[0]), *(torch.randn(SHAPE) for _ in range(history))]
    # as the sampler's executor holds them: the state is the first half of the next input, the history a ring
    doubled = torch.empty(2 * SHAPE[0], *SHAPE[1:])
    ring = [torch.empty(SHAPE) for _ in range(history)]
    held = [doubled[: SHAPE[0]], *inputs[1:3], *ring]
    out = [*doubled.split(SHAPE[0]), *ring[: rows - 2]]
    apart, kept = torch.empty_like(doubled), [torch.empty(SHAPE) for _ in range(rows - 2)]
    numbers = table.tolist()

    def begin() -> None:
        for x, value in zip((doubled, *ring), (torch.cat([inputs[0]] * 2), *inputs[3:])):
            x.copy_(value)

    def fused() -> list[Tensor]:
        lincomb(held, table, out=out)
        return [doubled, *out[2:]]

    def expression(*inputs: Tensor) -> list[Tensor]:
        values = [sum(c * x for c, x in zip(row, inputs)) for row in numbers[1:]]
        return [values[0], values[0], *values[1:]]

    def eager() -> list[Tensor]:
        values = expression(*inputs)
        return [torch.cat(values[:2]), *values[2:]]

    @torch.compile(fullgraph=True)
    def written(inputs: list[Tensor], out: list[Tensor]) -> None:
        for target, value in zip(out, expression(*inputs)):
            target.copy_(value)

    def compiled() -> list[Tensor]:
        written(inputs, [*apart.split(SHAPE[0]), *kept])
        return [apart, *kept]

    sums = list(torch.einsum("mk,k...->m...", table.double(), torch.stack(inputs).double()))
    truth = [torch.cat(sums[:2]), *sums[2:]]
    moved = (columns + rows) * SIZE
    candidates = {
        f"lincomb ({backend('lincomb', 'cpu')})": fused,
        "diffusers": lambda: step(*inputs),
        "eager torch": eager,
        "torch.compile into buffers": compiled,
        "copy of the same bytes": copy_of(columns * SIZE, rows * SIZE),
    }
    with torch.inference_mode():
        for candidate in list(candidates)[:-1]:
            begin()
            apart.fill_(float("nan"))
            check(candidate, candidates[candidate](), truth)
        seconds = interleaved(candidates, rounds)
    names = list(candidates)
    results = summary(seconds, names[0], names[-1], moved)
    return {
        "case": f"guided {name} step ({scheduler}), {columns} inputs, {rows} outputs",
        "shape": SHAPE,
        "moved_bytes": moved,
        "read_to_write": f"{columns}:{rows}",
        "launches": 1,
        "results": results,
        "targets": asked(results, diffusers=10, copy=0.5),
    }


def lcm_step(rounds: int) -> dict:
    """A guided consistency step with fresh noise: drawn inside our pass, by torch.randn in diffusers."""
    step = scheduler_step("LCMScheduler")
    torch.manual_seed(0)
    probe = torch.eye(3).view(3, 1, 1, 1, 3)
    drawn = torch.randn(probe[0].shape)
    torch.manual_seed(0)
    row = step(*probe)[0].view(2, 3)[0]
    torch.manual_seed(0)
    sigma = step(*torch.zeros_like(probe))[0].view(2, 3)[0] / drawn.view(3)
    row = torch.cat([row - sigma * drawn.view(3), sigma[:1]])
    table = torch.stack([row, row])
    both = torch.randn(2 * SHAPE[0], *SHAPE[1:])
    inputs = [torch.randn(SHAPE), both[: SHAPE[0]], both[SHAPE[0] :]]
    doubled, seeds = torch.empty(2 * SHAPE[0], *SHAPE[1:]), torch.arange(SHAPE[0])

    def fused() -> list[Tensor]:
        lincomb(inputs, table, noise_seeds=seeds, out=[doubled[: SHAPE[0]], doubled[SHAPE[0] :]])
        return [doubled]

    def rival() -> list[Tensor]:
        return step(*inputs)

    quiet = torch.einsum("k,k...->...", row[:3].double(), torch.stack(inputs).double())
    with torch.inference_mode():
        truth = quiet + row[3].double() * normal(seeds, SHAPE[1:], dtype=torch.float64)
        check("lincomb", fused(), [torch.cat([truth, truth])])
        torch.manual_seed(1)
        truth = quiet + row[3].double() * torch.randn(SHAPE).double()
        torch.manual_seed(1)
        check("diffusers", rival(), [torch.cat([truth, truth])])
        candidates = {
            f"lincomb ({backend('lincomb', 'cpu')})": fused,
            "diffusers": rival,
            "copy of the same bytes": copy_of(3 * SIZE, 2 * SIZE),
        }
        seconds = interleaved(candidates, rounds)
    names = list(candidates)
    return {
        "case": "guided LCM step (LCMScheduler) with drawn noise, 3 inputs, 2 outputs",
        "shape": SHAPE,
        "moved_bytes": 5 * SIZE,
        "read_to_write": "3:2",
        "launches": 1,
        "results": summary(seconds, names[0], names[-1], 5 * SIZE),
    }


def noising(rounds: int) -> dict:
    """x_t = alpha x + sigma noise, the noise drawn inside the pass and keyed by sample."""
    x, seeds, table = torch.randn(SHAPE), torch.arange(SHAPE[0]), torch.tensor([[0.8, 0.6]])
    out, buffer = [torch.empty(SHAPE)], torch.empty(SHAPE)

    def fused() -> list[Tensor]:
        return list(lincomb([x], table, noise_seeds=seeds, out=out))

    def two_passes() -> list[Tensor]:
        return [0.8 * x + 0.6 * normal(seeds, SHAPE[1:])]

    truth = [0.8 * x.double() + 0.6 * normal(seeds, SHAPE[1:], dtype=torch.float64)]
    check("lincomb", fused(), truth)
    check("normal, then eager torch", two_passes(), truth)
    candidates = {
        f"lincomb ({backend('lincomb', 'cpu')})": fused,
        "normal, then eager torch": two_passes,
        "torch.randn, then eager": lambda: 0.8 * x + 0.6 * torch.randn(SHAPE),
        "torch's normal_ alone, in a buffer": lambda: buffer.normal_(),
        "copy of the same bytes": copy_of(SIZE, SIZE),
    }
    with torch.inference_mode():
        seconds = interleaved(candidates, rounds)
    names = list(candidates)
    results = summary(seconds, names[0], names[-1], 2 * SIZE)
    for row in results.values():
        row["nanoseconds_per_element"] = round(row["milliseconds"] * 1e6 / x.numel(), 3)
    return {
        "case": "noising with drawn noise (torch.randn draws one sequence for the batch, not one per sample)",
        "shape": SHAPE,
        "moved_bytes": 2 * SIZE,
        "read_to_write": "1:1",
        "launches": 1,
        "results": results,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = [
        guided_step("DPM++2M", "DPMSolverMultistepScheduler", 1, 200),
        guided_step("DDIM", "DDIMScheduler", 0, 100),
        guided_step("UniPC", "UniPCMultistepScheduler", 3, 100),
        lcm_step(60),
        noising(60),
    ]
    publish("kernels_lincomb", cases)
