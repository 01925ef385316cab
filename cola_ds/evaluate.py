"""Loss of a (sharded) model on labelled tokens. Shapes as in data/batching.py; V is the vocabulary."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_ds import processes, watch, zero
from cola_ds.data.batching import IGNORED, Batch, Batcher


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the cross-entropy (nats) over the micro batch's labelled tokens; 0 if there are none. -> ()

    `model` is the engine, or the causal LM itself. Logits are computed at the labelled positions only, where the
    architecture offers that.
    """
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


def held_out_loss(engine: zero.Engine, batcher: Batcher, batch_size: int, stop: Callable[[], bool]) -> HeldOut | None:
    """Evaluate on every example once, whatever the world size; None if `stop`, asked before each batch, says so. Collective."""
    begin = time.perf_counter()
    device = processes.device()
    total = torch.zeros((), device=device)
    examples = tokens = 0
    with zero.evaluating(engine):
        for share in batcher.evaluation(batch_size):
            if stop():
                return None
            watch.beat("evaluation")
            # Every process runs every forward pass, if need be on a batch that counts nothing: under ZeRO-3 they gather together.
            for batch in share.micro_batches:
                total += loss_sum(engine, batch.to(device))
            examples += share.examples
            tokens += share.loss_tokens
    loss = processes.sum_over_processes(total).item() / max(tokens, 1)
    return HeldOut(loss, math.exp(min(loss, 700.0)), examples, tokens, time.perf_counter() - begin)
