"""Algorithm 2 of the paper: the corrected bound holds, and what is printed fails where said to (launch/theory/README.md)."""

import math

import numpy
import pytest

from cola_ds.theory.ball import oracle, trace_norm
from cola_ds.theory.frank_wolfe import corrected_bound, idealised_cola, printed_bound, step_size
from cola_ds.theory.problems import least_squares, robust_sensing, steep

LENGTHS = [16, 64, 256]
PROBLEMS = [least_squares(0), robust_sensing(0), least_squares(1), robust_sensing(1)]


def run(problem, steps, batch=None, seed=0, factor=1.0):
    return idealised_cola(problem, steps, step_size(problem, steps, factor), batch, numpy.random.default_rng(seed))


def test_two_steps_by_hand():
    """On the interval: from -1/2 by half the way to the end 1/2, twice. Gradients -5/2 and -2."""
    trace = idealised_cola(steep(), 2, 0.5)
    numpy.testing.assert_allclose(trace.gaps, [2.5, 1.0])  # 5/2 times the whole way, 2 times half of it
    numpy.testing.assert_allclose(trace.printed_gaps, [0.0, 1.0])  # to the other end
    numpy.testing.assert_allclose(trace.weight, [[0.25]])


def test_weights_stay_in_the_ball_and_gain_a_rank_a_step():
    problem = least_squares(0)
    for steps in (1, 2, 5):
        weight = run(problem, steps).weight
        assert trace_norm(weight) <= problem.radius * (1 + 1e-12)
        assert numpy.linalg.matrix_rank(weight) == steps


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("batch", [None, 32])
def test_the_corrected_bound_holds(problem, batch):
    for steps in LENGTHS:
        trace = run(problem, steps, batch)
        eta = step_size(problem, steps)
        assert trace.gaps.min() >= -1e-12 and trace.errors.min() >= -1e-12
        assert trace.gaps.mean() <= corrected_bound(problem, steps, eta, trace.errors.mean())
        # A loss that is not negative: M bounds h_1, and the constant is 3/2.
        unit = printed_bound(problem, steps) / 2
        assert corrected_bound(problem, steps, eta) <= 1.5 * unit * (1 + 1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4, 16, 64, 256, 1024])
def test_the_printed_constant_fails_with_the_printed_step(steps):
    """On the steep instance the mean gap exceeds 2 sqrt(M beta) D / sqrt(T) at every T; a closed form says by how much."""
    problem = steep()
    mean, eta = run(problem, steps).gaps.mean(), 1 / math.sqrt(steps)
    assert step_size(problem, steps) == eta
    left = (1 - eta) ** steps  # of the way to the minimum
    expected = eta * (2 - 1.5 * left - 0.5 * left**2 + eta * (1 - left**2) / (2 * (2 - eta)))
    assert mean == pytest.approx(expected, rel=1e-12)
    assert printed_bound(problem, steps) < mean <= corrected_bound(problem, steps, eta)
    assert corrected_bound(problem, steps, eta) == pytest.approx(2.5 / math.sqrt(steps))


def test_five_halves_is_attained():
    assert run(steep(), 1).gaps.mean() == 2.5 == corrected_bound(steep(), 1, 1.0)


@pytest.mark.parametrize("steps", [4, 16, 64, 256, 1024])
def test_twice_the_printed_step_has_the_printed_constant(steps):
    problem = steep()
    bound = corrected_bound(problem, steps, step_size(problem, steps, factor=2))
    assert bound == pytest.approx(printed_bound(problem, steps))
    assert run(problem, steps, factor=2).gaps.mean() <= bound


