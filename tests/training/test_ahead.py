"""Runs whose examples are made ahead of the step: the bits of one that makes them in it, and the waiting that is reported."""

import json

import pytest

from tests.support.distributed import run_distributed
from tests.support.runs import record, run_once, three_links
from tests.support.toys import rows, save_run
from tests.training.test_api import WHAT_IS_LEFT, place, python  # noqa: F401

PAUSE_S = 0.2


def train_at_depth(process, path, depth, pause_s):
    import time

    from cola_ds.data import ahead
    from cola_ds.data.batcher import Batcher

    ahead.DEPTH = depth
    step = Batcher.step

    def slow_step(*args):
        time.sleep(pause_s if process.rank else 0)
        return step(*args)

    Batcher.step = slow_step
    return run_once(process, path)


@pytest.fixture
def train(toy, tmp_path):
    """Trains two processes, whose examples are made so far ahead and by process 1 so slowly: weights, record and folder."""

    def run(depth, pause_s=0.0):
        folder = tmp_path / f"{depth}-{pause_s}"
        folder.mkdir()
        config = three_links(toy)
        config["run"]["dir"] = str(folder / "run")
        weights = run_distributed(train_at_depth, 2, save_run(folder / "run.yaml", config), depth, pause_s)
        return weights, record(folder / "run"), folder / "run"

    return run


def test_the_bits_and_the_waiting(train):
    """Of the slowest process, whichever writes the rows; summed in the result."""
    ahead, within, slow = train(2), train(0), train(0, PAUSE_S)
    assert ahead[:2] == within[:2] == slow[:2]
    waits = {}
    for name, (_, _, folder) in {"ahead": ahead, "within": within, "slow": slow}.items():
        metrics = rows(folder / "metrics.jsonl")
        firsts = [0, *(row["step"] for row in metrics)]
        whole = sum(row["data_wait_s"] * (row["step"] - first) for first, row in zip(firsts[:-1], metrics, strict=True))
        waits[name] = json.loads((folder / "result.json").read_text(encoding="utf-8"))["data_wait_s"]
        assert waits[name] == pytest.approx(whole)
        assert all(0 <= row["data_wait_s"] <= row["step_s"] for row in metrics)
    assert waits["slow"] > 12 * PAUSE_S * 0.99
    assert waits["ahead"] < 12 * PAUSE_S / 4


def test_what_it_raises_ends_the_run(place):  # noqa: F811
    """As what it was, at its step; and nothing of it is left."""
    said = python(
        place,
        WHAT_IS_LEFT
        + """
import cola_ds
from cola_ds.data.batcher import Batcher

step = Batcher.step
def failing(self, number, *args):
    if number == 4:
        raise LookupError("row 4")
    return step(self, number, *args)
Batcher.step = failing
try:
    cola_ds.train(cola_ds.load_config("my_run.yaml"))
except LookupError as error:
    print("raised:", error)
assert left() == before, (left(), before)
print(sum(1 for _ in open("run/metrics.jsonl")), "rows")
""",
    )
    assert said[-2:] == ["raised: row 4", "4 rows"]
