"""Statistics of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def paired_t_test(differences: Sequence[float]) -> float | None:
    """The two-sided p-value that paired differences have mean 0; None for fewer than two, or where all are the same."""
    n = len(differences)
    deviation = statistics.stdev(differences) if n > 1 else 0.0
    if deviation < 1e-9:
        return None
    return _two_sided_p(statistics.mean(differences) / (deviation / math.sqrt(n)), n - 1)


def _two_sided_p(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's t distribution, for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    cos_squared = math.cos(angle) ** 2
    term, total = 1.0, 0.0
    for k in range(2 + df % 2, df + 1, 2):  # df even: 1, 1/2 cos^2, 1*3/(2*4) cos^4 ...; odd: 1, 2/3 cos^2 ...
        total += term
        term *= (k - 1) / k * cos_squared
    inside = math.sin(angle) * total
    if df % 2:
        inside = 2 / math.pi * (angle + math.cos(angle) * inside)
    return max(0.0, 1 - inside)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that the chance of any false one among them stays what it says (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
