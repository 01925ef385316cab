"""Collate: examples of text become a padded micro batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from cola_ds.data.batch import IGNORED, PADDING, Batch

Example = tuple[Sequence[int] | numpy.ndarray, Sequence[Sequence[int]] | numpy.ndarray]
"""Ids, (length,), and the spans of those that are trained, (k, 2): [start, end), in order and disjoint."""


def collate(examples: Sequence[Example]) -> Batch:
    """Collate examples, padded on the right; without any, a batch that counts nothing.

    The loss counts the ids of the spans, but for an example's first, which nothing predicts.
    """
    examples = examples or [([PADDING], [])]
    width = max(len(ids) for ids, _ in examples)
    input_ids = numpy.full((len(examples), width), PADDING)  # (B, T)
    attention_mask = numpy.zeros_like(input_ids)
    next_ids = numpy.full_like(input_ids, IGNORED)  # (B, T): the label of each position
    for row, (ids, spans) in enumerate(examples):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        set_labels(next_ids[row], input_ids[row], spans)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), *counted_labels(next_ids))


def set_labels(next_ids: numpy.ndarray, ids: numpy.ndarray, spans: Sequence[Sequence[int]] | numpy.ndarray) -> None:
    """Write the trained ids of an example to where each is the next id; both arrays begin where the example does."""
    for start, end in spans:
        first = max(start, 1)
        next_ids[first - 1 : max(end, 1) - 1] = ids[first:end]


def counted_labels(next_ids: numpy.ndarray) -> tuple[Tensor, Tensor]:  # (B, T) -> (K,), (B, K)
    """The positions where some row's next id counts, at least one, and the labels there."""
    positions = (next_ids != IGNORED).any(axis=0).nonzero()[0]
    if not len(positions):
        positions = numpy.zeros(1, dtype=numpy.int64)
    found = torch.from_numpy(positions)
    return found, torch.from_numpy(next_ids)[:, found]
