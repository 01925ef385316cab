"""The study that launch/theory/README.md shows: rows for its CSV files, and what its figures and its table draw from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy

from cola_ds.theory import chains
from cola_ds.theory.frank_wolfe import corrected_bound, idealised_cola, printed_bound, step_size
from cola_ds.theory.problems import Problem, least_squares, robust_sensing, steep

FIXED_BATCH = 32  # rows of data
SCALES = (1.0, 4.0, 16.0)
STEPS = tuple(2.0**-n for n in range(8))  # as shares of 1 / L
LINKS, STEPS_PER_LINK = 100, 20


@dataclass(frozen=True)
class GapRow:
    """A run of Algorithm 2."""

    problem: str
    batch: str
    """all: the true gradient; fixed: FIXED_BATCH rows in each step; growing: T rows in each."""
    steps: int
    seed: int
    eta: float
    mean_gap: float
    least_gap: float
    mean_error: float
    """of epsilon_t, the oracle's error"""
    corrected_bound: float
    printed_bound: float
    """with epsilon added, as the theorem does"""
    mean_printed_gap: float
    unit: float
    """sqrt(M beta) D / sqrt(T)"""


@dataclass(frozen=True)
class RateRow:
    """The exponent p of mean_gap ~ T^p, least squares over log T: the mean of seeds with its 95% interval."""

    problem: str
    batch: str
    exponent: float
    low: float
    high: float


@dataclass(frozen=True)
class ChainRow:
    kind: str
    scale: float
    step: float
    """as a share of 1 / L"""
    seed: int
    link: int
    loss: float
    """as a share of the loss at the start; inf where it has left the numbers"""


def gap_rows(seed: int, seeds: int, lengths: Sequence[int]) -> Iterator[GapRow]:
    """Algorithm 2 on each problem, of each length T: once with the true gradient, `seeds` times with each way to draw batches."""
    for problem in (least_squares(seed), robust_sensing(seed), steep()):
        for steps in lengths:
            yield _run(problem, "all", steps, seed)
            for batch in ("fixed", "growing") if problem.rows_of_data else ():
                for draw in range(seeds):
                    yield _run(problem, batch, steps, seed + draw)


def _run(problem: Problem, batch: str, steps: int, seed: int) -> GapRow:
    eta = step_size(problem, steps)
    size = {"all": None, "fixed": FIXED_BATCH, "growing": steps}[batch]
    trace = idealised_cola(problem, steps, eta, size, numpy.random.default_rng(seed))
    error, printed = float(trace.errors.mean()), printed_bound(problem, steps)
    return GapRow(
        problem.name, batch, steps, seed, eta, float(trace.gaps.mean()), float(trace.gaps.min()), error,
        corrected_bound(problem, steps, eta, error), printed + error, float(trace.printed_gaps.mean()), printed / 2,
    )  # fmt: skip


def rate_rows(rows: Sequence[GapRow]) -> Iterator[RateRow]:
    """The exponent of each problem and way to draw batches."""
    for problem, batch in dict.fromkeys((row.problem, row.batch) for row in rows):
        mine = [row for row in rows if (row.problem, row.batch) == (problem, batch)]
        exponents = []
        for seed in sorted({row.seed for row in mine}):
            points = numpy.log([(row.steps, row.mean_gap) for row in mine if row.seed == seed])
            exponents.append(float(numpy.polyfit(points[:, 0], points[:, 1], deg=1)[0]))
        yield RateRow(problem, batch, *interval(exponents))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95% interval by Student's t; of a single value that value, thrice."""
    from scipy.stats import t  # a second to import

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean, mean
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def chain_rows(seed: int, seeds: int) -> Iterator[ChainRow]:
    """Every kind of chain, at every scale of the solution and every step."""
    for scale in SCALES:
        problem = chains.quadratic(seed, seeds, scale)
        for kind in chains.KINDS:
            for step in STEPS:
                losses = chains.losses_by_link(problem, kind, step, LINKS, STEPS_PER_LINK, seed)
                for link, of_seeds in enumerate(losses / losses[0]):
                    for number, loss in enumerate(of_seeds):
                        yield ChainRow(kind, scale, step, seed + number, link, float(loss))


def cells(row: GapRow | RateRow | ChainRow) -> dict[str, object]:
    """A row as a CSV has it."""
    return asdict(row)
