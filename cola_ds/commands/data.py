"""`cola-ds data`: what a run would be trained and evaluated on, before it is. Only the tokenizer is loaded, no weights."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy

from cola_ds import notices
from cola_ds.config.schema import RunConfig
from cola_ds.data.cache import cache_folder, clean
from cola_ds.data.order import Order
from cola_ds.data.text import SplitFacts, TokenizedData, datasets_of, facts_of, overlaps, watched_of
from cola_ds.data.tokenize import check_sources, tokenize
from cola_ds.data.tokenizer import load_tokenizer
from cola_ds.errors import UserError, counted, inline

_BINS, _BAR = 10, 40
_COLOR, _PLAIN = "\x1b[32m", "\x1b[0m"
_MARKS = "⟦", "⟧"  # where there is no colour


@dataclass(frozen=True)
class Look:
    """What there is to see."""

    text: str
    lengths: dict[str, numpy.ndarray]
    """Tokens of each example, by split."""


def look(config: RunConfig, show: int, color: bool) -> Look:
    """Tokenize the data as a run would, or find it in the cache, and describe it for people: sources, lengths, roles, packing,
    what was left out, and the first `show` examples of each split with their trained tokens marked.

    Raises UserError for all that a run refuses in its data, and for a task, whose rows are another matter.
    """
    if config.data.task is not None:
        raise UserError(
            f"data.task {config.data.task}: cola-ds data looks at data.train; of a task, cola-ds train --dry-run says what it has"
        )
    if config.data.train is None:
        raise UserError("data.train is missing: it names what is looked at")
    tokenizer = load_tokenizer(config.model)
    check_sources(config.data)
    with notices.Progress("tokenizing", "row") as progress:
        found = tokenize(config.data, tokenizer, config.model, progress=progress.at)
    train, held_out = datasets_of(config.data, found)
    others = {"eval": held_out, "watch": watched_of(config.data, found)}
    splits = {"train": train} | {split: data for split, data in others.items() if data is not None}
    lines = []
    for split, data in splits.items():
        lines += [split, *_split(config, split, data, facts_of(config.data, split, data, found))]
        for index in range(min(show, len(data))):
            lines += [f"  example {index}", *_shown(data, index, tokenizer, color)]
        lines.append("")
    lines += overlaps(found)
    lines += [f"warning: {what}" for what in found.warnings]
    return Look("\n".join(lines).rstrip("\n"), {split: data.lengths for split, data in splits.items()})


def clean_cache(config: RunConfig) -> str:
    """Remove what runs have kept in the folder of data.cache, and say how much it was. Nothing of anybody else's is touched."""
    folder = cache_folder(config.data)
    if folder is None:
        raise UserError("data.cache none keeps nothing: there is nothing to remove")
    try:
        entries, size = clean(folder)
    except OSError as error:
        raise UserError(f"data.cache {folder} cannot be cleaned: {error.strerror or error}") from None
    return f"removed {counted(entries, 'tokenized source')}, {counted(size, 'byte')}, from {folder}"


def _split(config: RunConfig, split: str, data: TokenizedData, facts: SplitFacts) -> Iterator[str]:
    held = split == "eval" and config.data.holds_out
    if held:
        yield _line("source", "held out of data.train")
    else:
        for source in facts.sources:
            counts = source.tokens.counts
            where = "from the cache" if source.tokens.found else "tokenized now"
            yield _line(
                "source",
                f"{inline(source.name, 200)} ({source.tokens.kind}, {where}): {counted(counts.rows, 'row')}, "
                f"{counted(source.examples, 'example')}",
            )
    tokens, trained = int(data.lengths.sum()), int(data.loss_tokens.sum())
    yield _line("examples", f"{len(data):,}: {tokens:,} tokens, {trained:,} of them trained ({trained / tokens:.1%})")
    if not held:
        yield from _roles(facts)
    yield from _histogram(data.lengths)
    if split == "train":
        yield _line("rows", _packing(config, data))
    yield from _what_became(config, facts, held)


