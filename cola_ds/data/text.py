"""Datasets of text: pairs, conversations and plain text from files or the hub, as token ids that are memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from cola_ds.config.schema import DataConfig
from cola_ds.data.batch import Batch, PackedBatch
from cola_ds.data.cache import Tokens, digests_of, flat, rows_of
from cola_ds.data.collate import collate
from cola_ds.data.encode import loss_tokens_of
from cola_ds.data.packing import collate_packed
from cola_ds.data.sources import sources_of
from cola_ds.data.tokenize import Found
from cola_ds.errors import UserError, counted


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What became of a source's rows."""

    name: str
    tokens: Tokens
    examples: int
    """Of this split."""


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """What a split is made of."""

    sources: list[SourceFacts]
    duplicates: int
    """Rows whose content an earlier row of the split's sources has; with data.duplicates=drop they are left out."""
    held_out: int
    """Examples of these sources on the other side, with data.eval_fraction and data.eval_examples."""
    warnings: list[str]


class TokenizedData:
    """Dataset of text: pairs, conversations, or windows of plain text. It holds places of examples; their ids are mapped."""

    def __init__(self, config: DataConfig, split: str, tokens: list[Tokens], chosen: list[numpy.ndarray]):
        """`chosen` has the examples of each source that are in the split, by their number in the source, in order."""
        weights = [each.weight for each in sources_of(config, split)]
        self.source_sizes = [len(each) for each in chosen]
        """Examples of each source; one after the other."""
        self.source_weights = [float(each) for each in weights if each is not None] or None
        """The shares of an epoch; None: every example once."""
        self.packing, self.max_length = config.packing, config.max_length
        self._contents = [each.content for each in tokens]
        self._whole = self.source_sizes == [each.counts.examples for each in tokens]
        batches = [batch for each in tokens for batch in each.batches]
        self._ids = [flat(batch.column(0)) for batch in batches]
        self._spans = [flat(batch.column(1)) for batch in batches]
        self._starts = numpy.cumsum([0, *(batch.num_rows for batch in batches)])  # of each batch, among all examples
        self._chosen = numpy.concatenate([first + own for first, own in zip(_firsts(tokens), chosen, strict=True)])
        self.lengths = _joined([numpy.diff(offsets) for _, offsets in self._ids])[self._chosen]
        """Token ids of each example: (examples,) int32."""
        self.loss_tokens = _joined([loss_tokens_of(*each) for each in self._spans])[self._chosen]
        """Predicted ids of each example that the loss counts: (examples,) int32."""
        self.predictions = self.loss_tokens
        self.largest_id = max(each.counts.largest_id for each in tokens)
        self.lost: Counter[str] = sum((each.counts.lost for each in tokens), Counter())
        """Examples that lost something to max_length, by what they lost."""

    def __len__(self) -> int:
        return len(self._chosen)

    def example(self, index: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The ids of one, (length,) int32, and the spans of those that are trained, (k, 2) int32: [start, end), in order."""
        place = self._chosen[index]
        batch = int(numpy.searchsorted(self._starts, place, side="right")) - 1
        at = place - self._starts[batch]
        (ids, begins), (spans, firsts) = self._ids[batch], self._spans[batch]
        return ids[begins[at] : begins[at + 1]], spans[firsts[at] : firsts[at + 1]].reshape(-1, 2)

    def collate(self, indices: list[int]) -> Batch:
        """A micro batch of these examples; without any, one that counts nothing."""
        return collate([self.example(i) for i in indices])

    def collate_packed(self, rows: list[list[int]], padded_to: tuple[int, int] | None = None) -> PackedBatch:
        """A micro batch of rows of these examples; without any, one that counts nothing. `padded_to` as in packing.py."""
        return collate_packed([[self.example(i) for i in row] for row in rows], padded_to)

    def fingerprint(self) -> str:
        """SHA-256 that follows from all token ids, from which are trained, and from what makes the rows of an epoch of them."""
        if self._whole and len(self._contents) == 1 and self.packing == "none":
            return self._contents[0]
        digest = hashlib.sha256(json.dumps([self._contents, self.source_weights, self.packing]).encode())
        if self.packing != "none":
            digest.update(str(self.max_length).encode())
        if not self._whole:
            digest.update(self._chosen.astype(numpy.int64).tobytes())
        return digest.hexdigest()


def datasets_of(config: DataConfig, found: Found) -> tuple[TokenizedData, TokenizedData | None]:
    """The training and the held-out examples of what has been tokenized. Raises UserError where nothing is left of one."""
    tokens = found.splits["train"]
    trained, held = _sides(config, tokens, "train")
    train = TokenizedData(config, "train", tokens, trained)
    if config.holds_out:
        return train, TokenizedData(config, "train", tokens, held)
    if config.eval is None:
        return train, None
    tokens = found.splits["eval"]
    return train, TokenizedData(config, "eval", tokens, _sides(config, tokens, "eval")[0])


def watched_of(config: DataConfig, found: Found) -> TokenizedData | None:
    """The examples of data.watch; None where it names nothing."""
    tokens = found.splits.get("watch")
    return TokenizedData(config, "watch", tokens, _sides(config, tokens, "watch")[0]) if tokens else None


def _sides(config: DataConfig, tokens: list[Tokens], split: str) -> tuple[list[numpy.ndarray], list[numpy.ndarray]]:
    """The examples of each source that stay in a split, and those that are held out of it, by their numbers in the source.

    Which are held out follows from what the rows say alone: the digests of their contents are as good as drawn, and the least of
    them are taken. Of a content that is there twice, the first row is evaluated.
    """
    holds_out = split == "train" and config.holds_out
    if not holds_out and config.duplicates == "keep":
        return [numpy.arange(each.counts.examples) for each in tokens], []
    digests, rows = _contents(tokens)
    found, firsts, which = numpy.unique(digests, return_index=True, return_inverse=True)
    is_first = rows == rows[firsts][which]
    held = numpy.zeros(len(rows), dtype=bool)
    if holds_out:
        count = config.eval_examples or max(1, round((config.eval_fraction or 0) * len(found)))
        if count >= len(found):
            key = "eval_examples" if config.eval_examples else "eval_fraction"
            raise UserError(
                f"data.{key} {getattr(config, key)} leaves nothing to train on: data.train has {len(found)} examples that differ"
            )
        held = which < count
    stays = ~held & (is_first if config.duplicates == "drop" else True)
    firsts_of = _firsts(tokens)
    return [
        [
            numpy.flatnonzero(side[first : first + each.counts.examples])
            for first, each in zip(firsts_of, tokens, strict=True)
        ]
        for side in (stays, held & is_first)
    ]  # type: ignore[return-value]


def _contents(tokens: list[Tokens]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Of each example of all sources, what its row says, as a digest, and the number of that row among those of all."""
    first, digests, rows = 0, [], []
    for each in tokens:
        for batch in each.batches:
            digests.append(digests_of(batch))
            rows.append(rows_of(batch) + first)
        first += each.counts.rows
    return numpy.concatenate(digests), numpy.concatenate(rows)


def _firsts(tokens: list[Tokens]) -> list[int]:
    """The number of each source's first example among all."""
    return numpy.cumsum([0, *(each.counts.examples for each in tokens)])[:-1].tolist()


def _joined(parts: list[numpy.ndarray]) -> numpy.ndarray:
    return numpy.concatenate([*parts, numpy.empty(0, dtype=numpy.int32)]).astype(numpy.int32)


def facts_of(config: DataConfig, split: str, data: TokenizedData, found: Found) -> SplitFacts:
    """What a split is made of, for people; `split` is "train", "eval" or "watch"."""
    own = split if split in found.splits else "train"
    tokens = found.splits[own]
    duplicates = tokens[0].duplicates
    if len(tokens) > 1:
        digests, rows = _contents(tokens)
        first = numpy.append(True, rows[1:] != rows[:-1])
        duplicates = int(first.sum()) - len(numpy.unique(digests))
    named = zip(sources_of(config, own), tokens, data.source_sizes, strict=True)
    return SplitFacts(
        sources=[SourceFacts(name=source.name, tokens=each, examples=size) for source, each, size in named],
        duplicates=duplicates,
        held_out=sum(each.counts.examples for each in tokens) - len(data) if config.holds_out and own == "train" else 0,
        warnings=found.warnings,
    )


def overlaps(found: Found) -> Iterator[str]:
    """What rows of data.eval and data.watch are in data.train too, by their content; for people."""
    train, _ = _contents(found.splits["train"])
    for split in ("eval", "watch"):
        if split not in found.splits:
            continue
        held, rows = _contents(found.splits[split])
        first = numpy.append(True, rows[1:] != rows[:-1])
        if both := int(numpy.isin(held[first], train).sum()):
            yield f"{counted(both, 'row')} of data.{split} in data.train too"
