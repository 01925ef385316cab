"""Workers: processes that tokenize beside each other. They hear rows and say record batches, as JSON and Arrow, over pipes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import IO, Any

from cola_ds.config.schema import ModelConfig
from cola_ds.data.encode import Counts, Encoder, Recipe
from cola_ds.data.tokenizer import load_tokenizer, tokenizer_hash
from cola_ds.errors import UserError

Batch = list[tuple[str, Any]]
_BEGIN = "import sys; sys.path.pop(0); from cola_ds.data.workers import main; main()"
"""A file that happens to lie in the working folder is no module of a worker's."""
_ALONE = 8  # batches that are done before a worker has begun
_AHEAD = 3  # batches for each worker that are read before they are needed


def encode_all(
    batches: Iterable[Batch],
    recipe: Recipe,
    tokenizer: Any,
    model: ModelConfig | None = None,
    known_as: str = "",
    workers: int | None = None,
    share: int = 1,
) -> Iterator[tuple[Any, Counts]]:
    """Encode batches of rows, in their order, by several processes where there are many: see Encoder.encode.

    `model` says where the workers find the tokenizer that is `known_as` its hash; without it, and with one worker, all is done
    here. There are as many workers as processors by default; `share` processes do the same beside each other.
    """
    batches = iter(batches)
    count = workers or max(1, processors() // share)
    few = list(islice(batches, _ALONE)) if model is not None and count > 1 else []
    if len(few) == _ALONE:
        assert model is not None
        yield from _by_workers(chain(few, batches), recipe, known_as, model, count)
        return
    encoder, first = Encoder(recipe, tokenizer), 0
    for rows in chain(few, batches):
        yield encoder.encode(rows, first)
        first += len(rows)


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_workers(
    batches: Iterable[Batch], recipe: Recipe, known_as: str, model: ModelConfig, count: int
) -> Iterator[tuple[Any, Counts]]:
    local, begun = threading.local(), []

    def work(rows: Batch, first: int) -> tuple[Any, Counts]:
        if not hasattr(local, "worker"):
            local.worker = _Worker(recipe, known_as, model)
            begun.append(local.worker)
        return local.worker.encode(rows, first)

    pool = ThreadPoolExecutor(count, thread_name_prefix="tokenize")
    waiting: collections.deque[Future[tuple[Any, Counts]]] = collections.deque()
    try:
        first = 0
        for rows in batches:
            waiting.append(pool.submit(work, rows, first))
            first += len(rows)
            if len(waiting) >= _AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in begun:  # what its thread waits for ends with it
            worker.end()
        pool.shutdown()
        for worker in begun:  # also one that was begun meanwhile
            worker.end()


class _Worker:
    """A process that tokenizes, seen from the one that has begun it. It ends when that does: its input ends then."""

    def __init__(self, recipe: Recipe, known_as: str, model: ModelConfig):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        environment.pop(
            "PYTHONSAFEPATH", None
        )  # the first of its path is to be the working folder, which it leaves out
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BEGIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=environment, start_new_session=True,  # a Ctrl-C is for the run, which ends its workers
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"a process that tokenizes cannot be started: {error.strerror or error}: set data.workers to fewer"
            ) from None
        said = {"recipe": dataclasses.asdict(recipe), "model": model.model_dump(), "tokenizer": known_as}
        with contextlib.suppress(BrokenPipeError):  # as is said when it is asked
            _send(self._process.stdin, json.dumps(said).encode())

    def encode(self, rows: Batch, first: int) -> tuple[Any, Counts]:
        """As Encoder.encode does. Raises UserError for a row that is none, or where the process has died."""
        import pyarrow

        try:
            _send(self._process.stdin, json.dumps({"rows": rows, "first": first}).encode())
            answer = json.loads(_receive(self._process.stdout))
            if "error" in answer:
                raise UserError(answer["error"])
            with pyarrow.ipc.open_stream(_receive(self._process.stdout)) as stream:
                batch = stream.read_next_batch()
        except (OSError, EOFError):
            status = self._process.wait(10)
            raise UserError(
                f"a process that tokenizes has ended with status {status}, for want of memory perhaps: set data.workers to fewer"
            ) from None
        return batch, Counts.of(answer["counts"])

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()


def _send(stream: IO[bytes] | None, content: bytes) -> None:
    assert stream is not None
    stream.write(struct.pack("<Q", len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (length,) = struct.unpack("<Q", head)
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content


def main() -> None:
    """A worker: setup, then batches, until its input ends, or nobody hears it."""
    with contextlib.suppress(BrokenPipeError):
        _work()


def _work() -> None:
    import pyarrow

    heard, said = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints does not become part of an answer
    setup = json.loads(_receive(heard))
    error, encoder = None, None
    try:
        tokenizer = load_tokenizer(ModelConfig.model_validate(setup["model"]))
        if tokenizer_hash(tokenizer) != setup["tokenizer"]:
            raise UserError("the tokenizer's files change while it is read: start again when they are whole")
        encoder = Encoder(Recipe(**setup["recipe"]), tokenizer)
    except UserError as caught:
        error = str(caught)
    while True:
        try:
            task = json.loads(_receive(heard))
        except EOFError:
            return
        try:
            if encoder is None:
                raise UserError(error)
            batch, counts = encoder.encode([(place, row) for place, row in task["rows"]], task["first"])
        except UserError as caught:
            _send(said, json.dumps({"error": str(caught)}).encode())
            continue
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        _send(said, json.dumps({"counts": counts.said()}).encode())
        _send(said, sink.getvalue().to_pybytes())
