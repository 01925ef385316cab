"""The direction of a score, wherever evaluations are chosen from: the lowest loss, the highest score of a task."""

import json

import pytest

from cola_ds.commands.inspect import inspect
from cola_ds.evaluation.evaluators import HeldOut, TaskScore
from cola_ds.run.scores import as_dev, loss_objective, score_objective, show_dev
from tests.report.test_tables import LORA, save_result


def test_the_lower_objective_is_the_better():
    assert loss_objective(2.0) < loss_objective(2.5)
    assert score_objective(0.75) < score_objective(0.5)
    assert (loss_objective(2.0), score_objective(0.75)) == (2.0, -0.75)  # as checkpoints keep them


def test_evaluators_are_compared_by_it():
    losses = [HeldOut(loss=loss, perplexity=1.0, examples=1, loss_tokens=1, seconds=1.0) for loss in (2.5, 2.0)]
    scores = [TaskScore(split="dev", metric="f1", score=score, examples=1, seconds=1.0) for score in (0.5, 0.75)]
    for worse, better in (losses, scores):
        assert better.objective < worse.objective


@pytest.mark.parametrize(
    ("objective", "column", "text"),
    [
        (None, None, "-"),
        (score_objective(0.7), 0.7, "70.00"),
        (score_objective(0.0), 0.0, "0.00"),
        (loss_objective(2.5), 2.5, "loss 2.5000"),
    ],
)
def test_as_it_is_written(objective, column, text):
    assert (as_dev(objective), show_dev(objective)) == (column, text)


def test_inspect_names_the_best_of_both(tmp_path):
    """The first of equals."""
    folder = save_result(tmp_path / "a", 0.5, **LORA)
    found = [{"step": step, "loss": loss} for step, loss in enumerate((2.5, 2.0, 2.0, 3.0), 1)]
    on_dev = [
        {"step": step, "split": "dev", "metric": "f1", "score": score} for step, score in enumerate((0.5, 0.8, 0.8), 1)
    ]
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*found, *on_dev]), encoding="utf-8")
    lines = inspect(str(folder)).splitlines()
    assert [line for line in lines if line.startswith("best ")] == [
        "best         held-out loss 2.0000 at step 2",
        "best         f1 0.8000 on dev at step 2",
    ]
