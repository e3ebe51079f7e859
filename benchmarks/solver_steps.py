"""What a sampling step costs beside the network: ours and diffusers' in the same run, on the same latents and answers.

A sampler here is what a pipeline runs for one picture: doubling and scaling of the input, the network, guidance, the
scheduler's step. The network answers a tensor it holds, so that what is left is the sampler's own. Before any time is
taken, both samplers' pictures are compared on a network that answers its input, bent.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fewstep

sys.path += [str(Path(__file__).parent / folder) for folder in ("kernels", "gpu")]
from measure import interleaved
from timing import watched

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCALE = 7.5
BOUND = 2e-5  # of the largest value: float32 states and tables on both sides, guided 7.5 times
MODES = ("eager", "eager, answers copied", "network compiled", "all compiled")
Call = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One solver as both sides know it."""

    name: str
    scheduler: str
    made: dict[str, Any]
    options: dict[str, Any]
    steps: int = 10
    guidance: float | None = SCALE
    exploding: bool = False  # whether the scheduler's state is x/alpha


CASES = (
    Case("DDIM", "DDIMScheduler", {"clip_sample": False}, {"solver": "ddim"}),
    Case("Euler", "EulerDiscreteScheduler", {}, {"solver": "euler"}, exploding=True),
    Case("DPM++2M", "DPMSolverMultistepScheduler", {}, {"solver": "dpmpp_2m", "lower_order_final": True}),
    Case("UniPC", "UniPCMultistepScheduler", {}, {"solver": "unipc", "order": 2, "lower_order_final": True}),
    Case("LCM", "LCMScheduler", {}, {"solver": "lcm", "timestep_scaling": 10.0}, steps=4, guidance=None),
)


@torch.library.custom_op("fewstep_benchmarks::answer", mutates_args=())
def _answer(x: Tensor) -> Tensor:
    """A network no compiler looks into: its answer is a copy of what it holds for this shape."""
    return _held(x).clone()


@_answer.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_HELD: dict[tuple[int, ...], Tensor] = {}


