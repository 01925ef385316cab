"""Datasets of tasks: their examples as token ids, to train on and to score."""

from __future__ import annotations

import collections
import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cola_ds.config.parsing import parse_yaml, read_text
from cola_ds.config.schema import RunConfig, is_task_file
from cola_ds.data.batch import Batch, CandidateBatch, Encoded
from cola_ds.data.candidates import join_candidates, joined_length
from cola_ds.data.collate import collate
from cola_ds.data.tasks.catalog import Example, Task, task_named
from cola_ds.data.tasks.custom import task_from_yaml
from cola_ds.data.tasks.encoding import encode, with_demonstrations
from cola_ds.data.tasks.files import read_rows
from cola_ds.data.tasks.sampling import sample

NEW_TOKENS = 50  # at most, of a generated answer (protocol of MeZO, as COLA follows it)


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Dataset of a task: the examples of one split."""

    task: Task
    examples: list[Example]
    encoded: list[Encoded]
    lengths: list[int]
    """Positions of each example in a batch."""
    loss_tokens: list[int]
    """What the training loss's mean counts: each example once where candidates are compared, else the answer's tokens."""
    lost: collections.Counter[str]
    """Examples that lost something to the maximum length, by what they lost."""
    largest_id: int

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def is_scored(self) -> bool:
        """Whether the task's metric, and not the held-out loss, says which step is the best."""
        return self.task.metric is not None

    @functools.cached_property
    def predictions(self) -> list[int]:
        """Positions of each example whose next id is predicted: all of its candidates' where they are compared."""
        if self.task.objective == "classification":
            return [sum(each.answer_lengths) for each in self.encoded]
        return self.loss_tokens

    def collate(self, indices: list[int]) -> Batch | CandidateBatch:
        """A micro batch of these examples, to train on; without any, one that counts nothing."""
        if self.task.objective == "classification":
            return join_candidates([self.encoded[i] for i in indices], [self.examples[i].correct[0] for i in indices])
        taught = [_taught(self.examples[i], self.encoded[i]) for i in indices]
        return collate([(ids, [(start, len(ids))]) for ids, start in taught])

    def fingerprint(self) -> str:
        """SHA-256 of how the task is trained and scored, and of all token ids, right answers and lengths of answers, in order."""
        digest = hashlib.sha256(json.dumps([self.task.objective, self.task.metric, self.task.generates]).encode())
        for example, encoded in zip(self.examples, self.encoded, strict=True):
            facts = [
                encoded.candidate_ids,
                encoded.answer_lengths,
                encoded.prompt_ids,
                example.correct,
                example.answers,
            ]
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()


def _taught(example: Example, encoded: Encoded) -> tuple[list[int], int]:
    """The ids of the prompt with the answer that training teaches, and how many of them are the prompt's."""
    place = example.correct[0] if example.correct else 0
    ids = encoded.candidate_ids[place]
    return ids, len(ids) - encoded.answer_lengths[place]


def load_task(config: RunConfig, tokenizer: Any, max_length: int) -> tuple[TaskData, TaskData, TaskData, str]:
    """The train, dev and test examples of the run's task, drawn with its seed, and their sizes in one line.

    With method icl, dev and test prompts have the first examples of train in front of them. Raises UserError.
    """
    data = config.data
    assert data.task is not None
    task = find_task(data.task)
    train, validation = (read_rows(task, data.dir, split, data.revision) for split in ("train", "validation"))
    splits = sample(task, train, validation, config.run.seed, data.num_train, data.num_dev, data.num_test)
    if config.method == "icl":
        reserve = NEW_TOKENS if task.generates else 0
        shown = splits.train[: data.demonstrations]
        dev, test = (
            [with_demonstrations(example, shown, tokenizer, max_length, reserve) for example in split]
            for split in (splits.dev, splits.test)
        )
    else:
        dev, test = splits.dev, splits.test
    made = [_encode_all(task, split, tokenizer, max_length) for split in (splits.train, dev, test)]
    return made[0], made[1], made[2], splits.report()


def find_task(name: str) -> Task:
    """The task of that name, or the one that a YAML file describes. Raises UserError."""
    if not is_task_file(name):
        return task_named(name)
    return task_from_yaml(parse_yaml(read_text(name, "data.task"), f"data.task {name}"), name)


def _encode_all(task: Task, examples: list[Example], tokenizer: Any, max_length: int) -> TaskData:
    reserve = NEW_TOKENS if task.generates else 0
    encoded = [encode(example, tokenizer, max_length, reserve) for example in examples]
    if task.objective == "classification":
        lengths, counted = [joined_length(each) for each in encoded], [1] * len(encoded)
    else:
        taught = [_taught(example, each) for example, each in zip(examples, encoded, strict=True)]
        lengths, counted = [len(ids) for ids, _ in taught], [len(ids) - start for ids, start in taught]
    largest = max((max(ids) for each in encoded for ids in each.candidate_ids), default=0)
    lost = collections.Counter(each.lost for each in encoded if each.lost)
    return TaskData(
        task=task,
        examples=examples,
        encoded=encoded,
        lengths=lengths,
        loss_tokens=counted,
        lost=lost,
        largest_id=largest,
    )
