"""Metrics of a task's answers: accuracy, and SQuAD's F1."""

from __future__ import annotations

from collections.abc import Sequence

from cola_ds.data.tasks.catalog import Example, Task


def squad_f1(prediction: str, golds: Sequence[str]) -> float:
    """SQuAD's F1 of the words that a prediction shares with a right answer, without case, punctuation and articles; the best over
    the answers; between 0 and 1."""
    from torchmetrics.functional.text import squad  # two seconds to import

    found = squad(
        [{"id": "", "prediction_text": prediction}],
        [{"id": "", "answers": {"text": list(golds), "answer_start": [0] * len(golds)}}],
    )
    return found["f1"].item() / 100


def accuracy(prediction: int | str, example: Example) -> float:
    """1 if the candidate of that index is right or, for a generated text, if it is a right answer to the letter, but for white
    space around it; else 0."""
    if isinstance(prediction, int):
        return float(prediction in example.correct)
    return float(prediction.strip() in [answer.strip() for answer in example.answers])


def score(task: Task, example: Example, prediction: int | str) -> float:
    """The task's metric of one example, between 0 and 1; `prediction` is a candidate's index or a generated text."""
    if task.metric == "f1" and isinstance(prediction, str):
        return squad_f1(prediction, example.answers)
    return accuracy(prediction, example)
