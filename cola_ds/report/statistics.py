"""Significance tests of paired differences, and intervals of means, by scipy and statsmodels: a second to import, so this waits
until there is one to find."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_SMALLEST_DEVIATION = 1e-9  # below it, differences are the same but for rounding


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Student's paired t-test: the two-sided p-value that the mean difference is 0. None for fewer than two, or where all are the
    same."""
    if len(differences) < 2 or statistics.stdev(differences) < _SMALLEST_DEVIATION:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests: p-values, adjusted so that the chance of any false one among them stays what
    it says (Holm 1979)."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The interval of a mean by Student's t. None for fewer than two values, which tell no spread."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean = statistics.mean(values)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half
