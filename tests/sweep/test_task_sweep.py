"""A sweep of real runs over two tasks, whole and interrupted: the same table."""

import csv
import json
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest

from cola_ds.report.report import report
from tests.support.forked import Server
from tests.support.launching import clean_environment
from tests.support.toys import REPOSITORY, rows, run_config, save_model, save_run
from tests.training.test_task_runs import by_hand, reviews, write

GRID = ["lr=0.005", "lr=0.02"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and a sweep of 14 runs: two tasks with three methods; one task says its own learning rate."""
    place = tmp_path_factory.mktemp("task-sweep")
    model = save_model(place / "model", max_position_embeddings=1024)
    base = run_config(model, "unused", "unused", lora={"rank": 4}, eval={"every": "end", "batch_size": 4})
    base["data"] = {"num_train": 16, "num_dev": 6, "num_test": 6, "max_length": 256}
    base["optim"] = {"lr": 1e-3, "epochs": 2, "global_batch_size": 8, "micro_batch_size": 4}
    del base["chain"], base["method"], base["run"]["dir"]
    save_run(place / "base.yaml", base)
    for task, train, validation in (
        ("sst2", reviews(3), reviews(2)),
        ("squad", by_hand("squad") * 12, by_hand("squad") * 5),
    ):
        write(place / task / "train.jsonl", train)
        write(place / task / "validation.jsonl", validation)
    few = {"data.num_dev": 2, "data.num_test": 2, "optim.epochs": 1, "optim.lr": 5e-3}  # its answers are generated
    sweep = {
        "base": str(place / "base.yaml"),
        "dir": str(place / "runs"),
        "tasks": {"sst2": {"data.dir": str(place / "sst2")}, "squad": {"data.dir": str(place / "squad"), **few}},
        "methods": {"zero-shot": {}, "lora": {}, "cola": {"chain.length": 2, "optim.epochs": 8}},
        "grid": {"optim.lr": [5e-3, 2e-2]},
        "seeds": [0, 1],
    }
    save_run(place / "sweep.yaml", sweep)
    return place


@pytest.fixture(scope="module")
def command(place):
    with Server(place) as server:
        launcher = shlex.join([*server.command, "train"]) + " {run}"
        yield [sys.executable, "-m", "cola_ds", "sweep", str(place / "sweep.yaml"), "--launcher", launcher]


def start(command):
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def shown(place):
    """The table, and the CSV's rows without times."""
    path = place / "runs.csv"
    text = report([str(place / "runs")], None, str(path), None, None)
    with open(path, newline="", encoding="utf-8") as held:
        return text, [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(held)]


def results(place, task, method, point):
    folders = [place / "runs" / task / method / point / f"seed={seed}" for seed in (0, 1)]
    return [json.loads((folder / "result.json").read_text(encoding="utf-8"))["scores"] for folder in folders]


def check_table(place, text, table_rows):
    """Each cell, from the result.json of its runs: the point that the first seed's dev score prefers."""
    for task, metric in (("sst2", "accuracy"), ("squad", "f1")):
        cells = []
        for method in ("zero-shot", "lora", "cola"):
            points = GRID if task == "sst2" and method != "zero-shot" else [""]
            found = place / "runs" / task / method
            dev = {p: json.loads((found / p / "seed=0/result.json").read_text())["scores"]["dev"] for p in points}
            best = max(points, key=lambda point: dev[point])
            for point in points:  # the other seed ran at the chosen one alone
                assert (found / point / "seed=1").exists() == (point == best)
            test = [100 * scores["test"] for scores in results(place, task, method, best)]
            cells.append(f"{statistics.mean(test):.2f} ±{statistics.stdev(test):.2f} (2)")
        line = next(line for line in text.splitlines() if line.startswith(f"| {task} | {metric} |"))
        assert line.replace("*", "") == f"| {task} | {metric} | {' | '.join(cells)} |"
    assert [row["state"] for row in table_rows] == ["finished"] * 14
    assert [(r["task"], r["name"]) for r in table_rows].count(("sst2", "cola")) == 3


def test_a_sweep_of_tasks_that_was_interrupted_has_the_table_of_one_that_was_not(place, command):
    whole = start(command)
    said, mistakes = whole.communicate(timeout=240)
    assert whole.returncode == 0, said + mistakes
    text, table_rows = shown(place)
    check_table(place, text, table_rows)

    (place / "runs").rename(place / "whole")
    stopped = start(command)
    run = place / "runs/sst2/cola/lr=0.02/seed=0"
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    said, mistakes = stopped.communicate(timeout=180)
    assert stopped.returncode == 75, said + mistakes
    assert mistakes == "cola-ds: stopped at sst2/cola/lr=0.02/seed=0; the same command goes on from there\n"
    half = shown(place)[0]
    assert f"Not finished, 1 run: {run}" in half
    assert "Missing, " in half

    # What comes after it on other data, an interruption can do nothing to: those runs are not made twice.
    shutil.copytree(place / "whole/squad", place / "runs/squad")
    again = start(command)
    said, mistakes = again.communicate(timeout=240)
    assert again.returncode == 0, said + mistakes
    assert "14 of 14 runs have finished, 11 of them before" in said
    assert shown(place) == (text, table_rows)
    happened = [row["event"] for row in rows(run / "events.jsonl") if row["event"] not in ("loaded", "checkpoint")]
    assert happened == ["started", "stopped", "resumed", "finished"]  # the run went on from inside
