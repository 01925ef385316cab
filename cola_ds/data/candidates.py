"""Candidates: those of an example in one row, so that the prompt they share is computed once.

    padding | the shared prompt  0 .. p-1 | branch of candidate 0  p .. | branch of candidate 1  p .. | ...

The numbers are position ids: they go on from the prompt in every branch. A branch sees the shared prompt and itself, so each of
its logits is what the candidate's whole text alone would give. It begins with the prompt's last id, which predicts the first id
of the answer, and ends with the answer's last id but one, which predicts the last.

Shapes as in batch.py, T the length of the longest row.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from cola_ds.data.batch import IGNORED, OUTSIDE, PADDING, SHARED, CandidateBatch, Encoded
from cola_ds.errors import UserError


def join_candidates(examples: Sequence[Encoded], correct: Sequence[int] | None = None) -> CandidateBatch:
    """Join the candidates of each example to one row; `correct` names the right candidate of each. Without examples, one row
    that counts nothing."""
    rows = [_row(example) for example in examples] or [[(PADDING, 0, SHARED, IGNORED)]]
    table = torch.tensor([PADDING, 0, OUTSIDE, IGNORED]).repeat(len(rows), max(map(len, rows)), 1)  # (B, T, 4)
    for place, row in enumerate(rows):
        table[place, -len(row) :] = torch.tensor(row)
    input_ids, position_ids, branches, next_ids = table.unbind(-1)
    positions = (next_ids != IGNORED).any(dim=0).nonzero().flatten()
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.long)
    counts = torch.zeros(len(rows), max((len(e.answer_lengths) for e in examples), default=1), dtype=torch.long)
    for place, example in enumerate(examples):
        counts[place, : len(example.answer_lengths)] = torch.tensor(example.answer_lengths)
    right = torch.full((len(rows),), -1) if correct is None or not examples else torch.tensor(correct)
    return CandidateBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        branches=branches,
        positions=positions,
        labels=next_ids[:, positions],
        counts=counts,
        correct=right,
    )


def _row(example: Encoded) -> list[tuple[int, int, int, int]]:
    """The positions of a row: id, position id, branch, and the next id if it counts."""
    shared = common_prefix(example)
    row = [(token, place, SHARED, IGNORED) for place, token in enumerate(example.candidate_ids[0][:shared])]
    for branch, (ids, count) in enumerate(zip(example.candidate_ids, example.answer_lengths, strict=True)):
        assert 0 < count < len(ids), "an answer has ids, and an id before them"
        answer = len(ids) - count
        row += [
            (ids[place], place, branch, ids[place + 1] if place + 1 >= answer else IGNORED)
            for place in range(shared, len(ids) - 1)
        ]
    return row


def common_prefix(encoded: Encoded) -> int:
    """How many leading ids can be computed once for all candidates.

    They are the same in all, and each candidate keeps its answer and the id before it, from which the answer is predicted.
    """
    own = min(len(ids) - n - 1 for ids, n in zip(encoded.candidate_ids, encoded.answer_lengths, strict=True))
    columns = zip(*encoded.candidate_ids, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return max(0, min(own, shared))


def joined_length(example: Encoded) -> int:
    """Positions of the example's row."""
    shared = common_prefix(example)
    return shared + sum(len(ids) - 1 - shared for ids in example.candidate_ids)


def check_joinable(model: Any, max_length: int | None = None) -> None:
    """Refuse (UserError) a causal LM in which a row of candidates would not be what each candidate is alone.

    It must take an attention mask and position ids of ours, and let them decide. A sliding window that no text of at most
    `max_length` ids fills decides nothing.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in ("eager", "sdpa"):
        why: str | None = (
            f"its attention is {config._attn_implementation}, which takes no such mask; set model.attention=auto"
        )
    else:
        why = without_full_attention(model, max_length)
    if why is not None:
        raise UserError(
            f"{type(model).__name__} cannot take an example's candidates in one row, as a task needs it: {why}"
        )


def without_full_attention(model: Any, max_length: int | None = None) -> str | None:
    """Why position ids and a mask of ours do not alone decide what a causal LM's positions see, in a text of at most `max_length`
    ids; None if they do."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else [])) - {"full_attention"}
    if window and max_length and max_length <= window:
        layers.discard("sliding_attention")
    if layers:
        return f"it has layers with {', '.join(sorted(layers))}" + (f" (a window of {window} ids)" if window else "")
    if getattr(model, "_is_stateful", False):
        return "it is recurrent"
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        return "it takes no position_ids"
    return None
