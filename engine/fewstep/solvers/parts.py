"""What stands between a stage's network and its map: guidance by inner products, bounds on the clean estimate, and
noise shaped by the network. Everything stays on the device.

| kind | outputs of inputs |
|---|---|
| map | matrix @ inputs |
| a name of `gram_guidance.WEIGHTS` | per-sample weights of the inputs, from one pass over them |
| clamp | clamp(D, -most, most) |
| threshold | clamp(D, -s, s)/s, s a quantile of abs(D) (2205.11487, section 2.3) |
| learned_range | noise times e^(v log large + (1 - v) log small), v = (variance + 1)/2 (2102.09672, eq. 15) |
| learned | noise times sqrt(variance) |
| second_moment | noise times sqrt(base + gain max(h - eps^2, 0)), h the network's E[eps^2] (2206.07309, SN-DPM) |
| residual | noise times sqrt(base + gain max(h, 0)), h its E[(eps - eps_hat)^2] (2206.07309, NPR-DPM) |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.gram_guidance import WEIGHTS
from fewstep.errors import choose
from fewstep.solvers.plans import Part
from fewstep_kernels import lincomb, threshold


def clamp(x: Tensor, most: float) -> Tensor:
    return x.clamp(-most, most)


def learned_range(noise: Tensor, variance: Tensor, small: float, large: float) -> Tensor:
    """`small`, `large`: standard deviations of the posterior given x0 and of the forward step."""
    low, high = math.log(max(small, 1e-10)), math.log(large)
    return noise * (variance.to(noise.dtype) * (0.5 * (high - low))).add_(0.5 * (high + low)).exp_()


def learned(noise: Tensor, variance: Tensor) -> Tensor:
    return noise * variance.to(noise.dtype).clamp(min=0.0).sqrt()


def second_moment(noise: Tensor, eps: Tensor, moment: Tensor, base: float, gain: float) -> Tensor:
    return residual(noise, moment - eps * eps, base, gain)


def residual(noise: Tensor, moment: Tensor, base: float, gain: float) -> Tensor:
    return noise * torch.sqrt(base + gain * moment.clamp(min=0.0))


_POINTWISE: dict[str, Callable[..., Tensor]] = {
    "clamp": clamp,
    "threshold": threshold,
    "learned_range": learned_range,
    "learned": learned,
    "second_moment": second_moment,
    "residual": residual,
}
KINDS = ("map", *WEIGHTS, *_POINTWISE)


def run(
    part: Part, inputs: Sequence[Tensor], matrix: Tensor | None, out: Sequence[Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The part's outputs, in `out` where it is given and the part is a combination, else new ones of `dtype`.

    matrix: the part's own on the device, for "map".
    """
    options: Mapping[str, Any] = dict(part.options)
    if part.kind in _POINTWISE:
        return (_POINTWISE[part.kind](*inputs, **options),)
    if part.kind != "map" and part.kind not in WEIGHTS:
        raise choose("part of a stage", part.kind, KINDS)
    weights = matrix if part.kind == "map" else WEIGHTS[part.kind](inputs, **options)
    assert weights is not None
    return lincomb(inputs, weights, out=out, dtypes=None if out else [dtype] * len(part.outputs))
