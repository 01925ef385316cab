"""The tables of launch/sweeps/teacher/README.md, worked out again from the CSV beside it."""

import csv
import re
import statistics

import pytest
from scipy import stats

from cola_ds.sweep.plan import load_plan
from tests.support.toys import REPOSITORY

FOLDER = REPOSITORY / "launch/sweeps/teacher"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
CELL = re.compile(r"^\| (\S+) \| (\S+) \| (\d+) \| (\S+) \| (\S+) ±(\S+) \| (\d) \|$", re.MULTILINE)


def of_runs():
    """By task and method: links, learning rates chosen, and by seed the residual after each link."""
    found = {}
    with open(FOLDER / "residuals.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            _, points, seeds = found.setdefault((row["task"], row["method"]), (int(row["rank"]), set(), {}))
            points.add(row["point"])
            seeds.setdefault(int(row["seed"]), []).append(float(row["residual"]))
    return found


def test_the_table_is_that_of_the_runs():
    runs = of_runs()
    cells = CELL.findall(README)
    assert [(task, method) for task, method, *_ in cells] == list(runs)
    for task, method, links, point, mean, half, count in cells:
        _, points, seeds = runs[task, method]
        last = [each[-1] for each in seeds.values()]
        assert {len(each) for each in seeds.values()} == {int(links)} and points == {point} and len(last) == int(count)
        assert float(mean) == pytest.approx(statistics.fmean(last), abs=6e-4)
        expected = stats.t.ppf(0.975, len(last) - 1) * statistics.stdev(last) / len(last) ** 0.5 if len(last) > 1 else 0
        assert float(half) == pytest.approx(expected, abs=6e-4)


def test_the_runs_are_those_of_the_sweeps(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    planned = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        if path.stem != "base":
            for series in load_plan(str(path.relative_to(REPOSITORY)), []).series:
                planned[series.group.task, series.group.name] = series
    runs = of_runs()
    assert set(runs) <= set(planned)
    for cell, (rank, points, seeds) in runs.items():
        assert points <= set(planned[cell].group.points)
        assert set(seeds) <= set(planned[cell].group.seeds)
        assert cell[0].startswith((f"rank-{rank}", "steps-", "smollm2"))
