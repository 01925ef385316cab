"""Logits of a (sharded) model at the positions whose next token counts. Shapes as in data/batch.py; V is the vocabulary."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from cola_ds.data.batch import AnyBatch, CandidateBatch, PackedBatch
from cola_ds.evaluation.attention import packed_inputs

_MASKS_WITHOUT_POSITIONS = ("opt",)
"""Models whose code makes its mask without the position ids (read in Transformers 5.24): they are given the whole mask."""


def labelled_logits(model: nn.Module, batch: AnyBatch) -> Tensor:  # -> (B, K, V)
    """The logits at the batch's `positions`; computed there only, where the architecture offers that.

    `model` is the engine, or the causal LM itself.
    """
    inner: Any = getattr(model, "module", model)
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    if isinstance(batch, CandidateBatch):
        inputs |= {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask(inner.dtype)}
    elif isinstance(batch, PackedBatch):
        inputs["position_ids"] = batch.position_ids  # from these Transformers makes the mask, where it gets none
        if inner.config.model_type in _MASKS_WITHOUT_POSITIONS:
            inputs["attention_mask"] = batch.attention_mask(inner.dtype)
        inputs |= packed_inputs(inner, batch)
    else:
        inputs |= {"attention_mask": batch.attention_mask}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        return model(**inputs, logits_to_keep=batch.positions).logits
    return model(**inputs).logits[:, batch.positions]
