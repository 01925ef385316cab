"""RAC-LoRA's counter-example (arXiv 2410.08305): chains of rank one under plain gradient descent on a quadratic of nine unknowns.

f(W) = sum_ij Q_ij (W_ij - T_ij)^2 / 2 for 3 x 3 matrices, Q in [0.2, 1]: its gradient is Lipschitz with L = max Q = 1, and its
minimum is 0. All arrays have a leading axis of seeds, whose chains run side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Matrices = NDArray[numpy.float64]
"""(seeds, rows, columns)"""

SIDE = 3
KINDS = ("lora", "cola", "one-draw", "rac-lora")
"""One link that trains A and B; a chain of them, each with a fresh A; A drawn once and frozen; a fresh frozen A for each link."""


@dataclass(frozen=True)
class Quadratic:
    """The loss above, of each seed its own."""

    curvature: Matrices
    target: Matrices

    def loss(self, weight: Matrices) -> NDArray[numpy.float64]:
        """(seeds,)"""
        return (self.curvature * (weight - self.target) ** 2).sum(axis=(1, 2)) / 2

    def gradient(self, weight: Matrices) -> Matrices:
        return self.curvature * (weight - self.target)


def quadratic(seed: int, seeds: int, scale: float) -> Quadratic:
    """Problems whose solutions have entries of standard deviation `scale`: it changes nothing about L."""
    random = numpy.random.default_rng(seed)
    curvature = random.uniform(0.2, 1.0, (seeds, SIDE, SIDE))
    curvature /= curvature.max(axis=(1, 2), keepdims=True)  # L = 1
    return Quadratic(curvature, scale * random.normal(size=(seeds, SIDE, SIDE)))


def losses_by_link(
    problem: Quadratic, kind: str, step: float, links: int, steps_per_link: int, seed: int
) -> NDArray[numpy.float64]:
    """Train a chain from W = 0 by gradient descent of the given step (as a share of 1 / L). Returns (links + 1, seeds): the loss
    before the first link and after each; infinite where it has left the numbers. LoRA's only link has the steps of them all."""
    assert kind in KINDS, kind
    random = numpy.random.default_rng(seed)
    seeds = len(problem.target)
    weight = numpy.zeros((seeds, SIDE, SIDE))
    losses = [problem.loss(weight)]
    B, A = _fresh(random, seeds)
    with numpy.errstate(over="ignore", invalid="ignore"):
        for link in range(links):
            if link and kind in ("cola", "rac-lora"):
                B, A = _fresh(random, seeds)
            elif link and kind == "one-draw":
                B = numpy.zeros_like(B)
            B, A = _tune(problem, weight, B, A, step, steps_per_link, trains_A=kind in ("lora", "cola"))
            here = weight + B @ A
            losses.append(problem.loss(here))
            if kind != "lora":
                weight = here  # tie a knot
    return numpy.where(numpy.isfinite(losses), losses, numpy.inf)


def _fresh(random: numpy.random.Generator, seeds: int) -> tuple[Matrices, Matrices]:
    """B (seeds, rows, 1) of zeros, and A (seeds, 1, columns), Gaussian, a row's squared length one in the mean."""
    return numpy.zeros((seeds, SIDE, 1)), random.normal(size=(seeds, 1, SIDE)) / numpy.sqrt(SIDE)


def _tune(
    problem: Quadratic, weight: Matrices, B: Matrices, A: Matrices, step: float, count: int, trains_A: bool
) -> tuple[Matrices, Matrices]:
    """Gradient descent on B and A; or on B alone, preconditioned by (A A^T)^-1: W moves by its gradient's projection onto A's row
    space then, and the loss is L-smooth along it, however long A is."""
    metric = 1.0 if trains_A else 1 / (A @ A.transpose(0, 2, 1))
    for _ in range(count):
        gradient = problem.gradient(weight + B @ A)
        moved_A = A - step * (B.transpose(0, 2, 1) @ gradient) if trains_A else A
        B = B - step * (gradient @ A.transpose(0, 2, 1)) * metric
        A = moved_A
    return B, A
