"""What is made ahead of a step is what would be made in it, and its thread outlives nothing."""

import threading
import time

import pytest
import torch

from cola_ds.data import ahead
from cola_ds.data.ahead import Ahead
from cola_ds.data.batch import Batch, StepExamples

HOST = torch.device("cpu")


def examples(step):
    ids = torch.full((2, 3), step)
    batch = Batch(ids, torch.ones_like(ids), torch.tensor([1]), ids[:, 1:2])
    return StepExamples(
        micro_batches=[batch], examples=2, tokens=6, loss_tokens=2, predictions=2, indices=[step], lengths=[6]
    )


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_step_in_its_order(monkeypatch, depth):
    monkeypatch.setattr(ahead, "DEPTH", depth)
    with Ahead(examples, range(3, 9), HOST) as found:
        assert len(workers()) == min(depth, 1)
        assert [found.take(step)[0].indices for step in range(3, 9)] == [[step] for step in range(3, 9)]
    assert not workers()


def test_it_is_so_far_ahead_and_no_further():
    made = []
    with Ahead(lambda step: made.append(step) or examples(step), range(100), HOST) as found:
        until(lambda: made == [0, 1])
        found.take(0)
        until(lambda: made == [0, 1, 2])
        time.sleep(0.05)
        assert made == [0, 1, 2]
    assert not workers()


def test_nothing_to_do():
    with Ahead(examples, range(4, 4), HOST):
        assert not workers()


def test_what_making_them_raises_is_raised_by_the_step_that_asks():
    def make(step):
        return examples(step) if step < 2 else 1 // 0

    with pytest.raises(ZeroDivisionError), Ahead(make, range(5), HOST) as found:
        assert [found.take(step)[0].indices for step in (0, 1)] == [[0], [1]]
        found.take(2)
        raise AssertionError("it has not been raised")
    assert not workers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_however_the_steps_do(error):
    with pytest.raises(error), Ahead(examples, range(100), HOST) as found:
        found.take(0)
        raise error
    assert not workers()


def test_a_thread_that_sleeps_keeps_nobody(monkeypatch):
    monkeypatch.setattr(ahead, "_LEAVE_WITHIN_S", 0.05)
    wake = threading.Event()
    begin = time.monotonic()
    with pytest.raises(RuntimeError), Ahead(lambda step: wake.wait(60) and examples(step), range(3), HOST):
        raise RuntimeError
    assert time.monotonic() - begin < 10
    wake.set()
    until(lambda: not workers())


def test_waiting_is_measured():
    def slow(step):
        time.sleep(0.05)
        return examples(step)

    with Ahead(slow, range(4), HOST) as found:
        waited = [found.take(step)[1] for step in range(4)]
    assert sum(waited) > 0.15
    with Ahead(slow, range(4), HOST) as found:
        waited = []
        for step in range(4):
            until(lambda: not found._made.empty())
            waited.append(found.take(step)[1])
    assert sum(waited) < 0.1


def test_the_thread_pins_for_an_accelerator(monkeypatch):
    seen = []

    def pin(tensor):
        seen.append(threading.current_thread().name)
        return tensor + 1

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    with Ahead(examples, range(1), torch.device("cuda:1")) as found:
        (batch,) = found.take(0)[0].micro_batches
    assert seen == ["cuda:1", *["ahead"] * 4]
    assert batch.input_ids.tolist() == [[1] * 3] * 2
