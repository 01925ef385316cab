"""The trace-norm ball {W : sum of singular values <= radius}, the convex hull of the rank-one matrices of that norm."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

Matrix = NDArray[numpy.float64]


def diameter(radius: float) -> float:
    """Diameter of the ball in the Frobenius norm: between radius * u v^T and its opposite."""
    return 2.0 * radius


def trace_norm(matrix: Matrix) -> float:
    """Sum of the singular values of (d, k)."""
    return float(numpy.linalg.svd(matrix, compute_uv=False).sum())


def oracle(gradient: Matrix, radius: float) -> Matrix:
    """Linear oracle: argmin over the ball of <V, gradient>. (d, k) -> (d, k) of rank one, -radius * u1 v1^T: what an idealised
    link is. At this size by the whole SVD; Lanczos finds u1 and v1 of a large gradient."""
    u, _, vt = numpy.linalg.svd(gradient, full_matrices=False)
    return -radius * numpy.outer(u[:, 0], vt[0])


def gap(gradient: Matrix, weight: Matrix, radius: float) -> float:
    """Frank-Wolfe gap at a weight (d, k) of the ball: max over V in the ball of <gradient, W - V>. Never negative there, and zero
    only where the weight is stationary. It is <gradient, W> + radius * sigma1, the dual norm's value at the oracle's answer."""
    return float(numpy.vdot(gradient, weight)) + radius * float(numpy.linalg.norm(gradient, 2))


def printed_gap(gradient: Matrix, weight: Matrix, radius: float) -> float:
    """The gap with the paper's sign: max over V in the ball of <gradient, V - W>: how fast the loss could rise, not fall."""
    return -float(numpy.vdot(gradient, weight)) + radius * float(numpy.linalg.norm(gradient, 2))
