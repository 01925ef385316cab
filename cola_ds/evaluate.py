"""What a (sharded) model makes of examples: the loss that training and held-out data have, and a task's score.

Shapes as in data/batching.py; V is the vocabulary.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_ds import processes, watch, zero
from cola_ds.data.batching import IGNORED, Batch, Batcher
from cola_ds.data.packing import PackedBatch
from cola_ds.data.taskdata import NEW_TOKENS, TaskData
from cola_ds.data.tasks import score
from cola_ds.errors import TrainingFailedError
from cola_ds.scoring import classification_loss, generate_answers, score_candidates, total


def loss_sum(model: nn.Module, batch: Batch | PackedBatch) -> Tensor:
    """Sum of the cross-entropy (nats) over the micro batch's labelled tokens, or over its examples where candidates are compared;
    0 if there are none. -> ()

    `model` is the engine, or the causal LM itself. Logits are computed at the labelled positions only, where the
    architecture offers that.
    """
    if isinstance(batch, PackedBatch):
        return classification_loss(model, batch)
    inner = getattr(model, "module", model)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        logits = model(**inputs, logits_to_keep=batch.positions).logits  # (B, K, V)
    else:
        logits = model(**inputs).logits[:, batch.positions]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation on held-out examples found, over all processes."""

    loss: float
    """Mean over labelled tokens, in nats."""
    perplexity: float
    examples: int
    loss_tokens: int
    seconds: float

    @property
    def value(self) -> float:
        """What is better the lower it is."""
        return self.loss


@dataclass(frozen=True)
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
    def value(self) -> float:
        """What is better the lower it is."""
        return -self.score


def task_score(
    engine: zero.Engine, data: TaskData, split: str, tokenizer: Any, batch_size: int, stop: Callable[[], bool]
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
    return TaskScore(split, data.task.metric, right / len(data), len(data), time.perf_counter() - begin)


def _best(scores: list[float]) -> int | None:
    """The candidate of the largest score, the first of equals; None where one is not finite."""
    return max(range(len(scores)), key=scores.__getitem__) if all(map(math.isfinite, scores)) else None


def held_out_loss(engine: zero.Engine, batcher: Batcher, batch_size: int, stop: Callable[[], bool]) -> HeldOut | None:
    """Evaluate on every example once, whatever the world size; None if `stop`, asked before each batch, says so. Collective."""
    begin = time.perf_counter()
    device = processes.device()
    loss_total = torch.zeros((), device=device)
    examples = tokens = 0
    with zero.evaluating(engine):
        for share in batcher.evaluation(batch_size):
            if stop():
                return None
            watch.beat("evaluation")
            # Every process runs every forward pass, if need be on a batch that counts nothing: under ZeRO-3 they gather together.
            for batch in share.micro_batches:
                loss_total += loss_sum(engine, batch.to(device))
            examples += share.examples
            tokens += share.loss_tokens
    loss = processes.sum_over_processes(loss_total).item() / max(tokens, 1)
    return HeldOut(loss, math.exp(min(loss, 700.0)), examples, tokens, time.perf_counter() - begin)
