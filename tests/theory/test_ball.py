"""The trace-norm ball: its linear oracle and the Frank-Wolfe gap, against other ways to compute them."""

import numpy
import pytest

from cola_ds.theory.ball import diameter, gap, oracle, printed_gap, trace_norm

RADIUS = 1.7


def in_ball(random, shape):
    """A matrix of the ball: a mixture of rank-one matrices of trace norm RADIUS, which may have a rank of its own."""
    weights = random.dirichlet(numpy.ones(3)) * random.choice([1.0, random.random()])
    vectors = [[random.normal(size=n) for n in shape] for _ in weights]
    return sum(
        w * RADIUS * numpy.outer(u, v) / numpy.linalg.norm(u) / numpy.linalg.norm(v)
        for w, (u, v) in zip(weights, vectors, strict=True)
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5), (12, 8)])
def test_the_oracle_is_rank_one_and_nothing_in_the_ball_is_lower(shape):
    random = numpy.random.default_rng(0)
    for _ in range(20):
        gradient = random.normal(size=shape)
        answer = oracle(gradient, RADIUS)
        assert numpy.linalg.matrix_rank(answer) == 1
        assert trace_norm(answer) == pytest.approx(RADIUS, rel=1e-12)
        lowest = numpy.vdot(answer, gradient)
        assert lowest == pytest.approx(-RADIUS * numpy.sqrt(numpy.linalg.eigvalsh(gradient.T @ gradient)[-1]), rel=1e-9)
        for _ in range(50):
            other = in_ball(random, shape)
            assert trace_norm(other) <= RADIUS * (1 + 1e-12)
            assert numpy.vdot(other, gradient) >= lowest - 1e-12


def test_the_oracle_by_brute_force():
    """2 x 2: every pair of directions, on a grid of a tenth of a degree."""
    gradient = numpy.array([[0.3, -1.2], [0.8, 0.5]])
    angles = numpy.deg2rad(numpy.arange(0, 360, 0.1))
    directions = numpy.stack([numpy.cos(angles), numpy.sin(angles)])
    values = RADIUS * directions.T @ gradient @ directions  # u^T G v of each pair
    assert numpy.vdot(oracle(gradient, RADIUS), gradient) == pytest.approx(values.min(), rel=1e-5)
    assert numpy.vdot(oracle(gradient, RADIUS), gradient) <= values.min()


def test_the_gap_is_what_it_is_said_to_be():
    random = numpy.random.default_rng(1)
    for _ in range(100):
        gradient, weight = random.normal(size=(4, 3)), in_ball(random, (4, 3))
        link = oracle(gradient, RADIUS)
        assert gap(gradient, weight, RADIUS) >= 0
        assert gap(gradient, weight, RADIUS) == pytest.approx(numpy.vdot(gradient, weight - link), rel=1e-9, abs=1e-12)
        assert printed_gap(gradient, weight, RADIUS) == pytest.approx(numpy.vdot(gradient, -link - weight), rel=1e-9)


def test_the_gap_is_zero_where_nothing_falls():
    gradient = numpy.random.default_rng(2).normal(size=(4, 3))
    best = oracle(gradient, RADIUS)
    assert gap(gradient, best, RADIUS) == pytest.approx(0, abs=1e-12)
    assert gap(numpy.zeros((4, 3)), best, RADIUS) == 0
    assert printed_gap(gradient, best, RADIUS) == pytest.approx(
        2 * RADIUS * numpy.linalg.norm(gradient, 2)
    )  # its greatest


def test_outside_the_ball_the_gap_says_nothing():
    """What the proof assumes in silence: W_1 in K."""
    gradient = numpy.random.default_rng(3).normal(size=(4, 3))
    assert gap(gradient, 2 * oracle(gradient, RADIUS), RADIUS) < 0


def test_the_diameter():
    random = numpy.random.default_rng(4)
    pairs = [(in_ball(random, (3, 4)), in_ball(random, (3, 4))) for _ in range(200)]
    assert max(numpy.linalg.norm(a - b) for a, b in pairs) <= diameter(RADIUS)
    end = oracle(random.normal(size=(3, 4)), RADIUS)
    assert numpy.linalg.norm(end - -end) == pytest.approx(diameter(RADIUS))
