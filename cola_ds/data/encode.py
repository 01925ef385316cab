"""Encoding: rows of a source become token ids, with the spans of those that are trained, as Arrow record batches.

It runs in the process itself or in its workers: nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy

from cola_ds.data.chat import ChatTemplate
from cola_ds.data.conversations import Columns, conversation_of
from cola_ds.data.tokens import CONVERSATION_END, closed_ids_of, cut_pair, pairs_of
from cola_ds.errors import UserError

DIGEST_BYTES = 16
TOO_LONG = "longer than data.max_length"
NOTHING_LEFT = "without a trained token within data.max_length"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that ids follow from, beside the tokenizer and the rows. JSON can say it."""

    kind: str
    """What the rows are, as sources.OpenSource has it."""
    columns: dict[str, str | None]
    max_length: int
    too_long: str
    chat_template: str | None = None
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    system: str | None = None
    tools: list[dict[str, Any]] | None = None


@dataclass
class Counts:
    """What became of rows, in numbers that add up."""

    rows: int = 0
    examples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Examples left out, by why."""
    lost: Counter[str] = field(default_factory=Counter)
    """Examples that lost something to max_length, by what they lost (tokens.LOSSES)."""
    notes: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    """Ids, by the role that they belong to."""
    trained: Counter[str] = field(default_factory=Counter)
    """Of these, the predicted ones that the loss counts."""
    largest_id: int = 0

    def said(self) -> dict[str, Any]:
        """As JSON can say it; `of` takes it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @staticmethod
    def of(said: dict[str, Any]) -> Counts:
        """What `said` gave."""
        return Counts(**{name: Counter(v) if isinstance(v, dict) else v for name, v in said.items()})  # type: ignore[arg-type]

    def add(self, other: Counts) -> None:
        """Take the counts of more rows in."""
        self.rows += other.rows
        self.examples += other.examples
        for name in ("dropped", "lost", "notes", "tokens", "trained"):
            getattr(self, name).update(getattr(other, name))
        self.largest_id = max(self.largest_id, other.largest_id)


class Encoder:
    """Encodes rows of one kind with one tokenizer."""

    def __init__(self, recipe: Recipe, tokenizer: Any):
        """Raises UserError for a tokenizer or a chat template that cannot be used."""
        self.recipe, self.tokenizer = recipe, tokenizer
        self._columns = Columns(**recipe.columns)  # type: ignore[arg-type]
        self._chat = None
        if recipe.kind not in ("pairs", "text"):
            self._chat = ChatTemplate(tokenizer, recipe.chat_template, recipe.loss_on)

    def encode(self, rows: Sequence[tuple[str, Any]], first: int) -> tuple[Any, Counts]:
        """The examples of rows, the first of which is number `first` of its source, as a record batch of SCHEMA, and counts.

        Raises UserError, with the place that it names, for a row that is no example.
        """
        made = _Made(self.recipe)
        made.counts.rows = len(rows)
        if self.recipe.kind == "pairs":
            self._pairs(rows, first, made)
        elif self.recipe.kind == "text":
            self._windows(rows, first, made)
        else:
            self._conversations(rows, first, made)
        return made.batch(), made.counts

    def _pairs(self, rows: Sequence[tuple[str, list[str]]], first: int, made: _Made) -> None:
        for place, (_, completion) in rows:
            if not completion:
                raise UserError(f"{place} has '' in column {self._columns.completion}; it must be text")
        bos, width = self.tokenizer.bos_token_id, self.recipe.max_length
        found = pairs_of([(prompt, completion) for _, (prompt, completion) in rows], self.tokenizer)
        for number, ((place, texts), (ids, start)) in enumerate(zip(rows, found, strict=True), first):
            if len(ids) > width and made.is_left_out(place, len(ids)):
                continue
            ids, start, lost = cut_pair(ids, start, width, bos)
            made.add(number, _digest(texts), ids, [(start, len(ids))])
            made.counts.lost.update(lost)
            made.counts.tokens.update({"prompt": start, "completion": len(ids) - start})
            made.counts.trained["completion"] += len(ids) - max(start, 1)

    def _windows(self, rows: Sequence[tuple[str, list[str]]], first: int, made: _Made) -> None:
        """Plain text, cut into windows of at most max_length ids."""
        width = self.recipe.max_length
        kept = [
            (number, text) for number, (_, (text,)) in enumerate(rows, first) if text.strip()
        ]  # empty lines are common
        found = closed_ids_of([text for _, text in kept], self.tokenizer) if kept else []
        for (number, text), ids in zip(kept, found, strict=True):
            digest = _digest(text)
            # Each window begins with the last id of the one before, so that every id is predicted once.
            for at in range(0, max(len(ids) - 1, 1), width - 1):
                window = ids[at : at + width]
                made.add(number, digest, window, [(1, len(window))] if len(window) > 1 else [])
                made.counts.tokens["text"] += len(window)
                made.counts.trained["text"] += len(window) - 1

    def _conversations(self, rows: Sequence[tuple[str, dict[str, Any]]], first: int, made: _Made) -> None:
        recipe, chat = self.recipe, self._chat
        assert chat is not None
        given = [
            (place, conversation_of(place, row, self._columns, recipe.system, recipe.tools)) for place, row in rows
        ]
        for number, ((place, talk), found) in enumerate(zip(given, chat.encode_all(given), strict=True), first):
            digest = _digest([talk.messages, talk.tools])
            for rendered in found:
                if not rendered.trained:
                    raise UserError(
                        f"{place} has no trained token: data.loss_on {recipe.loss_on} finds nothing to learn in it"
                    )
                if len(rendered.ids) > recipe.max_length:
                    if made.is_left_out(place, len(rendered.ids)):
                        continue
                    rendered = rendered.cut(recipe.max_length)
                    if not rendered.trained:
                        made.counts.dropped[NOTHING_LEFT] += 1
                        continue
                    made.counts.lost[CONVERSATION_END] += 1
                made.add(number, digest, rendered.ids, rendered.spans)
                made.counts.tokens.update(rendered.roles)
                made.counts.trained.update(rendered.trained)
        made.counts.notes.update(chat.notes)
        chat.notes.clear()


