"""Losses over the trace-norm ball whose constants are computed, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from cola_ds.theory.ball import Matrix, diameter, trace_norm

Curve = Callable[[NDArray[numpy.float64]], NDArray[numpy.float64]]
ROWS, COLUMNS, MEASUREMENTS = 12, 8, 400


@dataclass(frozen=True)
class Problem:
    """A smooth loss on (d, k) matrices, over the ball of `radius`."""

    name: str
    loss: Callable[[Matrix], float]
    gradient: Callable[[Matrix, NDArray[numpy.int64] | None], Matrix]
    """Of the loss, or of its part on the given rows of data, which is unbiased for rows drawn evenly."""
    start: Matrix
    """W_1, in the ball."""
    radius: float
    beta: float
    """The gradient's Lipschitz constant on the ball, in the Frobenius norm."""
    M: float
    """At least |loss| everywhere in the ball."""
    floor: float
    """At most the loss's minimum over the ball."""
    rows_of_data: int = 0

    @property
    def D(self) -> float:
        return diameter(self.radius)


def least_squares(seed: int) -> Problem:
    """Convex: the mean of half the squared residuals of noisy linear measurements of a rank-3 matrix on the ball's boundary."""
    inputs, labels, target = _measure(seed, size=0.25, wrong=0.0)
    beta = _largest_eigenvalue(inputs)
    radius = trace_norm(target)
    # |<A_i, W>| has root mean square <= sqrt(beta) * ||W||_F, and ||W||_F <= radius
    most = 0.5 * (numpy.sqrt(beta) * radius + numpy.sqrt(numpy.mean(labels**2))) ** 2
    return _measured("least-squares", inputs, labels, radius, beta, float(most), lambda z: z**2 / 2, lambda z: z)


def robust_sensing(seed: int) -> Problem:
    """Not convex: the mean of Welsch's loss 1 - exp(-z^2 / 2), bounded by 1, over measurements of which a fifth are wrong. Its
    second derivative (1 - z^2) exp(-z^2 / 2) lies in [-2 exp(-3/2), 1], so that beta is that of least squares. The ball is so
    small that eta T, how far the steps lead in all, is 1.3 at T = 16 and 10 at T = 1024: in a large one no rate shows yet."""
    inputs, labels, target = _measure(seed, size=0.05, wrong=0.2)
    beta = _largest_eigenvalue(inputs)
    return _measured(
        "robust-sensing", inputs, labels, trace_norm(target), beta, 1.0,
        lambda z: 1 - numpy.exp(-(z**2) / 2), lambda z: z * numpy.exp(-(z**2) / 2),
    )  # fmt: skip


def steep() -> Problem:
    """The instance on which printed inequalities fail: 1 x 1 matrices, the ball being [-1/2, 1/2], so that D = 1; with
    x = W + 1/2 the loss is 1 - (5/2) x + x^2 / 2. beta = 1; it falls from 1 at W_1 = -1/2 to -1 at 1/2, so that M = 1."""

    def loss(weight: Matrix) -> float:
        x = float(weight[0, 0]) + 0.5
        return 1 - 2.5 * x + x**2 / 2

    def gradient(weight: Matrix, _: NDArray[numpy.int64] | None = None) -> Matrix:
        return weight + 0.5 - 2.5

    return Problem("steep", loss, gradient, numpy.full((1, 1), -0.5), radius=0.5, beta=1.0, M=1.0, floor=-1.0)


def _measure(seed: int, size: float, wrong: float) -> tuple[Matrix, NDArray[numpy.float64], Matrix]:
    """Inputs (n, d * k), labels (n,), and the matrix (d, k) of rank 3 that they measure. Some labels may be wrong."""
    random = numpy.random.default_rng(seed)
    target = size * random.normal(size=(ROWS, 3)) @ random.normal(size=(3, COLUMNS))
    inputs = random.normal(size=(MEASUREMENTS, ROWS * COLUMNS))
    labels = inputs @ target.ravel() + 0.3 * random.normal(size=MEASUREMENTS)
    labels += (random.random(MEASUREMENTS) < wrong) * random.normal(0.0, 5.0, MEASUREMENTS)
    return inputs, labels, target


def _largest_eigenvalue(inputs: Matrix) -> float:
    """Of inputs^T inputs / n: the curvature of the mean of half squares in its steepest direction."""
    return float(numpy.linalg.norm(inputs, 2) ** 2 / len(inputs))


def _measured(
    name: str,
    inputs: Matrix,
    labels: NDArray[numpy.float64],
    radius: float,
    beta: float,
    most: float,
    curve: Curve,
    slope: Curve,
) -> Problem:
    """The mean over measurements of curve(<A_i, W> - y_i), begun at W_1 = 0. The curve is not negative."""

    def loss(weight: Matrix) -> float:
        return float(numpy.mean(curve(inputs @ weight.ravel() - labels)))

    def gradient(weight: Matrix, rows: NDArray[numpy.int64] | None = None) -> Matrix:
        x, y = (inputs, labels) if rows is None else (inputs[rows], labels[rows])
        return (slope(x @ weight.ravel() - y) @ x / len(y)).reshape(weight.shape)

    start = numpy.zeros((ROWS, COLUMNS))
    return Problem(name, loss, gradient, start, radius, beta, M=most, floor=0.0, rows_of_data=len(labels))
