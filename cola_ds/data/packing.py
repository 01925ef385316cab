"""Packing: rows of whole examples, one after the other, so that little of a micro batch is padding.

    example 0  0 .. | example 1  0 .. | ... | padding  0 0 0

The numbers are position ids. Where they do not go on by one, another example begins: from that Transformers makes the mask by
which no example sees another (find_packed_sequence_indices in its masking_utils.py, read in 5.24), if it gets neither
mask nor cache.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from cola_ds.data.batch import IGNORED, PADDING, PackedBatch
from cola_ds.data.collate import Example, counted_labels, set_labels
from cola_ds.errors import UserError


def collate_packed(rows: Sequence[Sequence[Example]], padded_to: tuple[int, int] | None = None) -> PackedBatch:
    """Collate rows of examples, padded on the right; without any, a batch that counts nothing.

    The loss counts what it does of each example alone: no id is predicted from the example before.

    `padded_to` is what all batches have in common: the positions of a row, and the longest stretch of them. Padding is then cut
    into stretches of that length.
    """
    rows = rows or [[([PADDING], [])]]
    width = max(sum(len(ids) for ids, _ in row) for row in rows)
    width, longest = padded_to or (width, width)
    input_ids = numpy.full((len(rows), width), PADDING)  # (B, T)
    position_ids = numpy.zeros_like(input_ids)
    next_ids = numpy.full_like(input_ids, IGNORED)  # (B, T): the label of each position
    lengths = []
    for place, row in enumerate(rows):
        at = 0
        for ids, spans in row:
            end = at + len(ids)
            lengths.append(len(ids))
            input_ids[place, at:end] = ids
            position_ids[place, at:end] = numpy.arange(len(ids))
            set_labels(next_ids[place, at:end], input_ids[place, at:end], spans)
            at = end
        lengths += [min(longest, width - start) for start in range(at, width, longest)]
    cu_seq_lens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions, labels = counted_labels(next_ids)
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        positions,
        labels,
        cu_seq_lens,
        max(lengths) if padded_to is None else longest,
    )


def check_packable(model: Any) -> None:
    """Refuse (UserError) a causal LM of which it is known without its weights that examples of a packed row would see each other.

    What this lets through is proved at the start of the run: evaluation/separation.py.
    """
    config = model.config.get_text_config()
    recurrent = set(getattr(config, "layer_types", None) or []) & {"linear_attention", "mamba", "recurrent", "conv"}
    if recurrent or getattr(model, "_is_stateful", False):
        why = "it is recurrent"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        why = "it takes no position_ids"
    else:
        return
    raise UserError(
        f"{type(model).__name__}: examples of a packed row would see each other: {why}; set data.packing=none"
    )
