"""What must run without the host waiting and inside a CUDA graph: whole sampler runs, the operators and what is
composed of them, averages and optimiser steps.

Each program has static inputs (which a graph's user refills between replays), state that a call changes, and a call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fewstep_kernels as fk
from fewstep.diffusion import gram_guidance, schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep_kernels.decay_profiles import Constant, Power

SAMPLERS = (("dpmpp_2m", 1.5), ("consistency", None), ("heun", None), ("unipc", 1.5), ("ddim", None))


@dataclasses.dataclass
class Program:
    """call() gives fresh or reused tensors from inputs and state, and may change state."""

    call: Callable[[], list[Tensor]]
    inputs: list[Tensor]
    state: list[Tensor] = dataclasses.field(default_factory=list)
    exact: bool = True  # the same kernels in the same order: a replay has the same bits

    def results(self) -> list[Tensor]:
        """Copies of what a call gives and of the state it leaves."""
        given = self.call()
        return [x.detach().clone() for x in (*given, *self.state)]

    def refill(self, seed: int) -> None:
        """New numbers in the inputs, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for x in self.inputs:
            if x.is_floating_point():
                x.detach().copy_(torch.randn(x.shape, generator=generator))
            else:
                x.copy_(torch.randint(0, 10, x.shape, generator=generator))

    def saved(self) -> list[Tensor]:
        return [x.detach().clone() for x in self.state]

    def restore(self, saved: list[Tensor]) -> None:
        for x, kept in zip(self.state, saved, strict=True):
            x.detach().copy_(kept)


def _denoiser(device: str, boundary: float | None) -> Denoiser:
    from fewstep import nets  # needs pydantic, which the operators do without

    torch.manual_seed(0)
    net = nets.build(
        {"name": "dit", "channels": 1, "image_size": 8, "width": 64, "depth": 2, "heads": 2, "classes": 10}
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Denoiser(net, schedules.get("edm"), Prediction("edm", sigma_data=0.5, boundary=boundary)).to(device)


def sampler(name: str, guidance: float | None, device: str) -> Program:
    from fewstep import solvers

    denoiser = _denoiser(device, 0.002 if name == "consistency" else None)
    plan = solvers.plan(name, denoiser.schedule, 4, prediction=denoiser.prediction, guidance=guidance)
    noise = torch.randn(4, 1, 8, 8, device=device)
    labels, seeds = (torch.arange(4, device=device) for _ in range(2))

    def call() -> list[Tensor]:
        return [solvers.sample(denoiser, plan, noise, cond=labels, seeds=seeds)]

    return Program(call, [noise, labels, seeds], exact=False)


def _tensors(device: str, count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 8, 16, 16, device=device) for _ in range(count)]


def maps(device: str) -> Program:
    x, y, z = _tensors(device, 3)
    out = [torch.empty_like(x), torch.empty_like(x)]
    tables = torch.randn(2, 3, device=device), torch.randn(4, 1, 3, device=device)
    seeds = torch.arange(4, device=device)

    def call() -> list[Tensor]:
        fk.lincomb([x, y, z], tables[0], out=out)
        return [*out, *fk.lincomb([x, y], tables[1], noise_seeds=seeds), fk.normal(seeds, (5, 7), stream=1)]

    return Program(call, [x, y, z, seeds])


def compositions(device: str) -> Program:
    a, b, c = inputs = _tensors(device, 3)

    def call() -> list[Tensor]:
        return [
            gram_guidance.rescaled(a, b, 7.5),
            gram_guidance.projected(a, b, 7.5, radius=15.0)[0],
            gram_guidance.perpendicular(a, b, [c], 7.5, [1.0]),
            gram_guidance.normalised_direction(a, b, c),
            gram_guidance.normalised_tangent(a),
            gram_guidance.step_error(a, b, c),
            fk.threshold(a, 0.9, least=0.1),
        ]

    return Program(call, inputs)


def distances(device: str) -> Program:
    a, b = (x.requires_grad_() for x in _tensors(device, 2))

    def call() -> list[Tensor]:
        total = fk.l2(a, b) + fk.pseudo_huber(a, b, c=0.3) + fk.pseudo_huber_elementwise(a, b, c=0.3) + fk.l1(a, b)
        return [total, *torch.autograd.grad(total.sum(), (a, b))]

    return Program(call, [a, b])


def normalisations(device: str) -> Program:
    (x,) = (x.requires_grad_() for x in _tensors(device, 1))
    scale, wide = torch.randn(4, 8, device=device), torch.randn(4, 16, device=device)

    def call() -> list[Tensor]:
        values = fk.group_norm_silu(x, 2, scale=scale), fk.layer_norm_modulate(x, wide, wide)
        total = sum((y.square().sum() for y in (*values, fk.rms_norm_modulate(x, wide, wide))), x.new_zeros(()))
        return [*values, *torch.autograd.grad(total, (x,))]

    return Program(call, [x], exact=False)


def attention(device: str) -> Program:
    torch.manual_seed(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = [torch.randn(2, 2, 32, 40, device=device, dtype=dtype) for _ in range(6)]
    return Program(lambda: list(fk.attention_jvp(*inputs)), inputs)


def averages(device: str) -> Program:
    parameters = _tensors(device, 5)
    wide = [[x.clone() for x in parameters] for _ in range(2)]
    narrow = [x.bfloat16() for x in parameters]
    updates = torch.zeros((), dtype=torch.int64, device=device)

    def call() -> list[Tensor]:
        updates.add_(1)
        fk.ema_update(wide, parameters, [0.99, Power(6.94).at(updates + 1)])
        fk.ema_update(narrow, parameters, 0.999, seed=3, update=updates)
        return [fk.multi_tensor_l2norm(parameters)]

    return Program(call, parameters, [*wide[0], *wide[1], *narrow, updates])


def optimiser(device: str) -> Program:
    parameters = [torch.nn.Parameter(x) for x in _tensors(device, 5)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    profiles = [Constant(0.99), Power(6.94)]
    working = [p.detach().bfloat16() for p in parameters]
    made = fk.AdamWEma(parameters, lr=1e-3, profiles=profiles, working=working, max_norm=1.0)

    def call() -> list[Tensor]:
        made.step()
        assert made.norm is not None
        return [made.norm]

    call()  # makes its state
    state = [x.detach() for x in parameters] + working
    state += [x for kept in made.state.values() for x in kept.values()]
    state += [group["updates"] for group in made.param_groups]
    return Program(call, [p.grad for p in parameters if p.grad is not None], state)


def programs(device: str) -> Iterator[tuple[str, Callable[[], Program]]]:
    """(name, what makes the program)."""
    for name, guidance in SAMPLERS:
        yield f"sampler: {name}{', guided' if guidance else ''}", functools.partial(sampler, name, guidance, device)
    for make in (maps, compositions, distances, normalisations, attention, averages, optimiser):
        yield make.__name__, functools.partial(make, device)
