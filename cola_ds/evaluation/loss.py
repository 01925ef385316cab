"""Loss of a batch under a (sharded) model. Shapes as in data/batch.py; V is the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cola_ds.data.batch import IGNORED, AnyBatch, CandidateBatch
from cola_ds.evaluation.candidates import classification_loss
from cola_ds.evaluation.logits import labelled_logits


def loss_sum(model: nn.Module, batch: AnyBatch) -> Tensor:
    """Sum of the cross-entropy (nats) over the micro batch's labelled tokens, or over its examples where candidates are compared;
    0 if there are none. -> ()

    `model` is the engine, or the causal LM itself.
    """
    if isinstance(batch, CandidateBatch):
        return classification_loss(model, batch)
    logits = labelled_logits(model, batch)  # (B, K, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")
