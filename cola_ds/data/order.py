"""Order: which rows an epoch has, and which examples each of them. Mixing by weight and packing, planned before the first step.

All of it follows from (seed, epoch) and the data's lengths, sizes and weights: every process at every world size plans alike,
without a message. A row is an example; or, where rows are packed, a few that fill it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

_BLOCK = 2**16  # examples of a small source that are drawn at once: whole passes


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of an epoch: the examples of each, one row after the other."""

    examples: numpy.ndarray  # (examples of the epoch,) int64: 0-based places in the data
    starts: numpy.ndarray  # (rows + 1,) int64: where each row begins in `examples`, and at last their number

    def __len__(self) -> int:
        return len(self.starts) - 1

    def between(self, first: int, last: int) -> list[list[int]]:
        """The examples of the rows from `first` up to `last`, which is left out; fewer at the end."""
        bounds = self.starts[first : last + 1].tolist()
        flat = self.examples[bounds[0] : bounds[-1]].tolist() if bounds else []
        return [flat[a - bounds[0] : b - bounds[0]] for a, b in itertools.pairwise(bounds)]


class Order:
    """The rows of each epoch of a dataset. Threads may share it.

    Without weights an epoch is every example once. With weights it has as many examples, and of each source a part in proportion
    to its weight; a source's examples come pass after pass, each pass in an order of its own, and an epoch goes on where the one
    before it stopped. So a small source is repeated evenly, and nothing of a large one is left out for good.
    """

    def __init__(
        self,
        lengths: Sequence[int] | numpy.ndarray,
        source_sizes: Sequence[int] = (),
        source_weights: Sequence[float] | None = None,
        capacity: int | None = None,
    ):
        """`capacity`: tokens of a packed row; None: rows are not packed. Raises ValueError for an example that no row holds."""
        self.lengths = numpy.maximum(numpy.asarray(lengths), 1)
        self.capacity = capacity
        self._sizes = list(source_sizes)
        self._shares = None if source_weights is None else shares(len(lengths), self._sizes, source_weights)
        self._rows: tuple[tuple[int, int], Rows] | None = None
        self._count: tuple[tuple[int, int] | None, int] | None = None
        if capacity is not None and self.lengths.max(initial=1) > capacity:
            raise ValueError(f"an example of {self.lengths.max()} tokens fits no row of {capacity}")

    @property
    def is_even(self) -> bool:
        """Whether all epochs have as many rows: only where lengths are mixed anew, and packed, they may not."""
        return self._shares is None or self.capacity is None

    def count(self, seed: int, epoch: int) -> int:
        """How many rows an epoch (from 0) has."""
        key, kept = None if self.is_even else (seed, epoch), self._count
        if kept is None or kept[0] != key:
            if self.capacity is None:
                found = len(self.lengths)
            else:
                lengths = self.lengths if key is None else self.lengths[self._drawn(seed, epoch)]
                found = sum(each.rows for each in plan_rows(numpy.bincount(lengths), self.capacity) if each.is_new)
            self._count = kept = (key, found)
        return kept[1]

    def rows(self, seed: int, epoch: int) -> Rows:
        """The rows of an epoch (from 0). The last epoch that was asked for is kept."""
        kept = self._rows
        if kept is None or kept[0] != (seed, epoch):
            self._rows = kept = None  # not two of them at a time
            self._rows = kept = ((seed, epoch), self._made(seed, epoch))
        return kept[1]

    def filled(self, seed: int) -> float:
        """Packing efficiency: the part of the first epoch's packed rows that is not padding."""
        assert self.capacity is not None
        rows = self.rows(seed, 0)
        return float(self.lengths[rows.examples].sum(dtype=numpy.int64)) / (len(rows) * self.capacity)

    def _made(self, seed: int, epoch: int) -> Rows:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        examples = torch.randperm(len(self.lengths), generator=generator).numpy()
        if self._shares is not None:
            examples = self._drawn(seed, epoch)[examples]
        if self.capacity is None:
            return Rows(examples, numpy.arange(len(examples) + 1))
        rows = best_fit(self.lengths[examples], self.capacity)
        order = torch.randperm(len(rows), generator=generator).numpy()
        sizes = numpy.diff(rows.starts)[order]
        starts = numpy.concatenate([[0], numpy.cumsum(sizes)])
        places = numpy.repeat(rows.starts[order] - starts[:-1], sizes) + numpy.arange(len(examples))
        return Rows(examples[rows.examples[places]], starts)

    def _drawn(self, seed: int, epoch: int) -> numpy.ndarray:  # -> (examples,) int64
        """The examples of an epoch whose sources have weights, source by source."""
        assert self._shares is not None
        firsts = numpy.cumsum([0, *self._sizes])
        parts = [
            firsts[source] + draw(seed, source, size, epoch * share, (epoch + 1) * share)
            for source, (size, share) in enumerate(zip(self._sizes, self._shares, strict=True))
            if share
        ]
        return numpy.concatenate(parts)