@pytest.mark.parametrize("steps", [16, 64, 256, 1024])
def test_the_printed_sign_is_of_nothing_that_falls(steps):
    """It does not shrink while the weight goes to the minimum, where it is 3/2; the printed bound does."""
    problem = steep()
    trace = run(problem, steps)
    assert abs(problem.loss(trace.weight) - problem.floor) < 0.05
    assert trace.printed_gaps.mean() > 2 * printed_bound(problem, steps)
    assert 1.2 < trace.printed_gaps.mean() < 1.5


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_loss_that_moves_costs_twice_what_it_moves(end):
    """On [0, 1], D = 1: f_1 = 0, whose every oracle answer `end` is a right one, then f_2 = 1 - 2x; one whole step each, from 0.
    S = sup abs(f_2 - f_1) = 1, h_1 = 0; both are affine, so that any beta will do."""
    steps, beta, moved, descent, weight, gaps = 2, 0.1, 1.0, 0.0, 0.0, []
    for gradient, answer in ((0.0, end), (-2.0, 1.0)):
        gaps.append(max(gradient * (weight - other) for other in (0.0, 1.0)))
        assert gradient * answer == min(0.0, gradient)
        weight = answer
    mean, curved = sum(gaps) / steps, beta / 2
    assert mean <= (descent + 2 * moved) / steps + curved
    assert (mean <= (descent + moved) / steps + curved) == (end == 1.0)


def test_too_few_steps_leave_the_ball():
    """What is assumed in silence: T >= M / (beta D^2), or the step exceeds 1 and W_{t+1} is no convex combination."""
    problem = steep()
    assert trace_norm(idealised_cola(problem, 1, 1.5).weight) > problem.radius
    with pytest.raises(AssertionError, match="T = 1 is less than 4"):
        step_size(problem, 1, factor=2)
    assert step_size(problem, 4, factor=2) == 1


def test_the_oracle_s_error_is_at_most_twice_the_radius_times_the_noise():
    random = numpy.random.default_rng(0)
    for size in (1e-3, 0.1, 1.0, 10.0):
        for _ in range(30):
            gradient, noise = random.normal(size=(5, 4)), size * random.normal(size=(5, 4))
            error = numpy.vdot(gradient, oracle(gradient + noise, 1.3) - oracle(gradient, 1.3))
            assert -1e-12 <= error <= 2 * 1.3 * numpy.linalg.norm(noise, 2)


def test_gaps_and_errors_of_a_batch_are_those_of_the_true_gradient():
    problem = robust_sensing(0)
    trace = run(problem, 16, 8, seed=3)
    true = problem.gradient(problem.start, None)
    rows = numpy.random.default_rng(3).integers(problem.rows_of_data, size=8)
    answer = oracle(problem.gradient(problem.start, rows), problem.radius)
    assert trace.gaps[0] == pytest.approx(numpy.vdot(true, problem.start - oracle(true, problem.radius)))
    assert trace.errors[0] == pytest.approx(numpy.vdot(true, answer - oracle(true, problem.radius)))
    assert trace.errors[0] > 0.1


def test_without_epsilon_no_bound_holds_of_small_batches():
    problem, steps = robust_sensing(0), 1024
    trace, eta = run(problem, steps, 32), step_size(problem, steps)
    assert corrected_bound(problem, steps, eta) < trace.gaps.mean()
    assert trace.gaps.mean() <= corrected_bound(problem, steps, eta, trace.errors.mean())


def test_rates():
    """T^(-1/2) with the true gradient; a floor with batches of one size; none where they grow with T."""
    problem = robust_sensing(0)
    whole = [run(problem, steps).gaps.mean() for steps in (64, 1024)]
    fixed = [numpy.mean([run(problem, steps, 32, seed).gaps.mean() for seed in range(2)]) for steps in (64, 1024)]
    growing = [numpy.mean([run(problem, steps, steps, seed).gaps.mean() for seed in range(2)]) for steps in (64, 1024)]
    assert whole[0] / whole[1] == pytest.approx(4, rel=0.15)
    assert fixed[0] / fixed[1] < 1.5 and fixed[1] > 5 * whole[1]
    assert growing[0] / growing[1] > 4
