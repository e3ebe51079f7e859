"""gDDIM, DDIM where diffusion is not isotropic.  Zhang, Tao and Chen 2022, 2206.05564, section 3 and appendix C.

Along the probability flow u' = Psi(t, t') u + int Psi(., t') G G^T R^-T eps/2 d tau, and by R's own equation what
stands before eps is d(Psi(tau, t') R(tau)). With eps taken as constant u' = Psi u + (R' - Psi R) eps, DDIM with
matrices; with eps as the polynomial in time through past values each has a matrix of its own. They are made once, on
the host; a step is a network call and a few products. As they mix parts, or are maps over frequencies, it is no plan.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.linear import coefficient_dtype
from fewstep.diffusion.processes import Process, apply, product
from fewstep.errors import UserError, choose
from fewstep.solvers import moments

ORDERS = (1, 2, 3)
PREDICTIONS = ("eps", "score")


@dataclasses.dataclass(frozen=True)
class Gddim:
    """A compiled sampler: `times` N + 1; `start` makes the first state of unit noise; per step what makes eps of the
    network's answer (None: it is eps), and the matrices of the state and of eps, newest first.
    """

    process: Process
    times: tuple[float, ...]
    start: Tensor
    reads: tuple[Tensor | None, ...]
    moves: tuple[tuple[Tensor, ...], ...]
    _cache: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def sample(self, network: Callable[..., Tensor], noise: Tensor, cond: Any = None) -> Tensor:
        """The state at the last time, from standard normal noise of its shape [B, n C, H, W].

        network(x, t, cond) is told the state and the process's time [B] and answers what it predicts of that shape;
        `cond` is left out where it is None. One evaluation a step.
        """
        if not isinstance(noise, Tensor) or noise.ndim != 4 or not noise.is_floating_point():
            given = f"{noise.dtype} {list(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
            raise UserError(f"noise is {given}; give a floating-point tensor [B, C, H, W] of standard normal numbers.")
        with torch.no_grad():
            process = self.process
            dtype = coefficient_dtype(noise)
            start, reads, moves = self._on(noise.device, dtype)
            parts = apply(start, process.parts(noise.to(dtype)))
            past: list[Tensor] = []
            for t, read, (keep, *weights) in zip(self.times, reads, moves):
                x = process.state(parts).to(noise.dtype)
                told = torch.full(x.shape[:1], t, dtype=dtype, device=x.device)
                answer = network(x, told) if cond is None else network(x, told, cond)
                if not isinstance(answer, Tensor) or answer.shape != x.shape:
                    said = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                    raise UserError(f"the network answered {said} to a state {list(x.shape)}; they must be alike.")
                found = process.parts(answer.to(dtype))
                past = [found if read is None else apply(read, found), *past][: len(ORDERS)]
                parts = apply(keep, parts)
                for weight, eps in zip(weights, past):
                    parts = parts + apply(weight, eps)
            return process.state(parts).to(noise.dtype)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Any]:
        """The matrices on a device."""
        if (device, dtype) not in self._cache:
            reads = [None if read is None else read.to(device, dtype) for read in self.reads]
            moves = [[matrix.to(device, dtype) for matrix in move] for move in self.moves]
            self._cache[device, dtype] = self.start.to(device, dtype), reads, moves
        found: tuple[Any, Any, Any] = self._cache[device, dtype]
        return found


def gddim(process: Process, times: Sequence[float], *, order: int = 1, prediction: str = "eps") -> Gddim:
    """Compiles the sampler that visits `times`, which fall from the noise to 0 or above, one evaluation a step.

    order: 1 to 3, reached by a warm-up of orders 1, 2, ... prediction: what the network answers, the paper's "eps" =
    -R^T score, or "score" itself. Exact for a point mass in any steps of any order.
    """
    if type(order) is not int or order not in ORDERS:
        raise UserError(f"gDDIM got order={order!r}; choose one of: {', '.join(map(str, ORDERS))}.")
    if prediction not in PREDICTIONS:
        raise choose("prediction of gDDIM,", prediction, PREDICTIONS)
    laid = tuple(float(t) for t in times)
    falling = all(before > after for before, after in itertools.pairwise(laid))
    if len(laid) < 2 or not falling or not 0.0 <= laid[-1] < laid[0] <= process.last_time:
        raise UserError(
            f"gDDIM got the times {list(laid)}; give 2 or more that fall, from at most {process.last_time:g} to 0 or "
            "above."
        )
    moves, reads = [], []
    for step, (t, s) in enumerate(itertools.pairwise(laid)):
        nodes = [laid[step - j] for j in range(min(order, step + 1))]
        moves.append((process.transition(t, s), *_weights(process, nodes, s)))
        reads.append(None if prediction == "eps" else -process.root(t).transpose(0, 1))
    if not all(bool(matrix.isfinite().all()) for move in moves for matrix in move):
        raise UserError(
            f"gDDIM has no finite coefficients from t={laid[0]!r}, where nothing is left of the picture; start below "
            "it."
        )
    return Gddim(process, laid, process.root(laid[0]), tuple(reads), tuple(moves))


def _weights(process: Process, nodes: Sequence[float], s: float) -> list[Tensor]:
    """The matrix of each node's eps (the first is at t): int L_j(u) dM, M(tau) = Psi(tau, s) R(tau), from t to s.

    u is the way gone in time, and int u^k dM = M(s) - k int u^(k-1) M du. Gauss's rule runs over sqrt(1 - u), in which
    M is smooth down to tau = 0.
    """
    t = nodes[0]

    def carried(tau: float) -> Tensor:
        return product(process.transition(tau, s), process.root(tau))

    end = process.root(s)
    powers = [end - carried(t), *(end for _ in nodes[1:])]
    if len(nodes) > 1:
        for point, part in zip(*moments.gauss_legendre(16)):
            left = 0.5 * (1.0 + point)
            gone = 1.0 - left * left
            here = carried(t + (s - t) * gone)
            for k in range(1, len(nodes)):
                powers[k] = powers[k] - k * gone ** (k - 1) * part * left * here
    found = []
    for polynomial in moments.basis([(node - t) / (s - t) for node in nodes]):
        found.append(sum((c * power for c, power in zip(polynomial, powers)), torch.zeros_like(end)))
    return found
