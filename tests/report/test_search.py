"""The tables of launch/sweeps/search/README.md, worked out again from the CSVs beside it."""

import csv
import re
import statistics

from scipy import stats

from tests.support.toys import REPOSITORY

FOLDER = REPOSITORY / "launch/sweeps/search"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
CELLS = {"rank 1, query and value": "qv-1", "rank 8, query and value": "qv-8", "rank 1, all linear layers": "all-1"}
ARMS = ("lora", "chain-2", "chain-4", "chain-4-over-chain")


def rows_of(name):
    with open(FOLDER / name, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["state"] == "finished" and row["metric"] == "loss" and row["steps"] == "128" for row in rows)
    return rows


def test_the_screen():
    losses = {}
    for row in rows_of("screen.csv"):
        assert row["seed"] == "0"
        losses.setdefault(row["name"], {})[float(row["lr"])] = float(row["dev"])
    assert {tuple(sorted(each)) for each in losses.values()} == {(1e-3, 4e-3, 1.6e-2)}
    cell = r" \| (\S+)" * 4
    shown = re.findall(rf"^\| (rank .*?){cell} \|$", README, re.MULTILINE)
    assert [name for name, *_ in shown] == list(CELLS)
    for name, *texts in shown:
        arms = [losses[f"{CELLS[name]}-{arm}"] for arm in ARMS]
        assert [float(text.strip("*")) for text in texts] == [round(min(each.values()), 4) for each in arms]
        for lr in (1e-3, 4e-3, 1.6e-2):
            assert all(arms[0][lr] < each[lr] for each in arms[1:])
        assert all(min(each, key=each.get) == 4e-3 for each in arms)


def test_the_seeds():
    losses = {}
    for row in rows_of("seeds.csv"):
        assert row["lr"] == "0.004"
        losses.setdefault(row["name"], {})[int(row["seed"])] = float(row["dev"])
    line = r"^\| (\w.*?) \| \*\*(\S+) ±(\S+)\*\* \| (\S+) ±(\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$"
    shown = re.findall(line, README, re.MULTILINE)
    assert [name for name, *_ in shown] == ["query and value", "all linear layers"]
    tests = []
    for (_, *texts), cell in zip(shown, ("qv-1", "all-1"), strict=True):
        pair = [[losses[f"{cell}-{arm}"][seed] for seed in range(1, 11)] for arm in ("lora", "chain-2")]
        assert all(lora < chain for lora, chain in zip(*pair, strict=True))
        facts = [round(each, 4) for arm in pair for each in (statistics.mean(arm), statistics.stdev(arm))]
        assert [float(text) for text in texts[:4]] == facts
        assert float(texts[4]) == round(statistics.mean(pair[1]) - statistics.mean(pair[0]), 4)
        tests.append((stats.ttest_rel(*pair).pvalue, texts[5:]))
    (small, texts), (large, others) = sorted(tests)
    for p, (own, of_two, of_nine), by in (
        (small, texts, (2, 9)),
        (large, others, (1, 8)),
    ):  # of nine the others at most 1
        assert [own, of_two, of_nine] == [f"{p * many:.1e}" for many in (1, *by)]
