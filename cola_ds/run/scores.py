"""The direction of a score: here alone it is known that a loss is better the lower it is, and a task's score the higher.

Whoever chooses among evaluations compares objectives, which are to be minimized; a checkpoint keeps the best one as such.
"""

from __future__ import annotations


def loss_objective(loss: float) -> float:
    """The objective of a held-out loss: itself."""
    return loss


def score_objective(score: float) -> float:
    """The objective of a task's score, which is 0 to 1 (dev, test): its negative."""
    return -score


def as_dev(objective: float | None) -> float | None:
    """An objective as the column dev of a CSV has it: a task's score or a loss, of which the column metric says which it is."""
    return None if objective is None else abs(objective)


def show_dev(objective: float | None) -> str:
    """An objective as people read it: a task's score in points, or a loss, which is never below 0."""
    if objective is None:
        return "-"
    return f"{-100 * objective:.2f}" if objective <= 0 else f"loss {objective:.4f}"