def shares(examples: int, sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many of `examples` each source gives, in proportion to its weight (largest remainder): exactly so many together, and at
    least one of each source that has any, where there are enough."""
    given = numpy.where(numpy.asarray(sizes) > 0, numpy.asarray(weights, dtype=float), 0.0)
    wanted = given / given.sum() * examples
    found = numpy.floor(wanted).astype(numpy.int64)
    most = numpy.argsort(found - wanted, kind="stable")[: examples - found.sum()]
    found[most] += 1
    for source in numpy.flatnonzero((found == 0) & (given > 0)):
        if found.max() > 1:
            found[found.argmax()] -= 1
            found[source] = 1
    return found.tolist()


def draw(seed: int, source: int, size: int, first: int, last: int) -> numpy.ndarray:  # -> (last - first,) int64
    """What an endless stream of a source's `size` examples has from place `first` up to `last`: pass after pass, each a
    permutation by (seed, source, pass)."""
    passes = max(1, _BLOCK // size)  # drawn together
    width = passes * size
    blocks = []
    for block in range(first // width, -(-last // width)):
        (state,) = numpy.random.SeedSequence((seed, source, block)).generate_state(1, numpy.uint64)
        generator = torch.Generator().manual_seed(int(state) % 2**63)
        keys = torch.rand(passes, size, generator=generator, dtype=torch.float64)
        drawn = keys.argsort(dim=1, stable=True).flatten().numpy()
        begin = block * width
        blocks.append(drawn[max(first - begin, 0) : last - begin])
    return numpy.concatenate(blocks)


@dataclass(frozen=True)
class Placement:
    """A part of a packing plan: so many rows, with `room` tokens left, get `each` examples of one length."""

    length: int
    room: int
    rows: int
    each: int
    is_new: bool
    """Whether these rows begin here: they were not there before."""


def plan_rows(counts: numpy.ndarray, capacity: int) -> list[Placement]:
    """Best-fit decreasing: rows of `capacity` tokens for `counts[n]` examples of each length n.

    The longest example comes first, and each goes where it leaves least room, or begins a row where it fits nowhere. Examples
    of one length, and rows with one room left, are alike: they are placed together, and there are far fewer of such groups than
    of examples.
    """
    plan = []
    rows_with: dict[int, int] = {}  # by the room that they have left
    rooms: list[int] = []  # its keys, in order
    for length in numpy.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            place = bisect.bisect_left(rooms, length)
            is_new = place == len(rooms)
            room = capacity if is_new else rooms[place]
            each = min(room // length, left)  # a row that fits stays the best fit, until it is full
            rows = left // each if is_new else min(left // each, rows_with[room])
            plan.append(Placement(length, room, rows, each, is_new))
            left -= rows * each
            if not is_new:
                rows_with[room] -= rows
                if not rows_with[room]:
                    del rows_with[room], rooms[place]
            rest = room - each * length
            if rest:
                if rest not in rows_with:
                    bisect.insort(rooms, rest)
                rows_with[rest] = rows_with.get(rest, 0) + rows
    return plan


def best_fit(lengths: numpy.ndarray, capacity: int) -> Rows:
    """Best-fit decreasing of examples into rows of at most `capacity` tokens. Those of one length are dealt in the order that
    they have in `lengths`; a row's longest comes first."""
    by_length = numpy.argsort(-lengths, kind="stable")
    row_of = numpy.empty(len(lengths), dtype=numpy.int64)  # of the examples in that order
    waiting: dict[int, list[numpy.ndarray]] = {}  # rows by the room that they have left
    dealt = rows = 0
    for part in plan_rows(numpy.bincount(lengths), capacity):
        if part.is_new:
            chosen = numpy.arange(rows, rows + part.rows)
            rows += part.rows
        else:
            there = numpy.concatenate(waiting.pop(part.room))
            chosen = there[: part.rows]
            if len(there) > part.rows:
                waiting[part.room] = [there[part.rows :]]
        placed = part.rows * part.each
        row_of[dealt : dealt + placed] = numpy.repeat(chosen, part.each)
        dealt += placed
        waiting.setdefault(part.room - part.each * part.length, []).append(chosen)
    starts = numpy.concatenate([[0], numpy.cumsum(numpy.bincount(row_of, minlength=rows))])
    return Rows(by_length[numpy.argsort(row_of, kind="stable")], starts)
