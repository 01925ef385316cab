"""Algorithm 2 of the paper, idealised COLA, and what bounds its Frank-Wolfe gap (launch/theory/README.md has the proof)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from cola_ds.theory.ball import Matrix, gap, oracle, printed_gap
from cola_ds.theory.problems import Problem


@dataclass(frozen=True)
class Trace:
    """What a run of Algorithm 2 leaves: a value for each of its T steps, of the weight before the step."""

    gaps: NDArray[numpy.float64]
    printed_gaps: NDArray[numpy.float64]
    errors: NDArray[numpy.float64]
    """epsilon_t: by how much the answer to a stochastic gradient misses the oracle's minimum for the true one."""
    weight: Matrix
    """W_{T+1}."""


def step_size(problem: Problem, steps: int, factor: float = 1.0) -> float:
    """The step factor * sqrt(M) / (D sqrt(beta T)). Theorem 4.1's factor is 1, with which the constant that it prints does not
    hold; with 2 that constant does. At most 1 where T >= factor^2 M / (beta D^2): a convex combination only then."""
    eta = factor * math.sqrt(problem.M) / (problem.D * math.sqrt(problem.beta * steps))
    assert eta <= 1, f"T = {steps} is less than {factor**2 * problem.M / (problem.beta * problem.D**2):.3g}"
    return eta


def idealised_cola(
    problem: Problem, steps: int, eta: float, batch: int | None = None, random: numpy.random.Generator | None = None
) -> Trace:
    """Run Algorithm 2: W_{t+1} = (1 - eta) W_t + eta V_t, where the link V_t answers the gradient at W_t: the true one, or with
    `batch` that of so many rows of data, drawn anew in each step."""
    weight = problem.start
    gaps, printed, errors = numpy.zeros(steps), numpy.zeros(steps), numpy.zeros(steps)
    for t in range(steps):
        true = problem.gradient(weight, None)
        seen = true
        if batch is not None:
            assert random is not None, "a batch is drawn at random"
            seen = problem.gradient(weight, random.integers(problem.rows_of_data, size=batch))
        link = oracle(seen, problem.radius)
        gaps[t] = gap(true, weight, problem.radius)
        printed[t] = printed_gap(true, weight, problem.radius)
        errors[t] = gaps[t] - float(numpy.vdot(true, weight - link))  # <V_t, true> - min over V of <V, true>
        weight = weight + eta * (link - weight)
    return Trace(gaps, printed, errors, weight)


def printed_bound(problem: Problem, steps: int) -> float:
    """Theorem 4.1 as printed, without its epsilon: the mean gap is at most 2 sqrt(M beta) D / sqrt(T)."""
    return 2 * math.sqrt(problem.M * problem.beta / steps) * problem.D


def corrected_bound(problem: Problem, steps: int, eta: float, error: float = 0.0) -> float:
    """What does hold of the mean gap, for any step of (0, 1]: h_1 / (eta T) + eta beta D^2 / 2 + the mean epsilon_t, with
    h_1 the loss at W_1 less its minimum (here a floor of it)."""
    descent = problem.loss(problem.start) - problem.floor
    return descent / (eta * steps) + eta * problem.beta * problem.D**2 / 2 + error
