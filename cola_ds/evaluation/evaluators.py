"""Evaluators: held-out loss, and a task's score, over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cola_ds.data.batcher import Batcher
from cola_ds.data.tasks.dataset import NEW_TOKENS, TaskData
from cola_ds.data.tasks.metrics import score
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import Engine, evaluating
from cola_ds.errors import TrainingFailedError
from cola_ds.evaluation.candidates import score_candidates
from cola_ds.evaluation.generation import generate_answers
from cola_ds.evaluation.loss import loss_sum
from cola_ds.evaluation.shares import total
from cola_ds.run.scores import loss_objective, score_objective


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What an evaluation on held-out examples found, over all processes."""

    loss: float
    """Mean over labelled tokens, in nats."""
    perplexity: float
    examples: int
    loss_tokens: int
    seconds: float

    @property
    def objective(self) -> float:
        return loss_objective(self.loss)


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What an evaluation on a split of a task found, over all processes."""

    split: str
    """dev or test."""
    metric: str
    score: float
    """The mean over the examples, between 0 and 1."""
    examples: int
    seconds: float

    @property
    def objective(self) -> float:
        return score_objective(self.score)


def task_score(
    engine: Engine, data: TaskData, split: str, tokenizer: Any, batch_size: int, stop: Callable[[], bool]
) -> TaskScore | None:
    """Score every example once, whatever the world size; None if `stop`, asked before each batch, says so. Collective.

    Raises TrainingFailedError where the model's outputs are not finite.
    """
    begin = time.perf_counter()
    predictions: Mapping[int, int | str | None] | None
    if data.task.generates:
        predictions = generate_answers(engine, data.encoded, tokenizer, batch_size, stop, NEW_TOKENS)
    else:
        scores = score_candidates(engine, data.encoded, batch_size, stop)
        predictions = None if scores is None else {i: _best(found) for i, found in scores.items()}
    if predictions is None:
        return None
    lost = round(total(prediction is None for prediction in predictions.values()))
    if lost:  # which of them is the largest means nothing
        raise TrainingFailedError(f"the model's outputs are not finite on {lost} of {len(data)} {split} examples")
    right = total(score(data.task, data.examples[i], found) for i, found in predictions.items() if found is not None)
    assert data.task.metric is not None
    return TaskScore(
        split=split,
        metric=data.task.metric,
        score=right / len(data),
        examples=len(data),
        seconds=time.perf_counter() - begin,
    )


def _best(scores: list[float]) -> int | None:
    """The candidate of the largest score, the first of equals; None where one is not finite."""
    return max(range(len(scores)), key=scores.__getitem__) if all(map(math.isfinite, scores)) else None


def held_out_loss(engine: Engine, batcher: Batcher, batch_size: int, stop: Callable[[], bool]) -> HeldOut | None:
    """Evaluate on every example once, whatever the world size; None if `stop`, asked before each batch, says so. Collective."""
    begin = time.perf_counter()
    device = accelerator.device()
    loss_total = torch.zeros((), device=device)
    examples = tokens = 0
    with evaluating(engine):
        for share in batcher.evaluation(batch_size):
            if stop():
                return None
            watchdog.heartbeat("evaluation")
            # Every process runs every forward pass, if need be on a batch that counts nothing: under ZeRO-3 they gather together.
            for batch in share.micro_batches:
                loss_total += loss_sum(engine, batch.to(device))
            examples += share.examples
            tokens += share.loss_tokens
    loss = collectives.all_reduce_sum(loss_total).item() / max(tokens, 1)
    return HeldOut(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        examples=examples,
        loss_tokens=tokens,
        seconds=time.perf_counter() - begin,
    )
