"""The tables of launch/sweeps/smollm2-135m: what each says, worked out again from its CSV alone."""

import csv
import re
import statistics

import pytest

from cola_ds.sweep.plan import load_plan
from tests.support.toys import REPOSITORY

FOLDER = REPOSITORY / "launch/sweeps/smollm2-135m"
README = (REPOSITORY / "launch/sweeps/README.md").read_text(encoding="utf-8")


FIRST_KNOT = {
    ("low-data", "cola-2"): 39,
    ("low-data", "cola-3"): 22,
    ("sst2-1000", "cola-2"): 375,
    ("sst2-1000", "cola-3"): 209,
}


def rows_of(stem):
    with open(FOLDER / f"{stem}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stem", ["low-data", "sst2-1000"])
def test_the_committed_table_is_that_of_the_committed_runs(stem, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    plan = load_plan(str((FOLDER / stem).relative_to(REPOSITORY)) + ".yaml", [])
    rows = rows_of(stem)
    table = (FOLDER / f"{stem}.md").read_text(encoding="utf-8")
    header, _, *lines = table.split("\n\n")[0].splitlines()
    names = header.strip("| ").split(" | ")[2:]
    cells = {
        (task, name): text.strip("*")
        for task, _, *texts in (line.strip("| ").split(" | ") for line in lines)
        for name, text in zip(names, texts, strict=True)
    }

    assert {row["state"] for row in rows} == {"finished"}
    folders = {row["folder"] for row in rows}
    assert len(folders) == len(rows) == len(plan.runs)
    assert list(cells) == [(series.group.task, series.group.name) for series in plan.series]
    for series in plan.series:
        group = series.group
        mine = [row for row in rows if (row["task"], row["name"]) == (group.task, group.name)]
        chosen = [row for row in mine if row["chosen"] == "yes"]
        assert sorted(int(row["seed"]) for row in chosen) == list(group.seeds)
        if len(group.points) > 1:  # the best on dev, the first of equals
            dev = {row["folder"].split("/")[-2]: float(row["dev"]) for row in mine if row["seed"] == "0"}
            assert set(dev) == set(group.points)
            best = max(group.points, key=dev.__getitem__)
            assert {row["folder"].split("/")[-2] for row in chosen} == {best}
            assert f"{group.task} / {group.name}: {best} (dev {100 * dev[best]:.2f})" in table
        scores = [100 * float(row["test"]) for row in chosen]
        expected = f"{statistics.mean(scores):.2f} ±{statistics.stdev(scores):.2f} (5)"
        assert cells[group.task, group.name] == expected
    for line in lines:
        assert re.sub(r" \(5\)", "", line) in README.replace("sst2, 1000 examples", "sst2")


def test_what_the_readme_counts_in_them():
    early, edge, searches, seconds = {}, 0, 0, 0.0
    for stem in ("low-data", "sst2-1000"):
        rows = rows_of(stem)
        seconds += sum(float(row["seconds"]) for row in rows)
        chosen = [row for row in rows if row["chosen"] == "yes" and row["method"] != "zero-shot"]
        for name in ("cola-2", "cola-3"):
            steps = [int(row["best_step"]) for row in chosen if row["name"] == name]
            early[stem, name] = sum(step <= FIRST_KNOT[stem, name] for step in steps), len(steps)
        rates = [float(row["lr"]) for row in chosen if row["seed"] == "0"]
        edge, searches = edge + rates.count(2e-3), searches + len(rates)
    text = " ".join(README.split())
    few, more = ([early[stem, name] for name in ("cola-2", "cola-3")] for stem in ("low-data", "sst2-1000"))
    assert f"or at it, in {few[0][0]} of {few[0][1]} runs of cola-2 and {few[1][0]} of cola-3" in text
    assert f"that is so in {more[0][0]} and {more[1][0]} of {more[0][1]}" in text
    assert f"in {edge} of {searches} searches" in text
    assert f"{seconds / 3600:.1f} hours in all" in text


def test_lora_at_the_chains_learning_rate():
    """What was run after the sweep, with the sweep's own seed 0."""
    rows = [row for row in rows_of("sst2-1000") if row["lr"] == "0.0005"]
    lora = {row["seed"]: 100 * float(row["test"]) for row in rows_of("sst2-1000-lora") + rows if row["name"] == "lora"}
    chain = {
        row["seed"]: 100 * float(row["test"]) for row in rows if row["name"] == "cola-3" and row["chosen"] == "yes"
    }
    assert len(lora) == len(chain) == 5
    below = statistics.mean(lora[seed] - chain[seed] for seed in lora)
    text = " ".join(README.split())
    assert f"has {statistics.mean(lora.values()):.2f} ±{statistics.stdev(lora.values()):.2f}, and" in text
    assert f"cola-3 is {below:.1f} below it" in text
