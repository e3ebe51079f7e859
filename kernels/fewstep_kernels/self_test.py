"""Every operator on every backend that is here, on a few hundred numbers, against its reference in float64.

Values, and the gradients and tangents that have kernels of their own. It finds a library that was built wrongly or a
device that computes wrongly, in seconds; `fewstep doctor` shows it. The proof of the operators is their tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .adamw_ema import adamw_ema_step
from .attention_jvp import attention_jvp
from .distance import l1, l2, pseudo_huber_elementwise
from .ema import ema_update
from .gram import gram
from .group_norm_silu import group_norm_silu
from .inner_products import inner_products
from .l2norm import multi_tensor_l2norm
from .lincomb import lincomb
from .noise import normal, uniform
from .norm_modulate import layer_norm_modulate, rms_norm_modulate
from .threshold import threshold

ALLOWED = 1e-5  # of the largest value: some eighty float32 roundings, where a broken kernel errs by about 1


class Check(NamedTuple):
    """One operator on one backend: its error as a share of the largest value, and one sentence if it failed."""

    operator: str
    device: str
    backend: str
    error: float
    problem: str


class _Draw:
    """Standard normal tensors, the same float32 numbers whatever dtype and device they come in."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return drawn.float().to(self.device, self.dtype)

    def seeds(self) -> Tensor:
        return torch.tensor([3, 2**40 + 1, -7], device=self.device)


def _differentiated(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The value and every gradient."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    with torch.enable_grad():
        value = function(*leaves)
        gradients = torch.autograd.grad(value.square().sum(), leaves)
    return [value.detach(), *gradients]


def _carried(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The tangent along cosines of the tensors."""
    return [torch.func.jvp(function, tensors, tuple(x.cos() for x in tensors))[1]]


def _lincomb(draw: _Draw) -> list[Tensor]:
    inputs = [draw(3, 63) for _ in range(3)]
    return list(lincomb(inputs, draw(3, 2, 4), noise_seeds=draw.seeds(), noise_stream=1))


def _gram(draw: _Draw) -> list[Tensor]:
    return list(gram([draw(3, 500), draw(3, 500)], [(1.0, 0.0), (1.0, -1.0)]))


def _distance(draw: _Draw) -> list[Tensor]:
    a, b, weight = draw(3, 63), draw(3, 63), draw(3, 63)

    def weighted(a: Tensor, b: Tensor) -> Tensor:
        return pseudo_huber_elementwise(a, b, weight, c=0.3)

    return [l1(a, b), *_differentiated(l2, a, b), *_differentiated(weighted, a, b), *_carried(l2, a, b)]


def _ema_update(draw: _Draw) -> list[Tensor]:
    profiles = [[draw(63), draw(5, 7)] for _ in range(2)]
    ema_update(profiles, [draw(63), draw(5, 7)], [0.9, 0.999])
    return [x for profile in profiles for x in profile]


def _adamw_ema_step(draw: _Draw) -> list[Tensor]:
    parameters, gradients, means, averages = ([draw(63), draw(5, 7)] for _ in range(4))
    squares = [draw(63).square(), draw(5, 7).square()]
    steps = [torch.full((), 4.0, device=draw.device) for _ in parameters]
    adamw_ema_step(
        parameters, gradients, means, squares, steps, lr=0.1, weight_decay=0.1, averages=[averages], decays=[0.9]
    )
    return [*parameters, *means, *squares, *averages]


def _group_norm_silu(draw: _Draw) -> list[Tensor]:
    def function(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, added: Tensor) -> Tensor:
        return group_norm_silu(x, 2, weight, scale=scale, shift=shift, input_shift=added)

    tensors = (draw(2, 6, 5, 7), draw(6), draw(2, 6), draw(2, 6), draw(2, 6))
    last = (tensors[0].to(memory_format=torch.channels_last), *tensors[1:])
    return [*_differentiated(function, *tensors), *_differentiated(function, *last), *_carried(function, *tensors)]


def _rows(operator: Callable[..., Tensor]) -> Callable[[_Draw], list[Tensor]]:
    def check(draw: _Draw) -> list[Tensor]:
        tensors = (draw(2, 5, 63), draw(2, 63), draw(2, 63), draw(63))
        return [*_differentiated(operator, *tensors), *_carried(operator, *tensors)]

    return check


def _attention_jvp(draw: _Draw) -> list[Tensor]:
    primals, tangents = ([draw(1, 4, 70, 24), draw(1, 2, 101, 24), draw(1, 2, 101, 24)] for _ in range(2))
    return [*attention_jvp(*primals, *tangents), *attention_jvp(*primals, *tangents, causal=True)]


CHECKS: dict[str, Callable[[_Draw], list[Tensor]]] = {
    "lincomb": _lincomb,
    "normal": lambda draw: [normal(draw.seeds(), (63,), stream=2, dtype=draw.dtype)],
    "uniform": lambda draw: [uniform(draw.seeds(), (63,), stream=2, dtype=draw.dtype)],
    "gram": _gram,
    "inner_products": lambda draw: [inner_products([draw(3, 500)], [draw(3, 500), draw(3, 500)])],
    "distance": _distance,
    "threshold": lambda draw: [threshold(3 * draw(3, 500), 0.9)],
    "ema_update": _ema_update,
    "multi_tensor_l2norm": lambda draw: [multi_tensor_l2norm([draw(63), draw(9001)])],
    "adamw_ema_step": _adamw_ema_step,
    "attention_jvp": _attention_jvp,
    "group_norm_silu": _group_norm_silu,
    "layer_norm_modulate": _rows(layer_norm_modulate),
    "rms_norm_modulate": _rows(rms_norm_modulate),
}


def _here() -> Iterator[tuple[str, str]]:
    """(device, backend) pairs of this machine."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for backend in backends.CHOICES:
            if backend == "reference" or backends.runs_on(backend, device):
                yield device, backend


def _check(operator: str, device: str, backend: str, truth: list[Tensor]) -> Check:
    advice = "install fewstep again, or set FEWSTEP_KERNELS=reference to do without it"
    try:
        with backends.asking(backend):
            found = CHECKS[operator](_Draw(torch.float32, device))
    except Exception as raised:  # whatever goes wrong in a library, a compiler or a driver is the answer
        words = (str(raised).strip().splitlines() or [""])[0]
        problem = f"{operator} by {backend} on {device} raised {type(raised).__name__}: {words} ({advice})."
        return Check(operator, device, backend, float("nan"), problem)
    pairs = zip(found, truth, strict=True)
    errors = [((x.cpu().double() - y).abs().max() / y.abs().max()).item() for x, y in pairs]
    wrong = [error for error in errors if not error <= ALLOWED]  # NaN is wrong too
    error = wrong[0] if wrong else max(errors)
    problem = f"{operator} by {backend} on {device} errs by {error:.1e} of the largest value, {ALLOWED:.0e} is allowed"
    return Check(operator, device, backend, error, f"{problem}: {advice}." if wrong else "")


def self_test() -> list[Check]:
    """Check every operator of `backends.OPERATORS` on every backend and device that is here; raises nothing.

    A second or two on a CPU. The first time on a GPU Triton also compiles some thirty kernels, which it then keeps.
    """
    checks = []
    for operator, compute in CHECKS.items():
        with backends.asking("reference"):
            truth = compute(_Draw(torch.float64, "cpu"))
        for device, backend in _here():
            if backend == "reference" or backend in backends.OPERATORS[operator]:
                checks.append(_check(operator, device, backend, truth))
    return checks
