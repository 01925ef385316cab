"""The loss of a batch under a (sharded) model. Shapes as in data/batch.py; V is the vocabulary."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor, nn

from cola_ds.data.batch import IGNORED, Batch, PackedBatch
from cola_ds.evaluation.candidates import classification_loss


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
