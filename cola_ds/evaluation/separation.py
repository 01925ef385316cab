"""Separation: the proof, on the model itself, that the examples of a packed row see nothing of each other."""

from __future__ import annotations

import torch
from torch import Tensor

from cola_ds.data.batch import AnyBatch
from cola_ds.data.collate import Example, collate
from cola_ds.data.packing import collate_packed
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import Engine, evaluating
from cola_ds.errors import UserError
from cola_ds.evaluation.attention import attention_of
from cola_ds.evaluation.logits import labelled_logits

_LENGTHS = (8, 5, 11)
_ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""By the weights' dtype: how far logits that differ in the order of sums alone may lie apart, as a part of the largest."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_separation(engine: Engine, largest_id: int) -> None:
    """Raise UserError, on all processes, unless a packed row gives each example the logits that it has alone, and another example
    beside it changes not a bit of them. Collective; no gradients, and the engine is as before after it.

    Mixtures of experts sum in another order where other ids fall to an expert: theirs may differ by rounding. `largest_id` is the
    largest of the ids that the rows are made of.
    """
    watchdog.heartbeat("proof of packing")
    model = engine.module
    config = model.config.get_text_config()
    rounding = _ROUNDING[model.dtype]
    exactly = not any(getattr(config, name, None) for name in _EXPERTS)
    examples, others = _examples(largest_id, 0), _examples(largest_id, 1)
    with evaluating(engine):
        # Equal shapes and places: what differs between the two comes from what was changed.
        before = _logits(engine, collate_packed([examples] * len(examples)))
        changed = [[*examples[:i], others[i], *examples[i + 1 :]] for i in range(len(examples))]
        after = _logits(engine, collate_packed(changed))
        alone = _logits(engine, collate(examples))
    largest = max(float(alone.abs().max()), 1e-6)
    wrong = False
    for row in range(len(examples)):
        at = 0
        for place, length in enumerate(_LENGTHS):
            part = slice(at, at + length - 1)  # every position has a label but an example's last
            mine, then = before[row, part], after[row, part]
            if place != row:
                wrong |= not (torch.equal(mine, then) if exactly else _close(mine, then, rounding * largest))
            wrong |= not _close(mine, alone[place, : length - 1], rounding * largest)
            at += length
    (found,) = collectives.all_reduce_max([float(wrong)])  # one answer for all
    if found:
        name = attention_of(model)
        remedy = "model.attention=sdpa" if name == "varlen" else "data.packing=none"
        raise UserError(
            f"{type(model).__name__}: examples of a packed row see each other (attention {name}); set {remedy}"
        )


def _examples(largest_id: int, shift: int) -> list[Example]:
    """Short examples, all of them trained; with `shift` every id is another."""
    ids = torch.arange(sum(_LENGTHS)) * 7 + 3
    found = (ids + shift) % (largest_id + 1)
    return [(part.tolist(), [(0, len(part))]) for part in found.split(_LENGTHS)]


def _close(one: Tensor, other: Tensor, within: float) -> bool:
    return bool(((one.float() - other.float()).abs() <= within).all())  # False where one is no number


def _logits(engine: Engine, batch: AnyBatch) -> Tensor:  # -> (B, T, V), 0 where no position counts
    batch = batch.to(accelerator.device())
    logits = labelled_logits(engine, batch)
    found = torch.zeros(
        len(logits), batch.input_ids.shape[1], logits.shape[-1], dtype=logits.dtype, device=logits.device
    )
    found[:, batch.positions] = logits
    return found
