"""Integrals behind the exponential multistep rows, in float64 on the host.

Between two times lambda rises by h, and u in [0, 1] is the way gone. A row integrates a polynomial in u through past
estimates against h e^{-h (1 - u)} (`decaying`, clean-sample form) or h e^{h (1 - u)} (`growing`, noise form); see
2211.01095, appendix B, and 2204.13902. For the SDE of strength tau, h is (1 + tau^2) times the
rise (2309.05019, proposition 4.2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy


def decaying(h: float, count: int) -> list[float]:
    """I_k = int_0^1 h e^{-h (1 - u)} u^k du for k < count: I_0 = 1 - e^{-h}, I_k = 1 - k I_{k-1}/h."""
    if abs(h) < 1.0:
        return _series(h, count, -h)
    values = [-math.expm1(-h)]
    for k in range(1, count):
        values.append(1.0 - k * values[-1] / h)
    return values


def growing(h: float, count: int) -> list[float]:
    """J_k = int_0^1 h e^{h (1 - u)} u^k du for k < count: J_0 = e^h - 1, J_k = k J_{k-1}/h - 1."""
    if abs(h) < 1.0:
        return _series(h, count, h)
    values = [math.expm1(h)]
    for k in range(1, count):
        values.append(k * values[-1] / h - 1.0)
    return values


def _series(h: float, count: int, rate: float) -> list[float]:
    """h sum_j rate^j k!/(k + 1 + j)!: the recurrences cancel below |h| = 1."""
    values = []
    for k in range(count):
        term, total, j = 1.0 / (k + 1), 0.0, 0
        while abs(term) > 1e-18:
            total += term
            j += 1
            term *= rate / (k + 1 + j)
        values.append(h * total)
    return values


def basis(nodes: Sequence[float]) -> list[list[float]]:
    """Coefficients c[j][k] of the Lagrange polynomials L_j(u) = sum_k c[j][k] u^k, L_j(nodes[i]) = (i == j)."""
    polynomials = []
    for j, own in enumerate(nodes):
        polynomial = [1.0]
        for i, other in enumerate(nodes):
            if i != j:
                shifted, kept = [0.0, *polynomial], [*polynomial, 0.0]
                polynomial = [(a - other * b) / (own - other) for a, b in zip(shifted, kept)]
        polynomials.append(polynomial)
    return polynomials


def weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weight of each node's value when u^k integrates to moments[k]; they add up to moments[0]."""
    return [math.fsum(c * m for c, m in zip(polynomial, moments)) for polynomial in basis(nodes)]


@functools.cache
def gauss_legendre(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Points in [-1, 1] and weights."""
    points, parts = numpy.polynomial.legendre.leggauss(count)
    return tuple(points.tolist()), tuple(parts.tolist())
