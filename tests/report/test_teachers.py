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
CELL = re.compile(r"^\| (\S+) \| (\S+) \| (\d+(?:-\d+)?) \| (\S+) \| (\S+) ±(\S+) \| (\d) \|$", re.MULTILINE)


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
    for task, method, links, point, mean, half, runs_of_it in cells:
        _, points, seeds = runs[task, method]
        last = [each[-1] for each in seeds.values()]
        counts = [len(each) for each in seeds.values()]
        assert (
            sorted({min(counts), max(counts)}) == [int(count) for count in links.split("-")]
            and points == {point}
            and len(last) == int(runs_of_it)
        )
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


def test_rates_at_the_ends_of_their_grids(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    at_an_end = 0
    for path in sorted(FOLDER.glob("*.yaml")):
        for series in load_plan(str(path.relative_to(REPOSITORY)), []).series if path.stem != "base" else ():
            points = series.group.points
            chosen = of_runs().get((series.group.task, series.group.name), (0, set(), {}))[1]
            at_an_end += bool(chosen & {points[0], points[-1]})
    assert f"In {at_an_end} of the rows the best learning rate is the least or the greatest that was tried" in README


def test_what_the_first_screen_says():
    """README.md's percentages, of 400, 1,600 and 6,400 steps and of SmolLM2."""
    left = {}
    for cell, (_, _, seeds) in of_runs().items():
        left[cell] = statistics.fmean(each[-1] for each in seeds.values())
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    said = re.search(
        r"four links of rank 4 leave (\d+)% unlearnt and LoRA of rank 4 (\d+)%, .*?; LoRA of rank 16 leaves (\d+)%\. With four "
        r"times the steps that is (\d+)%, (\d+)% and ([\d.]+)%, with a quarter (\d+)%, (\d+)% and (\d+)%: .*?400 steps: (\d+)%, "
        r"(\d+)% and (\d+)%\)",
        text,
    )
    tasks = ("rank-16", "steps-6400", "steps-400", "smollm2")
    expected = [100 * left[task, arm] for task in tasks for arm in ("chain-4x4", "lora-4", "lora-16")]
    for text, share in zip(said.groups(), expected, strict=True):
        assert abs(float(text) - share) <= (0.05 if "." in text else 0.5)


def test_the_control_in_plain_torch():
    found = {}
    with open(FOLDER / "control.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            of_rate = found.setdefault((row["method"], row["targets"]), {}).setdefault(float(row["lr"]), {})
            of_rate[int(row["seed"])] = float(row["residual"])
    cell = r"(\S+) \((\S+) to (\S+)\)"
    shown = re.findall(rf"^\| (\S+) \| (\S+) \| {cell} \| {cell} \|$", README, re.MULTILINE)
    assert [method for method, *_ in shown] == ["lora-1", "lora-4", "lora-16", "chain-16x1", "chain-4x4"]
    for method, pipeline, *texts in shown:
        _, _, seeds = of_runs()["rank-16", method]
        assert float(pipeline) == pytest.approx(statistics.fmean(each[-1] for each in seeds.values()), abs=6e-4)
        for at, targets in enumerate(("texts", "logits")):
            by_rate = found[method, targets]
            values = list(by_rate[min(by_rate, key=lambda lr: by_rate[lr][0])].values())
            assert len(values) == 3
            expected = [statistics.fmean(values), min(values), max(values)]
            assert [float(text) for text in texts[3 * at : 3 * at + 3]] == pytest.approx(expected, abs=6e-4)
        assert float(texts[0]) == pytest.approx(float(pipeline), abs=0.02)
