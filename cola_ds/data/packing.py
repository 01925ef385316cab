"""The candidates of an example in one row, so that the prompt they share is computed once.

    padding | the shared prompt  0 .. p-1 | branch of candidate 0  p .. | branch of candidate 1  p .. | ...

The numbers are position ids: they go on from the prompt in every branch. A branch sees the shared prompt and itself, so each of
its logits is what the candidate's whole text alone would give. It begins with the prompt's last id, which predicts the first id
of the answer, and ends with the answer's last id but one, which predicts the last.

Shapes: B examples of a micro batch, T the length of the longest row, K the positions whose next id counts in some row, C the
candidates of the example that has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cola_ds.data.batching import IGNORED, PADDING, move
from cola_ds.data.tasks import Encoded, common_prefix

_SHARED, _OUTSIDE = -1, -2  # where a position belongs to no candidate: the shared prompt, and padding


@dataclass(frozen=True)
class PackedBatch:
    """A micro batch of packed rows, padded on the left: where answers have one length, their positions agree in all rows."""

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    branches: Tensor  # (B, T) the candidate, from 0, that a position belongs to; negative in shared prompt and padding
    positions: Tensor  # (K,) where some row's next id counts
    labels: Tensor  # (B, K) the next id at each position, or IGNORED
    counts: Tensor  # (B, C) ids of each answer; 0 where there is no such candidate
    correct: Tensor  # (B,) the right candidate, or -1

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device."""
        return PackedBatch(*(move(getattr(self, field.name), device) for field in fields(self)))

    def first(self) -> PackedBatch:
        """Its first example alone."""
        rows = {field.name: getattr(self, field.name)[:1] for field in fields(self)}
        return PackedBatch(**{**rows, "positions": self.positions})

    def counted(self) -> Tensor:  # ()
        """How much the loss is a sum over: examples with a right candidate."""
        return (self.real & (self.correct >= 0)).sum()

    @property
    def real(self) -> Tensor:  # (B,)
        """Whether a row is an example; a row that stands for none counts nothing."""
        return self.counts.any(dim=1)

    @property
    def segments(self) -> Tensor:  # (B, K)
        """The candidate that each of `labels` belongs to; negative where there is none."""
        return self.branches[:, self.positions]

    def attention_mask(self, dtype: torch.dtype) -> Tensor:  # (B, 1, T, T)
        """What attention scores take as a summand: 0 where a query sees a key, the lowest number elsewhere.

        Every query sees itself, in padding too: no softmax is over nothing.
        """
        queries, keys = self.branches[:, None, :, None], self.branches[:, None, None, :]
        visible = ((keys == queries) | (keys == _SHARED)).tril()
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def pack(examples: Sequence[Encoded], correct: Sequence[int] | None = None) -> PackedBatch:
    """One row an example; `correct` names the right candidate of each. Without examples, one row that counts nothing."""
    rows = [_row(example) for example in examples] or [[(PADDING, 0, _SHARED, IGNORED)]]
    table = torch.tensor([PADDING, 0, _OUTSIDE, IGNORED]).repeat(len(rows), max(map(len, rows)), 1)  # (B, T, 4)
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
    return PackedBatch(input_ids, position_ids, branches, positions, next_ids[:, positions], counts, right)


def _row(example: Encoded) -> list[tuple[int, int, int, int]]:
    """The positions of a row: id, position id, branch, and the next id if it counts."""
    shared = common_prefix(example)
    row = [(token, place, _SHARED, IGNORED) for place, token in enumerate(example.candidate_ids[0][:shared])]
    for branch, (ids, count) in enumerate(zip(example.candidate_ids, example.answer_lengths, strict=True)):
        assert 0 < count < len(ids), "an answer has ids, and an id before them"
        answer = len(ids) - count
        row += [
            (ids[place], place, branch, ids[place + 1] if place + 1 >= answer else IGNORED)
            for place in range(shared, len(ids) - 1)
        ]
    return row


def packed_length(example: Encoded) -> int:
    """Positions of the example's row."""
    shared = common_prefix(example)
    return shared + sum(len(ids) - 1 - shared for ids in example.candidate_ids)
