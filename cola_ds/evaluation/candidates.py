"""Candidates of an example, scored by a (sharded) model: their log-likelihoods, and the loss over them.

Shapes as in data/batch.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_ds.data.batch import CandidateBatch, Encoded
from cola_ds.data.candidates import join_candidates, joined_length
from cola_ds.distributed import accelerator
from cola_ds.distributed.engine import Engine
from cola_ds.evaluation.fused_loss import token_losses
from cola_ds.evaluation.shares import over_shares


def candidate_scores(model: nn.Module, batch: CandidateBatch) -> Tensor:  # -> (B, C), fp32
    """The mean log-probability (nats) of the ids of each candidate's answer; -inf where there is no such candidate.

    `model` is the engine, or the causal LM itself.
    """
    losses = token_losses(model, batch)  # (B, K)
    # Not a scatter: on a GPU the order of its sum, and so the last bit, would change from run to run.
    others = batch.segments[:, :, None] != torch.arange(batch.counts.shape[1], device=losses.device)  # (B, K, C)
    sums = -losses[:, :, None].masked_fill(others, 0.0).sum(dim=1)  # (B, C)
    return torch.where(batch.counts > 0, sums / batch.counts.clamp(min=1), -math.inf)


def classification_loss(model: nn.Module, batch: CandidateBatch) -> Tensor:
    """Sum over the examples of the cross-entropy (nats) of the right candidate among the scores; 0 if there are none. -> ()"""
    return F.cross_entropy(candidate_scores(model, batch), batch.correct, ignore_index=-1, reduction="sum")


def score_candidates(
    engine: Engine, examples: Sequence[Encoded], batch_size: int, stop: Callable[[], bool]
) -> dict[int, list[float]] | None:
    """The scores of this process's share of the examples, by their places in `examples`. Collective.

    Each example is one process's; None if `stop`, asked before each batch, says so.
    """

    def score(indices: list[int]) -> list[list[float]]:
        batch = join_candidates([examples[i] for i in indices])
        scores = candidate_scores(engine, batch.to(accelerator.device())).tolist()
        return [row[: len(examples[i].candidate_ids)] for i, row in zip(indices, scores, strict=False)]

    return over_shares(engine, [joined_length(example) for example in examples], batch_size, stop, score)
