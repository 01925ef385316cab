"""Collate: examples of text become a padded micro batch."""

from __future__ import annotations

import torch

from cola_ds.data.batch import IGNORED, PADDING, Batch


def collate(examples: list[tuple[list[int], int]]) -> Batch:
    """Collate (ids, prompt_length) pairs, padded on the right; positions before the last id of the prompt count nothing."""
    width = max(len(ids) for ids, _ in examples)
    input_ids = torch.full((len(examples), width), PADDING)  # (B, T)
    attention_mask = torch.zeros_like(input_ids)
    next_ids = torch.full_like(input_ids, IGNORED)  # (B, T): the label of each position
    for row, (ids, prompt_length) in enumerate(examples):
        tokens = torch.tensor(ids)
        input_ids[row, : len(ids)] = tokens
        attention_mask[row, : len(ids)] = 1
        first = max(prompt_length, 1)
        next_ids[row, first - 1 : len(ids) - 1] = tokens[first:]
    positions = (next_ids != IGNORED).any(dim=0).nonzero().flatten()
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.long)
    return Batch(input_ids, attention_mask, positions, next_ids[:, positions])
