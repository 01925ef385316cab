"""The rows of an epoch: every example once, or by the weights of its source; alone in a row, or packed."""

import random
import time

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ds.data.order import Order, best_fit, draw, shares


def rows_of(order, seed=0, epoch=0):
    rows = order.rows(seed, epoch)
    assert len(rows) == order.count(seed, epoch)
    return rows.between(0, len(rows))


def mixed_lengths(count, capacity, seed=0):
    drawn = numpy.random.default_rng(seed).lognormal(4, 0.8, count)
    return numpy.clip(drawn.astype(numpy.int32), 1, capacity)


def best_fit_by_hand(lengths, capacity):
    """Best-fit decreasing, example by example: the lengths in each row."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def test_without_weights_and_packing_the_order_is_what_it_was():
    order = Order([5] * 37)
    for seed, epoch in [(0, 0), (3, 2), (0, 0)]:
        expected = torch.randperm(37, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        assert rows_of(order, seed, epoch) == [[index] for index in expected]


def test_rows_between():
    rows = Order([3, 3, 3, 3, 3], capacity=7).rows(0, 0)
    whole = rows.between(0, 3)
    assert sorted(map(len, whole)) == [1, 2, 2]
    assert [rows.between(at, at + 1)[0] for at in range(3)] == whole
    assert rows.between(2, 9) == whole[2:]
    assert rows.between(3, 9) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_packed_rows_are_those_of_plain_best_fit(lengths, capacity):
    rows = best_fit(numpy.array(lengths, dtype=numpy.int32), capacity)
    found = rows.between(0, len(rows))
    assert sorted(index for row in found for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in found]
    assert all(0 < tokens <= capacity for tokens in filled)
    # Which of several rows with one room left an example goes to is open; what the rows are filled with is not.
    assert sorted(filled) == sorted(map(sum, best_fit_by_hand(lengths, capacity)))


def test_packing_fills_rows():
    lengths = mixed_lengths(20_000, 512)
    packed = Order(lengths, capacity=512)
    assert packed.filled(0) == lengths.sum() / (packed.count(0, 0) * 512) > 0.99
    assert lengths.sum() / (len(lengths) * 512) < 0.25  # what padding to the width of a row would give


def test_each_epoch_packs_every_example_once_and_anew():
    lengths = mixed_lengths(3000, 256)
    order = Order(lengths, capacity=256)
    epochs = [rows_of(order, 1, epoch) for epoch in range(3)]
    for rows in epochs:
        assert sorted(index for row in rows for index in row) == list(range(3000))
        assert all(lengths[row].sum() <= 256 for row in rows)
    together = [{frozenset(row) for row in rows if len(row) > 1} for rows in epochs]
    assert len(together[0] & together[1]) < 0.2 * len(together[0])  # who shares a row differs
    assert [len(row) for row in epochs[0]] != [len(row) for row in epochs[1]]  # and which row comes when
    assert rows_of(order, 1, 0) == epochs[0] != rows_of(order, 2, 0)
    # The rows come in a random order, not the fullest or longest first.
    longest = [max(lengths[row]) for row in epochs[0]]
    assert longest != sorted(longest, reverse=True)


def test_an_example_that_fits_no_row():
    with pytest.raises(ValueError, match="an example of 9 tokens fits no row of 8"):
        Order([1, 9], capacity=8)


def test_shares_of_an_epoch():
    assert shares(100, [50, 50], [1, 1]) == [50, 50]
    assert shares(100, [90, 10], [1, 1]) == [50, 50]
    assert shares(10, [5, 3, 2], [1, 1, 1]) == [4, 3, 3]
    assert shares(100, [98, 1, 1], [1000, 1, 1]) == [98, 1, 1]  # at least one of each
    assert shares(100, [100, 0], [1, 9]) == [100, 0]  # a source that has nothing gives nothing
    for total in range(3, 50):
        assert sum(shares(total, [total - 2, 1, 1], [0.5, 0.3, 0.2])) == total


@pytest.mark.parametrize("capacity", [None, 64])
def test_weights_over_epochs(capacity):
    """Sources of 90, 8 and 2 examples: each gives its part of every epoch, evenly, and all of the large one comes."""
    lengths = [random.Random(0).randrange(1, 30) for _ in range(100)]
    order = Order(lengths, [90, 8, 2], [0.5, 0.3, 0.2], capacity)
    seen = numpy.zeros(100, dtype=int)
    for epoch in range(9):
        flat = [index for row in rows_of(order, 5, epoch) for index in row]
        assert [sum(a <= i < b for i in flat) for a, b in [(0, 90), (90, 98), (98, 100)]] == [50, 30, 20]
        assert flat != sorted(flat)
        numpy.add.at(seen, flat, 1)
        for part in (seen[:90], seen[90:98], seen[98:]):  # at any time, none is ahead by more than one
            assert part.max() - part.min() <= 1
    assert seen[:90].tolist() == [5] * 90  # 450 in 9 epochs


@pytest.mark.parametrize("size", [1, 3, 1000, 70_000])
def test_a_stream_goes_on_where_it_stopped(size):
    whole = draw(7, 1, size, 0, 140_000)
    parts = [draw(7, 1, size, a, b) for a, b in [(0, 10), (10, 69_999), (69_999, 70_001), (70_001, 140_000)]]
    assert numpy.array_equal(numpy.concatenate(parts), whole)
    for begin in range(0, 140_000 // size * size, size)[:50]:
        assert sorted(whole[begin : begin + size].tolist()) == list(range(size))
    if size > 3:
        assert not numpy.array_equal(whole[:size], whole[size : 2 * size]) or size > 70_000
        assert not numpy.array_equal(whole[:size], draw(8, 1, size, 0, size))
        assert not numpy.array_equal(whole[:size], draw(7, 2, size, 0, size))


def test_epochs_are_uneven_where_mixing_and_packing_meet():
    lengths = [60] * 40 + [7] * 60
    assert Order(lengths, [40, 60], [1, 1]).is_even
    assert Order(lengths, capacity=64).is_even
    mixed = Order([*range(1, 65)] * 2, [28, 100], [1, 1], capacity=64)
    assert not mixed.is_even
    counts = [mixed.count(0, epoch) for epoch in range(20)]
    assert len(set(counts)) > 1
    assert counts == [len(mixed.rows(0, epoch)) for epoch in range(20)]


def test_a_million_examples_take_seconds():
    lengths = mixed_lengths(1_000_000, 4096)
    order = Order(lengths, [999_990, 10], [1, 1], capacity=4096)
    begin = time.process_time()
    assert len(order.rows(0, 0)) == order.count(0, 0)
    assert time.process_time() - begin < 10  # it takes about one