class _Made:
    """The examples of some rows, as they are made."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.counts = recipe, Counts()
        self._rows: list[int] = []
        self._digests: list[bytes] = []
        self._ids: list[list[int]] = []
        self._spans: list[list[int]] = []

    def is_left_out(self, place: str, length: int) -> bool:
        """Whether an example that is too long is dropped; it is truncated otherwise. Raises UserError where it may not be
        there."""
        if self.recipe.too_long == "error":
            raise UserError(
                f"{place} has {length} tokens, more than data.max_length {self.recipe.max_length}: shorten it, or set "
                "data.too_long to truncate or drop"
            )
        self.counts.dropped[TOO_LONG] += self.recipe.too_long == "drop"
        return self.recipe.too_long == "drop"

    def add(self, row: int, digest: bytes, ids: list[int], spans: list[tuple[int, int]]) -> None:
        self._rows.append(row)
        self._digests.append(digest)
        self._ids.append(ids)
        self._spans.append([place for span in spans for place in span])

    def batch(self) -> Any:
        """What was added, as a record batch of `schema()`; the counts are complete then."""
        import pyarrow

        self.counts.examples = len(self._rows)
        self.counts.dropped += Counter()  # without what is 0
        batch = pyarrow.record_batch(
            [
                pyarrow.array(self._ids, pyarrow.list_(pyarrow.int32())),
                pyarrow.array(self._spans, pyarrow.list_(pyarrow.int32())),
                pyarrow.array(self._rows, pyarrow.int64()),
                pyarrow.array(self._digests, pyarrow.binary(DIGEST_BYTES)),
            ],
            schema=schema(),
        )
        ids = batch.column(0).values.to_numpy()
        self.counts.largest_id = int(ids.max(initial=0))
        return batch


def schema() -> Any:
    """Of the record batches: an example's ids, the spans [start, end) of its trained ids one after the other, the number of
    its row in the source, and a digest of what the row says."""
    import pyarrow

    return pyarrow.schema(
        [
            pyarrow.field("ids", pyarrow.list_(pyarrow.int32())),
            pyarrow.field("spans", pyarrow.list_(pyarrow.int32())),
            pyarrow.field("row", pyarrow.int64()),
            pyarrow.field("digest", pyarrow.binary(DIGEST_BYTES)),
        ]
    )


def _digest(said: Any) -> bytes:
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=DIGEST_BYTES).digest()


def loss_tokens_of(spans: numpy.ndarray, offsets: numpy.ndarray) -> numpy.ndarray:
    """How many ids the loss counts of each example, from flat pairs of starts and ends, and where each example's begin among
    them: (examples,) int32. The first id of an example has nothing before it to be predicted from."""
    pairs = spans.reshape(-1, 2)
    counted = numpy.concatenate([[0], numpy.cumsum(pairs[:, 1] - numpy.maximum(pairs[:, 0], 1))])
    places = offsets // 2
    return (counted[places[1:]] - counted[places[:-1]]).astype(numpy.int32)