def _held(x: Tensor) -> Tensor:
    if tuple(x.shape) not in _HELD:
        half = torch.randn(-(-len(x) // 2), *x.shape[1:], generator=torch.Generator().manual_seed(1))
        _HELD[tuple(x.shape)] = torch.cat([half, half])[: len(x)].to(x)  # ours asks cond first, theirs uncond
    return _HELD[tuple(x.shape)]


class Fixed(torch.nn.Module):
    """Answers the tensor it holds; `opaque` where a compiler looks on."""

    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.opaque = opaque

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return _answer(x) if self.opaque else _held(x)

    def null(self, cond: Tensor) -> Tensor:
        return torch.zeros_like(cond)


class Curved(torch.nn.Module):
    """Answers its input, bent and shifted by the condition: what values are compared on."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        shift = 0.0 if cond is None else 0.3 * cond.view(-1, 1, 1, 1)
        return torch.tanh(0.8 * x + shift + 1e-4 * t.view(-1, 1, 1, 1))

    def null(self, cond: Tensor) -> Tensor:
        return torch.zeros_like(cond)


def prepared(case: Case, device: str) -> Any:
    """diffusers' scheduler at its trailing times, as a pipeline has it before its loop."""
    import diffusers

    spacing = {} if case.scheduler == "LCMScheduler" else {"timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, case.scheduler)(**SD, **spacing, **case.made)
    scheduler.set_timesteps(case.steps, device=device)
    return scheduler


def fresh(scheduler: Any) -> Any:
    """A copy whose steps leave the original as it was."""
    taken = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(taken, name, list(value))
    return taken


def planned(case: Case) -> fewstep.solvers.Plan:
    options = dict(case.options)
    grid = "lcm" if case.name == "LCM" else "trailing"
    if not case.exploding:
        options["initial_scale"] = 1.0  # theirs starts at std 1 and not at sigma, 0.9977
    schedule = fewstep.schedules.get("sd")
    return fewstep.solvers.plan(
        options.pop("solver"), schedule, case.steps, grid=grid, guidance=case.guidance, **options
    )


def their_step(scheduler: Any, case: Case, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """What a pipeline does between two network calls."""
    if case.guidance is not None:
        uncond, cond = output.chunk(2)
        output = uncond + case.guidance * (cond - uncond)
    return scheduler.step(output, t, x, return_dict=False)[0]


def theirs(
    case: Case, net: torch.nn.Module, device: str, step: Callable[..., Tensor] = their_step, ready: Any = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A pipeline's loop from standard normal noise; the times are set once, outside."""
    ready = ready or prepared(case, device)

    def sample(noise: Tensor, cond: Tensor) -> Tensor:
        scheduler = fresh(ready)
        x = noise * scheduler.init_noise_sigma
        labels = torch.cat([net.null(cond), cond]) if case.guidance is not None else None
        for t in scheduler.timesteps:
            read = scheduler.scale_model_input(torch.cat([x, x]) if labels is not None else x, t)
            x = step(scheduler, case, net(read, t.expand(len(read)), labels), t, x)
        return x

    return sample


def ours(case: Case, net: torch.nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    plan = planned(case)

    def sample(noise: Tensor, cond: Tensor, seeds: Tensor | None) -> Tensor:
        return fewstep.sample(net, plan, noise, cond if case.guidance is not None else None, seeds=seeds)

    return sample


def check(case: Case, shape: tuple[int, ...], device: str) -> float:
    """How far apart the two samplers' pictures are, as a share of the largest value; the same noise on both sides."""
    plan, draw = planned(case), torch.Generator().manual_seed(0)
    noise = torch.randn(shape[0], 1 + plan.stochastic_stages, *shape[1:], generator=draw).to(device)
    cond = torch.arange(shape[0], device=device) % 3 + 1
    module = importlib.import_module(type(prepared(case, device)).__module__)
    drawn = iter(noise.unbind(1)[1:])
    with mock.patch.object(module, "randn_tensor", lambda *_, **__: next(drawn), create=True):
        expected = theirs(case, Curved(), device)(noise[:, 0], cond)
    carried = noise if plan.stochastic_stages else noise[:, 0]
    found = ours(case, Curved())(carried, cond, None)
    return float((found - expected).abs().max() / expected.abs().max())


class Dispatched(TorchDispatchMode):
    """Counts torch's operators, and how often the host reads a number that a GPU would hold.

    On a GPU the latents, the answers and the scheduler's times live there; here they are marked, and so is what is made
    of them. Copies to the device, which may wait too, cannot be seen on a CPU.
    """

    def __init__(self, *on_device: Tensor) -> None:
        super().__init__()
        self.kept = list(on_device)  # marks go by identity, which lasts as long as the tensor
        self.marked = {id(x) for x in on_device}
        self.operators = self.reads = 0

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        found = operator(*arguments, **(keywords or {}))
        self.operators += 1
        if any(id(leaf) in self.marked for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)):
            self.reads += operator._schema.name in ("aten::_local_scalar_dense", "aten::nonzero")
            for leaf in tree_leaves(found):
                if isinstance(leaf, Tensor):
                    self.kept.append(leaf)
                    self.marked.add(id(leaf))
        return found


def counted(case: Case, shape: tuple[int, ...], device: str) -> dict[str, dict[str, float]]:
    """Operators and host reads (on a GPU: kernels and waits of the CUDA runtime) per step, the network's left out."""
    noise, cond = torch.randn(shape, device=device), torch.ones(shape[0], dtype=torch.int64, device=device)
    seeds, net = torch.arange(shape[0], device=device), Fixed(opaque=False)
    ready = prepared(case, device)
    samplers = {
        "fewstep": lambda: ours_of(noise, cond, seeds),
        "diffusers": lambda: theirs_of(noise, cond),
    }
    ours_of, theirs_of = ours(case, net), theirs(case, net, device, ready=ready)
    found = {}
    for name, sample in samplers.items():
        for _ in range(2):
            sample()
        held = [_held(torch.empty(size, *shape[1:], device=device)) for size in (shape[0], 2 * shape[0])]
        if device == "cuda":
            with watched(device) as trace:
                sample()
            row = {"kernels": len(trace.kernels), "waits": len(trace.waits())}
        else:
            with Dispatched(noise, cond, seeds, ready.timesteps, *held) as mode:
                sample()
            row = {"operators": mode.operators, "host_reads": mode.reads}
        found[name] = {key + "_per_step": round(value / case.steps, 2) for key, value in row.items()}
    return found


def timed(case: Case, shape: tuple[int, ...], device: str, rounds: int, mode: str) -> dict[str, Any]:
    """Microseconds a step of both samplers, the network's own share taken off, from interleaved rounds.

    mode: one of `MODES`. "network compiled" is `torch.compile(net)` in both samplers; "all compiled" is the whole
    sampler of ours and scheduler.step of theirs.
    """
    torch._dynamo.reset()
    noise, cond = torch.randn(shape, device=device), torch.ones(shape[0], dtype=torch.int64, device=device)
    seeds, net = torch.arange(shape[0], device=device), Fixed(opaque=mode != "eager")
    called: Any = torch.compile(net, dynamic=False) if mode == "network compiled" else net
    ours_of, step = ours(case, called), their_step
    if mode == "all compiled":
        ours_of, step = torch.compile(ours_of, dynamic=False), torch.compile(their_step, dynamic=False)
    theirs_of = theirs(case, called, device, step)
    guided = case.guidance is not None
    read, labels = (torch.cat([noise, noise]), torch.cat([cond, cond])) if guided else (noise, None)
    told = torch.ones(len(read), device=device)

    def network() -> None:
        for _ in range(case.steps):
            called(read, told) if labels is None else called(read, told, labels)

    candidates: dict[str, Callable[[], object]] = {
        "fewstep": lambda: ours_of(noise, cond, seeds),
        "diffusers": lambda: theirs_of(noise, cond),
        "network": network,
    }
    record: dict[str, Any] = {"mode": mode}
    for name in ("fewstep", "diffusers"):
        begun = time.perf_counter()
        candidates[name]()
        if "compiled" in mode:
            record[f"{name}_first_picture_seconds"] = round(time.perf_counter() - begun, 2)
    if not planned(case).stochastic_stages:
        error = float((ours_of(noise, cond, seeds) - theirs_of(noise, cond)).abs().max() / noise.abs().max())
        if not error < 1e-3:  # fixed answers are not a picture: what cancels there is left at float32's rounding
            raise SystemExit(f"{case.name}: the samplers that would be timed are apart by {error:.1e}: no times.")
    seconds = interleaved({name: synchronised(call, device) for name, call in candidates.items()}, rounds)
    own = {
        name: [(total - network) / case.steps * 1e6 for total, network in zip(seconds[name], seconds["network"])]
        for name in ("fewstep", "diffusers")
    }
    for name, values in own.items():
        record[f"{name}_microseconds_per_step"] = round(statistics.median(values), 2)
    record["times_ours"] = round(statistics.median(b / max(a, 1e-9) for a, b in zip(*own.values())), 2)
    record["network_microseconds_per_step"] = round(statistics.median(seconds["network"]) / case.steps * 1e6, 2)
    return record


def synchronised(call: Callable[[], object], device: str) -> Callable[[], object]:
    if device != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def measured(
    device: str, rounds: int, sizes: Sequence[tuple[int, ...]], modes: Sequence[str], names: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """One record for every solver and latent shape: values checked, then counts, then times."""
    for case in CASES:
        for shape in sizes if not names or case.name in names else ():
            with torch.no_grad():
                error = check(case, shape, device)
                if not error < BOUND:
                    raise SystemExit(f"{case.name} at {list(shape)}: apart from diffusers by {error:.1e}: no times.")
                yield {
                    "solver": case.name,
                    "shape": list(shape),
                    "steps": case.steps,
                    "guidance": case.guidance,
                    "relative_difference": error,
                    "counts": counted(case, shape, device),
                    "times": [timed(case, shape, device, rounds, mode) for mode in modes],
                }
