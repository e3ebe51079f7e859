"""Guidance and normalisation whose coefficients depend on the data through per-sample sums alone.

Each is one reduction (`gram`: inner products, sums, absolute sums), a few operations on [B] numbers that stay on the
device, and one `lincomb`: nothing of an image's size is written but the answer, and the host waits for nothing. All
tensors are [B, ...], all functions differentiable, and the guidance scale w means `uncond + w (cond - uncond)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep_kernels import gram, lincomb

_TINY = torch.finfo(torch.float32).tiny
Scale = float | Tensor


def _table(rows: Sequence[Sequence[Scale]], like: Tensor) -> Tensor:
    """Per-sample coefficients [B, M, K] from rows of numbers and tensors [B]; like: any [B] tensor of the reduction."""
    columns = [[c.expand_as(like) if isinstance(c, Tensor) else torch.full_like(like, c) for c in row] for row in rows]
    return torch.stack([torch.stack(row, -1) for row in columns], -2)


def rescaled_weights(inputs: Sequence[Tensor], *, guidance: Scale, rescale: float = 0.7) -> Tensor:
    """Weights [B, 1, 2] of (cond, uncond): guidance whose answer keeps the conditional output's standard deviation.

    g = uncond + w (cond - uncond); g (phi std(cond) / std(g) + 1 - phi) with phi = rescale (arXiv:2305.08891, eq. 14
    to 16). std(g) follows from the moments of cond and of cond - uncond: g itself is never formed twice.
    """
    found = gram(inputs, [(1, 0), (1, -1)])
    count = math.prod(inputs[0].shape[1:])
    covariance = found.products - found.sums[:, :, None] * found.sums[:, None, :] / count  # times the elements
    more = guidance - 1.0
    of_cond = covariance[:, 0, 0]
    of_guided = of_cond + 2 * more * covariance[:, 0, 1] + more * more * covariance[:, 1, 1]
    ratio = torch.sqrt((of_cond / of_guided.clamp(min=_TINY)).clamp(min=_TINY))
    factor = rescale * ratio + (1 - rescale)
    return _table([(factor * guidance, factor * (1.0 - guidance))], factor)


def projected_weights(
    inputs: Sequence[Tensor],
    *,
    guidance: Scale,
    parallel: float = 0.0,
    radius: float | None = None,
    momentum: float = 0.0,
    base: str = "cond",
) -> Tensor:
    """Adaptive projected guidance (arXiv:2410.02416, Algorithm 1): weights [B, 1, K], or [B, 2, K] with momentum.

    inputs: cond, uncond and, with momentum, the running difference so far if there is one; the second row is then the
    running difference to keep. d = cond - uncond + momentum running; d <- d min(1, radius / |d|); of its part along
    cond, <d, cond> cond / |cond|^2, the share `parallel` (the paper's eta) is kept; guided = cond + (w - 1) d. With
    base="uncond" it is uncond + w d, the form diffusers calls its own.
    """
    if base not in ("cond", "uncond"):
        raise UserError(f"projected guidance starts from base {base!r}; it must be 'cond' or 'uncond'.")
    of_difference = (1.0, -1.0, momentum)[: len(inputs)]
    found = gram(inputs, [(1.0, 0.0, 0.0)[: len(inputs)], of_difference]).products
    squared_cond, along, squared = found[:, 0, 0], found[:, 0, 1], found[:, 1, 1]
    scale = torch.ones_like(squared)
    if radius is not None:
        scale = (radius / torch.sqrt(squared.clamp(min=_TINY))).clamp(max=1.0)
    weight = scale * (guidance - 1.0 if base == "cond" else guidance)
    share = weight * (1.0 - parallel) * along / squared_cond.clamp(min=_TINY)
    guided = [weight * c for c in of_difference]
    guided[0] = guided[0] - share
    start = 0 if base == "cond" else 1
    guided[start] = guided[start] + 1.0
    return _table([guided, of_difference] if momentum != 0.0 else [guided], squared)


def perpendicular_weights(inputs: Sequence[Tensor], *, guidance: Scale, weights_of: Sequence[Scale]) -> Tensor:
    """Weights [B, 1, 2 + N] of (positive, uncond, negatives): away from negative conditions only where they do not
    oppose the positive one (arXiv:2304.04968).

    uncond + w (p - sum_i weights_i (n_i - <n_i, p> p / |p|^2)) with p = positive - uncond, n_i = negatives_i - uncond.
    At most four negatives.
    """
    size = len(inputs)
    if len(weights_of) != size - 2 or not 3 <= size <= 6:
        raise UserError(
            f"perpendicular guidance takes one to four negatives and a weight for each; got {size - 2} negatives "
            f"and {len(weights_of)} weights."
        )
    differences = [tuple(float(k == j) - float(k == 1) for k in range(size)) for j in range(size) if j != 1]
    found = gram(inputs, differences).products
    squared = found[:, 0, 0].clamp(min=_TINY)
    of_positive: Scale = 1.0
    for i, weight in enumerate(weights_of, 1):
        of_positive = of_positive + weight * found[:, 0, i] / squared
    columns = [guidance * of_positive, *(-(guidance * weight) + 0 * squared for weight in weights_of)]
    of_uncond = 1.0 - sum(columns[1:], columns[0])
    return _table([(columns[0], of_uncond, *columns[1:])], squared)


def zero_star_weights(inputs: Sequence[Tensor], *, guidance: Scale) -> Tensor:
    """Weights [B, 1, 2] of CFG-Zero* (arXiv:2503.18886): w cond + (1 - w) a uncond, a = <cond, uncond> / |uncond|^2."""
    found = gram(inputs).products
    share = found[:, 0, 1] / (found[:, 1, 1] + 1e-8)
    return _table([(guidance, (1.0 - guidance) * share)], share)


def magnitude_weights(inputs: Sequence[Tensor], *, guidance: Scale, decay: float = 8.0) -> Tensor:
    """Weights [B, 1, 2] of MAMBO-G (arXiv:2508.03442).

    Guidance of scale 1 + (w - 1) e^(-decay |cond - uncond| / |uncond|).
    """
    found = gram(inputs, [(1, -1), (0, 1)]).products
    size = torch.sqrt((found[:, 0, 0] / found[:, 1, 1].clamp(min=_TINY)).clamp(min=_TINY))
    scale = 1.0 + (guidance - 1.0) * torch.exp(-decay * size)
    return _table([(scale, 1.0 - scale)], scale)


def tangential_weights(inputs: Sequence[Tensor], *, guidance: Scale) -> Tensor:
    """Weights [B, 1, 2] of TCFG (arXiv:2503.18137): uncond is replaced by its part along the first right singular
    vector of [cond; uncond].

    With G their Gram matrix, of eigenvalues l1 >= l2, that part is row 2 of (G - l2)/(l1 - l2) times the outputs.
    """
    found = gram(inputs).products
    half = 0.5 * (found[:, 1, 1] - found[:, 0, 0])
    across = found[:, 0, 1]
    radius = torch.sqrt((half * half + across * across).clamp(min=_TINY))  # (l1 - l2)/2
    # radius + half where half is negative, without cancellation
    own = torch.where(half < 0, across * across / (radius - half), radius + half) / (2 * radius)
    of_cond = across / (2 * radius)
    rest = 1.0 - guidance
    return _table([(guidance + rest * of_cond, rest * own)], own)


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "rescale": rescaled_weights,
    "apg": projected_weights,
    "perp_neg": perpendicular_weights,
    "cfg_zero_star": zero_star_weights,
    "mambo_g": magnitude_weights,
    "tcfg": tangential_weights,
}


def rescaled(cond: Tensor, uncond: Tensor, guidance: Scale, rescale: float = 0.7) -> Tensor:
    """The guided output of `rescaled_weights`."""
    return lincomb([cond, uncond], rescaled_weights([cond, uncond], guidance=guidance, rescale=rescale))[0]


def projected(
    cond: Tensor,
    uncond: Tensor,
    guidance: Scale,
    *,
    parallel: float = 0.0,
    radius: float | None = None,
    momentum: float = 0.0,
    previous: Tensor | None = None,
    base: str = "cond",
) -> tuple[Tensor, Tensor | None]:
    """The guided output of `projected_weights` and the running difference to keep; None without momentum."""
    keeps = momentum != 0.0
    inputs = [cond, uncond, *([previous] if keeps and previous is not None else [])]
    weights = projected_weights(
        inputs, guidance=guidance, parallel=parallel, radius=radius, momentum=momentum, base=base
    )
    answer = lincomb(inputs, weights)
    return answer[0], answer[1] if keeps else None


def perpendicular(
    positive: Tensor, uncond: Tensor, negatives: Sequence[Tensor], guidance: Scale, weights: Sequence[Scale]
) -> Tensor:
    """The guided output of `perpendicular_weights`."""
    inputs = [positive, uncond, *negatives]
    return lincomb(inputs, perpendicular_weights(inputs, guidance=guidance, weights_of=weights))[0]


def normalised_direction(x: Tensor, fake: Tensor, real: Tensor, least: float = 0.0) -> Tensor:
    """h = (D_fake - D) / max(mean |x - D|, least), DMD's direction (arXiv:2311.18828, equations 7 and 8).

    x: the student's samples; fake, real: the critic's and the teacher's clean estimates. 0 where the normaliser is 0.
    SiD takes least = 1e-5 (arXiv:2404.04057).
    """
    size = gram([x, real], [(1, -1)]).absolutes[:, 0] / math.prod(x.shape[1:])
    size = size.clamp(min=least)
    scale = torch.where(size > 0, 1 / size.clamp(min=_TINY), torch.zeros_like(size))
    return lincomb([fake, real], _table([(scale, -scale)], scale))[0]


def normalised_tangent(tangent: Tensor, c: float = 0.1, mean: bool = False) -> Tensor:
    """g / (|g| + c), sCM's tangent normalisation (arXiv:2410.11081, section 4.1).

    |g| is the norm of the whole sample; with mean=True the root of the mean square, so that c does not depend on the
    number of elements.
    """
    squared = gram([tangent]).products[:, 0, 0]
    if mean:
        squared = squared / math.prod(tangent.shape[1:])
    scale = 1 / (torch.sqrt(squared.clamp(min=_TINY)) + c)
    return lincomb([tangent], scale[:, None, None])[0]


def step_error(high: Tensor, low: Tensor, previous: Tensor, absolute: float = 0.0078, relative: float = 0.05) -> Tensor:
    """How far a step of two orders is from its tolerance, per sample [B]; at most 1 is within.

    |high - low| / (absolute sqrt(N) + relative max(|low|, |previous|)), with norms of whole samples. (Gotta Go Fast,
    arXiv:2105.14080, takes the maximum element by element: that is `l2(high, low, delta**-2).sqrt()`.)
    """
    squared = gram([high, low, previous], [(1, -1, 0), (0, 1, 0), (0, 0, 1)]).products.diagonal(dim1=1, dim2=2)
    error, *sizes = torch.sqrt(squared.clamp(min=_TINY)).unbind(1)
    return error / (absolute * math.sqrt(math.prod(high.shape[1:])) + relative * torch.maximum(*sizes))
