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


TASKS = {"SST-2": ("sst2", "accuracy", "128"), "CB": ("cb", "accuracy", "75"), "SQuAD": ("squad", "f1", "50")}


def rows_of(name):
    with open(FOLDER / name, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = {task: (metric, steps) for task, metric, steps in TASKS.values()} | {"docstrings": ("loss", "128")}
    assert all(row["state"] == "finished" and (row["metric"], row["steps"]) == kinds[row["task"]] for row in rows)
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


def test_the_screen_of_tasks():
    """Each arm at the rate of the higher score on dev; the candidates are those whose score is furthest above LoRA's."""
    scores = {}
    for row in rows_of("tasks-screen.csv"):
        assert row["seed"] == "0"
        scores.setdefault((row["task"], row["name"]), {})[float(row["lr"])] = 100 * float(row["dev"])
    assert {tuple(sorted(each)) for each in scores.values()} == {(1e-3, 4e-3)} and len(scores) == 3 * 4
    shown = re.findall(r"^\| (\S+)" + r" \| (\S+) \((\S+)\)" * 4 + r" \|$", README, re.MULTILINE)
    assert [name for name, *_ in shown] == list(TASKS)
    above = {}
    for name, *texts in shown:
        task = TASKS[name][0]
        for arm, text, rate in zip(ARMS, texts[::2], texts[1::2], strict=True):
            each = scores[task, arm]
            assert each[float(rate)] == max(each.values())
            assert text.strip("*") == f"{max(each.values()):.1f}"
            above[task, arm] = max(each.values()) - max(scores[task, "lora"].values())
    chains = sorted((key for key in above if key[1] != "lora"), key=above.get)
    assert chains[-2:] == [("sst2", "chain-4-over-chain"), ("sst2", "chain-4")]


def test_the_seeds_of_tasks():
    scores = {}
    for row in rows_of("tasks-seeds.csv"):
        assert row["lr"] == {"lora": "0.001"}.get(row["name"], "0.004")
        scores.setdefault(row["name"], {})[int(row["seed"])] = 100 * float(row["test"])
    score = r"\*{0,2}(\S+) ±([\d.]+)\*{0,2}"
    line = rf"^\| (four links.*?|LoRA) \| {score} \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$"
    shown = re.findall(line, README, re.MULTILINE)
    assert [name for name, *_ in shown] == ["LoRA", "four links", "four links, one schedule"]
    of_arm = {arm: [scores[arm][seed] for seed in range(2, 12)] for arm in ("lora", "chain-4", "chain-4-over-chain")}
    compared = {}
    for (_, *texts), (arm, values) in zip(shown, of_arm.items(), strict=True):
        assert texts[:2] == [f"{statistics.mean(values):.2f}", f"{statistics.stdev(values):.2f}"]
        if arm == "lora":
            assert texts[2:] == ["-"] * 4
        else:
            assert texts[2] == f"{statistics.mean(values) - statistics.mean(of_arm['lora']):+.2f}"
            compared[stats.ttest_rel(values, of_arm["lora"]).pvalue] = texts[3:]
    (small, texts), (large, others) = sorted(compared.items())
    for (own, of_two, of_nine), adjusted in (
        (texts, (small, 2 * small, 9 * small)),
        (others, (large, max(large, 2 * small), max(8 * large, 9 * small))),
    ):
        assert [own, of_two, of_nine] == [f"{min(p, 1):.2g}" for p in adjusted]


def test_lora_at_the_rate_of_the_chains():
    """By tasks-rate.csv: what the page's last table says, and what it and README.md say of single seeds."""
    rows = rows_of("tasks-rate.csv")
    assert {(row["name"], row["lr"]) for row in rows} == {("lora", "0.004")}
    scores = {row["seed"]: 100 * float(row["test"]) for row in rows}
    assert sorted(map(int, scores)) == list(range(2, 12))
    line = r"^\| (.+?) \| ([\d.]+) \| (\S+) ±(\S+) \| ([\d.]+)" + r" \| (\S.*?)" * 4 + r" \|$"
    shown = re.findall(line, README, re.MULTILINE)
    assert [name for name, *_ in shown] == ["LoRA", "four links", "four links, one schedule"]
    collapsed = min(scores, key=scores.get)
    assert f"seed {collapsed}, LoRA has collapsed ({scores[collapsed]:.1f})" in README.replace("\n", " ")
    planned = {}
    for row in rows_of("tasks-seeds.csv"):
        planned.setdefault(row["name"], {})[row["seed"]] = 100 * float(row["test"])
    lowest = set()
    for (_, *texts), arm in zip(shown, ("lora", "chain-4", "chain-4-over-chain"), strict=True):
        values = scores if arm == "lora" else planned[arm]
        facts = [statistics.median, statistics.mean, statistics.stdev]
        facts = [fact(values.values()) for fact in facts]
        without = statistics.mean(value for seed, value in values.items() if seed != collapsed)
        assert texts[:4] == [f"{fact:.2f}" for fact in (*facts, without)]
        if arm == "lora":
            assert texts[4:] == ["-"] * 4
            continue
        above = sum(values[seed] > scores[seed] for seed in scores)
        p = stats.ttest_rel([values[seed] for seed in scores], list(scores.values())).pvalue
        assert texts[4:6] == [less(values, scores), less(values, scores, collapsed)]
        assert abs(float(texts[5].split()[0])) <= 0.33
        assert texts[6:] == [f"{above} of 10", f"{p:.2g}"] and above == 4
        assert min(values, key=values.get) == collapsed
        lowest.add(f"{min(values.values()):.1f}")
    assert f"their lowest, {lowest.pop()} both" in README and not lowest
    said = README.replace("\n", " ")
    assert f"LoRA has {less(scores, planned['lora'], collapsed)[1:]} more at 4e-3 than at 1e-3" in said
    assert f"LoRA at 4e-3 less LoRA at 1e-3 is {less(scores, planned['lora'])}." in said

    first_screen = (REPOSITORY / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert "LoRA's mean over nine of these seeds is within 0.4 of theirs, and it collapsed in the tenth" in first_screen


def less(these, those, left_out=None):
    """The mean of the paired differences with the half width of its 95% interval (Student's t)."""
    found = [these[seed] - those[seed] for seed in those if seed != left_out]
    half = stats.t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5
    return f"{statistics.mean(found):+.2f} ±{half:.2f}"
