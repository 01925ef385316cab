"""The problems' constants: what the bounds rest on."""

import itertools

import numpy
import pytest

from cola_ds.theory.ball import oracle, trace_norm
from cola_ds.theory.problems import least_squares, robust_sensing, steep

PROBLEMS = [least_squares(0), robust_sensing(0), least_squares(5), robust_sensing(5), steep()]
each = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def points(problem, count=30):
    """Of the ball: half of them on its boundary, of rank one and of full rank."""
    random = numpy.random.default_rng(0)
    shape = problem.start.shape
    for n in range(count):
        matrix = oracle(random.normal(size=shape), problem.radius) if n % 3 else random.normal(size=shape)
        yield matrix * problem.radius / trace_norm(matrix) * (1.0 if n % 2 else random.random())


@each
def test_gradient(problem):
    for weight in points(problem, 4):
        gradient = problem.gradient(weight, None)
        for index in list(numpy.ndindex(weight.shape))[::17]:
            change = numpy.zeros_like(weight)
            change[index] = 1e-6
            slope = (problem.loss(weight + change) - problem.loss(weight - change)) / 2e-6
            assert gradient[index] == pytest.approx(slope, rel=1e-5, abs=1e-8)


@each
def test_smoothness_and_bounds(problem):
    """beta is of the whole ball, M and the floor hold everywhere, and W_1 is in it."""
    every = list(points(problem))
    for one, other in itertools.pairwise(every):
        change = problem.gradient(one, None) - problem.gradient(other, None)
        assert numpy.linalg.norm(change) <= problem.beta * numpy.linalg.norm(one - other) * (1 + 1e-12)
    losses = [problem.loss(weight) for weight in every]
    assert problem.floor <= min(losses) and max(numpy.abs(losses)) <= problem.M
    assert trace_norm(problem.start) <= problem.radius


def test_beta_is_no_guess():
    """Along the steepest direction the gradient changes by beta, no less."""
    problem = least_squares(0)
    direction, zero = numpy.ones(problem.start.shape), problem.gradient(problem.start, None)
    for _ in range(2000):  # power iteration on the Hessian, by the gradient alone
        direction /= numpy.linalg.norm(direction)
        direction = problem.gradient(direction, None) - zero
    assert numpy.linalg.norm(direction) == pytest.approx(problem.beta, rel=1e-4)


def test_robust_sensing_is_not_convex():
    problem = robust_sensing(0)
    end = oracle(problem.gradient(problem.start, None), problem.radius)
    middle = problem.start + (-end) / 2
    assert (problem.loss(problem.start) + problem.loss(-end)) / 2 < problem.loss(middle)


def test_a_batch_is_unbiased():
    """The mean of the gradients of single rows is that of all."""
    problem = robust_sensing(0)
    weight = next(points(problem))
    rows = [problem.gradient(weight, numpy.array([n])) for n in range(problem.rows_of_data)]
    numpy.testing.assert_allclose(numpy.mean(rows, axis=0), problem.gradient(weight, None), rtol=1e-9, atol=1e-12)
