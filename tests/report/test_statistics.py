"""Significance tests, against printed tables and values that were worked out apart from the libraries; and what they cost."""

import math
import subprocess
import sys

import pytest

from cola_ds.report.statistics import holm, paired_t_test
from tests.report.test_tables import COLA, LORA, save_result


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (7, 2.36462), (10, 2.22814), (30, 2.04227)]
)
def test_t_distribution(df, t):
    """The two-sided 5% points of the printed tables."""
    ones = [1.0] * (df + 1)  # any sample of that size, moved until its t is the table's
    sample = [value + (index - df / 2) for index, value in enumerate(ones)]
    deviation = math.sqrt(sum((value - 1) ** 2 for value in sample) / df)
    moved = [value - 1 + t * deviation / math.sqrt(df + 1) for value in sample]
    assert paired_t_test(moved) == pytest.approx(0.05, abs=1e-6)
    assert paired_t_test([-value for value in moved]) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0], 0.20483276469913336),
        ([1.5, -0.5, 0.25], 0.549165182666284),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.013235599563682698),
        ([-1.0, -3.0, -2.0, -5.0, -0.5], 0.045240192063503604),
        ([0.31, 2.2, -1.7, 0.9, 3.1, 0.05, -0.4, 1.25, 2.0, 0.8], 0.08469630740451861),
        ([1.0, -1.0], 1.0),
        ([3.0, 3.0, 3.0001, 3.0], 0.0),
    ],
)
def test_p_values(differences, p):
    """From the closed forms for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    assert paired_t_test(differences) == pytest.approx(p, rel=0, abs=1e-12)


def test_samples_without_a_test():
    assert paired_t_test([]) is None
    assert paired_t_test([3.0]) is None
    assert paired_t_test([2.0] * 5) is None
    assert paired_t_test([71.1 - 71.0, 65.1 - 65.0, 3.1 - 3.0]) is None  # the same, but for rounding


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.02], [0.02]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.001, 0.001, 0.3, 0.02], [0.004, 0.004, 0.3, 0.04]),
        ([0.04, 0.013, 1.0, 0.2, 0.0], [0.12, 0.052, 1.0, 0.4, 0.0]),
    ],
)
def test_holm(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted, rel=0, abs=1e-12)


def test_a_report_without_a_comparison_does_not_load_the_libraries(tmp_path):
    """Nor torch: each takes longer to import than all the rest."""
    for seed in range(2):
        save_result(tmp_path / f"l{seed}", 0.5 + seed / 10, seed=seed, **LORA)
    save_result(tmp_path / "c0", 0.7, **COLA)  # one seed that both have: compared, and nothing to test
    code = (
        "import sys; from cola_ds.report.report import report; print(report(sys.argv[1:], None, None, None, None)); "
        "print({'scipy', 'statsmodels', 'pandas', 'torch', 'deepspeed'} & sys.modules.keys())"
    )

    def said(*paths):
        words = [sys.executable, "-c", code, *map(str, paths)]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()

    assert said(tmp_path / "l0")[-1] == "set()"
    table = said(tmp_path)
    assert "| cb | cola-2 - lora | 1 | +20.00 | - | - | no significant difference |" in table
    assert table[-1] == "set()"
    save_result(tmp_path / "c1", 0.9, seed=1, **COLA)
    assert "scipy" in said(tmp_path)[-1]
    assert "torch" not in said(tmp_path)[-1]