def _roles(facts: SplitFacts) -> Iterator[str]:
    """Of the sources, whole: the split may leave some of their examples out."""
    tokens: Counter[str] = sum((each.tokens.counts.tokens for each in facts.sources), Counter())
    trained: Counter[str] = sum((each.tokens.counts.trained for each in facts.sources), Counter())
    for role, number in tokens.most_common():
        yield _line("role", f"{inline(role, 40)}: {number:,} tokens, {trained[role]:,} of them trained")


def _histogram(lengths: numpy.ndarray) -> Iterator[str]:
    low, high = int(lengths.min()), int(lengths.max())
    mean, middle = lengths.mean(), int(numpy.median(lengths))
    yield _line("lengths", f"{low:,} to {high:,} tokens, median {middle:,}, mean {mean:,.1f}")
    width = -(-(high - low + 1) // _BINS)
    counts = numpy.bincount((lengths - low) // width)
    for place, count in enumerate(counts.tolist()):
        first = low + place * width
        bar = "#" * -(-count * _BAR // int(counts.max()))
        yield f"  {first:>10,} - {first + width - 1:<10,} {count:>10,} {bar}".rstrip()


def _packing(config: RunConfig, data: TokenizedData) -> str:
    """Of the first epoch."""
    room = config.data.max_length
    order = Order(data.lengths, data.source_sizes, data.source_weights, room)
    rows = order.rows(config.run.seed, 0)
    full = data.lengths[rows.examples].sum() / (len(rows) * room)
    packed = f"{counted(len(rows), 'row')} of {room:,} tokens, {full:.1%} full"
    if config.data.packing != "none":
        return f"packed: {packed}"
    alone = data.lengths.mean() / room
    return f"an example each, {alone:.1%} of data.max_length {room:,} full; with data.packing=best_fit {packed}"


def _what_became(config: RunConfig, facts: SplitFacts, held: bool) -> Iterator[str]:
    if held:
        return
    counts = [each.tokens.counts for each in facts.sources]
    for why, number in sum((each.dropped for each in counts), Counter[str]()).items():
        yield _line("left out", f"{number:,}: {why}")
    for what, number in sum((each.lost for each in counts), Counter[str]()).items():
        yield _line("cut", f"{number:,} lost {what}, too long for data.max_length")
    if facts.duplicates:
        dropped = ", and left out" if config.data.duplicates == "drop" else ""
        yield _line("duplicates", f"{counted(facts.duplicates, 'row')} there twice{dropped}")
    if facts.held_out:
        yield _line("held out", counted(facts.held_out, "example"))
    for what, number in sum((each.notes for each in counts), Counter[str]()).items():
        yield _line("note", f"{number:,} {what}")


def _line(name: str, text: str) -> str:
    return f"  {name:<11} {text}"


def _shown(data: TokenizedData, index: int, tokenizer: Any, color: bool) -> Iterator[str]:
    """An example as text, with what is trained of it marked. What the text has of control characters is escaped: it cannot drive
    a terminal."""
    ids, spans = data.example(index)
    begin, end = (_COLOR, _PLAIN) if color else _MARKS
    trained = [(int(first), int(last)) for first, last in spans]
    bounds = sorted({0, len(ids), *(place for span in trained for place in span)})
    text, before = "", ""
    for first, last in itertools.pairwise(bounds):
        # What a token adds to a text is not always what it is alone: a first piece may lose its space.
        so_far = tokenizer.decode(ids[:last].tolist(), clean_up_tokenization_spaces=False)
        alone = tokenizer.decode(ids[first:last].tolist(), clean_up_tokenization_spaces=False)
        piece = _escaped(so_far[len(before) :] if so_far.startswith(before) else alone)
        text += f"{begin}{piece}{end}" if any(a <= first < b for a, b in trained) else piece
        before = so_far
    for line in text.split("\n"):
        yield f"    {line}"


def _escaped(text: str) -> str:
    return "".join(
        letter
        if letter == "\n" or (letter.isprintable() and letter not in _MARKS)
        else letter.encode("unicode_escape").decode()
        for letter in text
    )
