"""Rows of whole examples as batches, and how they are dealt among processes."""

import pytest
import torch

from cola_ds.data.batch import IGNORED, Batch, PackedBatch
from cola_ds.data.batcher import Batcher, batches_by_length
from cola_ds.data.collate import collate
from cola_ds.data.order import Order
from cola_ds.data.packing import collate_packed


def test_a_row_by_hand():
    batch = collate_packed([[([1, 5, 6, 7], [(2, 4)]), ([1, 8], [(0, 2)])], [([9, 9, 9], [(1, 2)])]])
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 1, 8], [9, 9, 9, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert batch.positions.tolist() == [0, 1, 2, 4]
    # Nothing predicts the first id of an example: at place 3, where 1 comes next, nothing counts.
    assert batch.labels.tolist() == [[IGNORED, 6, 7, 8], [9, IGNORED, IGNORED, IGNORED]]
    assert batch.counted() == 4
    assert batch.cu_seq_lens.tolist() == [0, 4, 6, 9, 12]  # the padding of a row stands by itself
    assert batch.longest == 4
    first = batch.first()  # an example, as everywhere
    assert (first.input_ids.tolist(), first.position_ids.tolist()) == ([[1, 5, 6, 7]], [[0, 1, 2, 3]])
    assert (first.positions.tolist(), first.labels.tolist()) == ([0, 1, 2], [[IGNORED, 6, 7]])
    assert (first.cu_seq_lens.tolist(), first.longest, first.counted()) == ([0, 4], 4, 2)
    assert torch.equal(batch.to(torch.device("cpu")).position_ids, batch.position_ids)

    seen = [["".join("x" if value == 0 else "." for value in query) for query in row[0].tolist()]
            for row in batch.attention_mask(torch.float32)]  # fmt: skip
    assert seen[0] == ["x.....", "xx....", "xxx...", "xxxx..", "....x.", "....xx"]
    assert seen[1] == ["x.....", "xx....", "xxx...", "...x..", "....x.", ".....x"]


def test_transformers_finds_the_examples_in_the_positions():
    from transformers.masking_utils import find_packed_sequence_indices

    batch = collate_packed([[([3], []), ([4], []), ([5, 6], [])], [([9, 9, 9], [])]])
    assert find_packed_sequence_indices(batch.position_ids).tolist() == [[0, 1, 2, 2], [0, 0, 0, 1]]


def test_spans_of_trained_ids():
    ids = list(range(10, 20))
    batch = collate([(ids, [(0, 2), (4, 5), (8, 10)]), (ids[:3], [])])
    assert batch.positions.tolist() == [0, 3, 7, 8]
    assert batch.labels.tolist() == [[11, 14, 18, 19], [IGNORED] * 4]
    assert collate([(ids, [(0, 1)])]).counted() == 0  # the first id alone
    assert collate([(ids, [(0, 0), (0, 10)])]).counted() == 9


@pytest.mark.parametrize("batch", [collate([]), collate_packed([])])
def test_without_examples_a_batch_counts_nothing(batch):
    assert batch.input_ids.shape == (1, 1)
    assert (batch.labels == IGNORED).all()
    assert batch.counted() == 0


class Data:
    """Examples whose ids tell which example and which place of it they are."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.loss_tokens = self.predictions = [max(length - 1, 0) for length in lengths]

    def __len__(self):
        return len(self.lengths)

    def _example(self, index):
        return [100 * index + place for place in range(self.lengths[index])], [(0, self.lengths[index])]

    def collate(self, indices):
        return collate([self._example(i) for i in indices])

    def collate_packed(self, rows, padded_to=None):
        return collate_packed([[self._example(i) for i in row] for row in rows], padded_to)


LENGTHS = [3, 9, 14, 2, 20, 7, 7, 7, 12, 5, 1, 18, 4, 4, 11, 16, 2, 8, 13, 6, 10]


def examples_of(batch):
    """Which examples a packed batch has, whole."""
    found = []
    for ids, places in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True):
        starts = [at for at, place in enumerate(places) if place == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if ids[start] or end - start > 1:  # not padding
                assert ids[start:end] == [ids[start] + place for place in range(end - start)]
                found.append((ids[start] // 100, end - start))
    return found


@pytest.mark.parametrize("weights", [None, [2, 1]])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_every_world_size_sees_the_same_packed_rows(weights, micro_batch_size):
    data = Data(LENGTHS)
    order = Order(data.lengths, [18, 3], weights, capacity=24)
    steps = {}
    for world_size in (1, 2, 4):
        batchers = [Batcher(data, rank, world_size, order) for rank in range(world_size)]
        for step in range(6):
            shares = [batcher.step(step, 3, 4, micro_batch_size) if world_size * micro_batch_size <= 4 else None
                      for batcher in batchers]  # fmt: skip
            if None in shares:
                continue
            assert all(isinstance(b, PackedBatch) for share in shares for b in share.micro_batches)
            assert len({len(share.micro_batches) for share in shares}) == 1
            found = sorted(e for share in shares for batch in share.micro_batches for e in examples_of(batch))
            indices = sorted(index for index, _ in found)
            for share in shares:
                assert sorted(share.indices) == indices
                assert share.examples == len(indices)
                assert share.tokens == sum(LENGTHS[i] for i in indices)
                assert share.loss_tokens == sum(LENGTHS[i] - 1 for i in indices)
            assert sum(int(b.counted()) for share in shares for b in share.micro_batches) == shares[0].loss_tokens
            assert [length for _, length in found] == [LENGTHS[index] for index, _ in found]
            assert steps.setdefault(step, found) == found


def test_an_epoch_has_every_example_once():
    data = Data(LENGTHS)
    order = Order(data.lengths, capacity=24)
    batcher = Batcher(data, 0, 1, order)
    steps = -(-order.count(3, 0) // 4)
    for epoch in range(2):
        seen = [i for step in range(steps) for i in batcher.step(epoch * steps + step, 3, 4, 4).indices]
        assert sorted(seen) == list(range(len(LENGTHS)))


def test_evaluation_is_not_packed():
    data = Data(LENGTHS)
    for batcher in (Batcher(data, 0, 1), Batcher(data, 0, 1, Order(data.lengths, capacity=24))):
        shares = list(batcher.evaluation(4))
        assert all(isinstance(share.micro_batches[0], Batch) for share in shares)
        assert sorted(index for share in shares for index in share.indices) == list(range(len(LENGTHS)))


def test_evaluation_takes_more_of_what_is_short():
    """No batch has more positions than the first, whose examples are the longest."""
    data = Data([30, 3, 10, 30, 2, 10, 3, 10, 2, 10, 29])
    for world_size, wanted in (
        (1, [[0, 3], [10, 9], [7, 5, 2, 6, 1, 8], [4]]),
        (2, [[0, 3, 10, 9], [7, 5, 2, 6, 1, 8, 4]]),
    ):
        batches = list(batches_by_length(data.lengths, 2, world_size))
        assert [sorted(batch) for batch in batches] == [sorted(batch) for batch in wanted]
        assert [max(data.lengths[i] for i in batch) for batch in batches] == [
            data.lengths[batch[0]] for batch in batches
        ]
        for rank in range(world_size):
            shares = list(Batcher(data, rank, world_size).evaluation(2))
            assert [sorted(share.indices) for share in shares] == [sorted(batch) for batch in wanted]
            assert max(share.micro_batches[0].input_ids.numel() for share in shares) <= 2 * 30
    assert list(batches_by_length([], 2, 1)) == []


def test_processes_have_like_work():
    """Of rows alike in tokens, those of one long example attend over more than those of many short ones."""
    data = Data([24, 12, 12, 6, 6, 6, 6] * 8)
    order = Order(data.lengths, capacity=24)
    assert order.count(0, 0) == 24
    batchers = [Batcher(data, rank, 4, order) for rank in range(4)]
    shares = [batcher.step(0, 0, 24, 2) for batcher in batchers]

    def squares(batch):
        return sum(length**2 for _, length in examples_of(batch))

    for together in zip(*(share.micro_batches for share in shares), strict=True):
        assert len({squares(batch) for batch in together}) == 1
