"""Datasets of text: rows from files or the hub, as token ids."""

from __future__ import annotations

import array
import collections
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy

from cola_ds.config.inputs import find_files
from cola_ds.config.schema import DataConfig
from cola_ds.data.arrow import arrow_texts, check_arrow
from cola_ds.data.batch import Batch, PackedBatch
from cola_ds.data.collate import Example, collate
from cola_ds.data.columns import Texts
from cola_ds.data.files import text_rows
from cola_ds.data.hub import load_hub
from cola_ds.data.packing import collate_packed
from cola_ds.data.tokens import closed_ids_of, cut_pair, pairs_of
from cola_ds.errors import UserError, some_of

_BATCH_ROWS, _BATCH_LETTERS = 1000, 2_000_000  # of what is tokenized at once
_Encoded = tuple[list[int], int, list[str]]  # ids, those of the prompt, what was lost


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenizedData:
    """Dataset of text: prompts with their completions, or windows of plain text."""

    ids: numpy.ndarray  # (all ids,) int32
    """Those of all examples, one after the other."""
    starts: numpy.ndarray  # (examples + 1,) int64
    """Where each example begins in `ids`, and at last their number."""
    prompt_lengths: list[int]
    """Ids of each example before the loss begins."""
    lengths: list[int]
    """Token ids of each example."""
    loss_tokens: list[int]
    """Predicted ids of each example that the loss counts."""
    lost: collections.Counter[str]
    """Examples that lost something to max_length, by what they lost."""
    largest_id: int
    source_sizes: tuple[int, ...] = ()
    """Examples of each source, one source after the other."""
    source_weights: tuple[float, ...] | None = None
    """What each source has of an epoch, beside the others'; None: every example once."""

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> list[int]:
        """The ids of one."""
        return self.ids[self.starts[index] : self.starts[index + 1]].tolist()

    def collate(self, indices: list[int]) -> Batch:
        """A micro batch of these examples; without any, one that counts nothing."""
        return collate([self._with_spans(i) for i in indices])

    def collate_packed(self, rows: list[list[int]]) -> PackedBatch:
        """A micro batch of rows of these examples; without any, one that counts nothing."""
        return collate_packed([[self._with_spans(i) for i in row] for row in rows])

    def _with_spans(self, index: int) -> Example:
        return self.ids[self.starts[index] : self.starts[index + 1]], [
            (self.prompt_lengths[index], self.lengths[index])
        ]

    def fingerprint(self) -> str:
        """SHA-256 of all token ids and of where each example's loss begins, in order."""
        digest = hashlib.sha256(numpy.array(self.lengths, dtype=numpy.int64).tobytes())
        for first in range(0, len(self), 1000):
            last = min(first + 1000, len(self))
            digest.update(self.ids[self.starts[first] : self.starts[last]].tobytes())
            digest.update(numpy.array(self.prompt_lengths[first:last], dtype=numpy.int32).tobytes())
        return digest.hexdigest()


def load_split(config: DataConfig, split: str, tokenizer: Any) -> TokenizedData:
    """Read and tokenize `split`, "train" or "eval".

    Raises UserError for a file that is missing, empty or cannot be parsed, and, with file and line, for a row without a column,
    with a value that is not text, or without a completion.
    """
    names = getattr(config, split)
    assert names is not None
    try:
        rows = _local_rows(config, names) if config.hub is None else _hub_rows(config, names)
        return _encoded(rows, config, tokenizer, names)
    except UserError as error:
        raise UserError(f"data.{split} {error}") from None


def columns_of(config: DataConfig) -> list[str]:
    """The columns that are read."""
    return [config.text] if config.text is not None else [config.prompt, config.completion]


def _local_rows(config: DataConfig, names: str | list[str]) -> Texts:
    for name in [names] if isinstance(names, str) else names:
        for path in find_files(name):
            yield from text_rows(path, columns_of(config))


def _hub_rows(config: DataConfig, split: str) -> Texts:
    assert config.hub is not None
    try:
        rows = load_hub(config.hub, config.hub_config, split, config.revision)
    except UserError as error:
        raise UserError(f"split {split} of data.hub {config.hub} cannot be loaded: {error}") from None
    columns = columns_of(config)
    source = f"split {split} of data.hub {config.hub}"
    check_arrow(source, rows.features.arrow_schema, columns)
    tables = rows.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH_ROWS)
    yield from arrow_texts(source, tables, columns)


def _encoded(rows: Texts, config: DataConfig, tokenizer: Any, names: str | list[str]) -> TokenizedData:
    named = names if isinstance(names, str) else some_of(names)
    ids, lengths, prompt_lengths = array.array("i"), array.array("q"), array.array("i")
    lost: collections.Counter[str] = collections.Counter()
    empty = True
    for texts in _batches(rows, config):
        empty = False
        encode = _pairs if config.text is None else _windows
        for example, prompt_length, what in encode(texts, tokenizer, config.max_length):
            ids.extend(example)
            lengths.append(len(example))
            prompt_lengths.append(prompt_length)
            lost.update(what)
    if empty:
        raise UserError(f"{named} is empty: it needs at least one row")
    # The first id of an example has nothing before it to be predicted from.
    loss_tokens = [length - max(start, 1) for length, start in zip(lengths, prompt_lengths, strict=True)]
    if not any(n > 0 for n in loss_tokens):
        raise UserError(f"{named} leaves nothing to predict: it has no text of two tokens or more")
    flat = numpy.frombuffer(ids, dtype=numpy.int32)
    starts = numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])
    return TokenizedData(
        ids=flat,
        starts=starts,
        prompt_lengths=prompt_lengths.tolist(),
        lengths=lengths.tolist(),
        loss_tokens=loss_tokens,
        lost=lost,
        largest_id=int(flat.max(initial=0)),
    )


def _batches(rows: Texts, config: DataConfig) -> Iterator[list[list[str]]]:
    """Rows to tokenize together: as many as hold a few million letters, so that little memory is needed at a time."""
    batch, letters = [], 0
    for place, row in rows:
        if config.text is None and not row[1]:
            raise UserError(f"{place} has '' in column {config.completion}; it must be text")
        batch.append(row)
        letters += sum(map(len, row))
        if len(batch) == _BATCH_ROWS or letters > _BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _pairs(rows: list[list[str]], tokenizer: Any, max_length: int) -> Iterator[_Encoded]:
    for ids, prompt_length in pairs_of([(prompt, completion) for prompt, completion in rows], tokenizer):
        yield cut_pair(ids, prompt_length, max_length, tokenizer.bos_token_id)


def _windows(rows: list[list[str]], tokenizer: Any, width: int) -> Iterator[_Encoded]:
    """Plain text, cut into windows of at most `width` ids."""
    texts = [text for (text,) in rows if text.strip()]  # empty lines between paragraphs are common
    for ids in closed_ids_of(texts, tokenizer) if texts else ():
        # Each window begins with the last id of the one before, so that every id is predicted once.
        for at in range(0, max(len(ids) - 1, 1), width - 1):
            yield ids[at : at + width], 1, []
