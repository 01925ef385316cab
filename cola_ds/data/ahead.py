"""Ahead of the step: a prefetcher, which makes the examples of the next steps while this one runs."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from cola_ds.data.batch import StepExamples

DEPTH = 2
"""Steps that are made ahead; 0: none, each is made when it is asked for."""
_LEAVE_WITHIN_S = 5.0  # a worker that is asleep in a file system keeps nobody from ending


class Ahead:
    """`with Ahead(make, steps, device) as ahead`: the examples of `steps`, made in order by a thread that ends with the block.

    `make` gives a step's examples, and what it gives follows from the step alone: how far the thread is changes nothing. While
    the block lasts nobody else may call it. On a CUDA `device` the micro batches are pinned by the thread as well.
    """

    def __init__(self, make: Callable[[int], StepExamples], steps: range, device: torch.device):
        self._make, self._steps = make, steps
        self._device = device if device.type == "cuda" else None
        self._made: queue.SimpleQueue[StepExamples | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(DEPTH)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="ahead", daemon=True) if DEPTH and steps else None

    def __enter__(self) -> Ahead:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing = True
        self._room.release()
        if self._thread:
            self._thread.join(_LEAVE_WITHIN_S)

    def take(self, step: int) -> tuple[StepExamples, float]:
        """The examples of a step, which must be the next one, and the seconds that were waited for them. Raises what making them
        raised."""
        begin = time.perf_counter()
        assert self._steps and step == self._steps[0], (step, self._steps)
        self._steps = self._steps[1:]
        found = self._made.get() if self._thread else self._ready(step)
        self._room.release()
        if isinstance(found, BaseException):
            raise found
        return found, time.perf_counter() - begin

    def _work(self) -> None:
        try:
            if self._device:
                torch.cuda.set_device(self._device)  # each thread has its own, and begins at the first
            for step in self._steps:
                self._room.acquire()
                if self._closing:
                    return
                self._made.put(self._ready(step))
        except BaseException as error:  # the step that asks for it raises it
            self._made.put(error)

    def _ready(self, step: int) -> StepExamples:
        examples = self._make(step)
        if self._device is None:
            return examples
        # Pinning takes as long as the copy to the device that it makes asynchronous.
        pinned = [_pinned(batch) for batch in examples.micro_batches]
        return dataclasses.replace(examples, micro_batches=pinned)


def _pinned(batch: Any) -> Any:
    """A batch whose tensors are in pinned memory, from where a copy to the device runs beside the host."""
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(
        batch, **{name: each.pin_memory() for name, each in tensors.items() if isinstance(each, torch.Tensor)}
    )
