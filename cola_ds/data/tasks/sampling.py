"""Sampling: the examples of one run, drawn as MeZO draws them."""

from __future__ import annotations

import collections
from dataclasses import dataclass

import numpy

from cola_ds.data.tasks.catalog import Example, Task
from cola_ds.data.tasks.files import Rows, reasons_text
from cola_ds.errors import UserError


@dataclass(frozen=True)
class Splits:
    """The examples of one run."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    left_out: dict[str, int]
    """Rows of both splits that made no example, by reason."""

    def report(self) -> str:
        """The sizes that are used, in one line."""
        sizes = f"train {len(self.train)}, dev {len(self.dev)}, test {len(self.test)}"
        return sizes + reasons_text(self.left_out)


def sample(
    task: Task,
    train: Rows,
    validation: Rows,
    seed: int,
    num_train: int = 1000,
    num_dev: int | None = None,
    num_test: int = 1000,
) -> Splits:
    """Draw the examples of a run as MeZO does.

    A permutation of the train split gives num_train + num_dev examples, the last of which are dev; where there are fewer, dev
    keeps its size (None: the task's own) and train gets the rest. test is drawn from validation with the same seed.
    Raises UserError where nothing is left to train on.
    """
    num_dev = task.num_dev if num_dev is None else num_dev
    drawn = _draw(train.examples, seed, num_train + num_dev)
    cut = len(drawn) - num_dev
    if cut < 1:
        raise UserError(
            f"{train.source} has {len(train.examples)} examples; {num_train} for train and {num_dev} for dev leave none to "
            f"train on: ask for fewer than {len(train.examples)} for dev and at least one for train"
        )
    left_out = collections.Counter(train.left_out) + collections.Counter(validation.left_out)
    return Splits(drawn[:cut], drawn[cut:], _draw(validation.examples, seed, num_test), dict(left_out))


def _draw(examples: list[Example], seed: int, count: int) -> list[Example]:
    # numpy promises that this legacy generator never changes, and it is MeZO's: the same rows in the same order.
    return [examples[index] for index in numpy.random.RandomState(seed).permutation(len(examples))[:count]]
