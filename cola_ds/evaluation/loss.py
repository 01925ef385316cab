"""Loss of a batch under a (sharded) model. Shapes as in data/batch.py."""

from __future__ import annotations

from torch import Tensor, nn

from cola_ds.data.batch import AnyBatch, CandidateBatch
from cola_ds.evaluation.candidates import classification_loss
from cola_ds.evaluation.fused_loss import token_losses


def loss_sum(model: nn.Module, batch: AnyBatch) -> Tensor:
    """Sum of the cross-entropy (nats) over the micro batch's labelled tokens, or over its examples where candidates are compared;
    0 if there are none. -> ()

    `model` is the engine, or the causal LM itself.
    """
    if isinstance(batch, CandidateBatch):
        return classification_loss(model, batch)
    return token_losses(model, batch).sum()
