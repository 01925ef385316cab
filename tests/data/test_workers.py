"""Workers that tokenize: the same as one process gives, in its order; a bad row, a death, an end part way."""

import datetime
import json
import os
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cola_ds.config.schema import DataConfig, ModelConfig
from cola_ds.data import workers
from cola_ds.data.cache import content_of
from cola_ds.data.encode import Recipe
from cola_ds.data.tokenize import tokenize
from cola_ds.data.tokenizer import load_tokenizer, tokenizer_hash
from cola_ds.data.workers import encode_all
from cola_ds.errors import UserError
from tests.data.test_tasks import make_tokenizer
from tests.support.chat import chat_tokenizer

BATCHES = 40
RECIPE = Recipe(kind="pairs", columns={"prompt": "prompt", "completion": "completion"}, max_length=16, too_long="drop")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def batches(count=BATCHES, rows=5, bad=None):
    for batch in range(count):
        made = []
        for number in range(batch * rows, batch * rows + rows):
            completion = "" if number == bad else str(number) * (1 + number % 3)
            made.append((f"t.jsonl:{number + 1}", [f"{number}+{batch}=" + "x" * (number % 9), completion]))
        yield made


def children():
    """Processes that this one has started, and which are there."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        if parent == os.getpid() and ("cola_ds.data.workers" in command or not command):
            found.append(int(status.parent.name))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(children())
    yield
    assert set(children()) == before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenize")]


def encoded(tokenizer, rows, model, count, known_as=None, recipe=RECIPE):
    return encode_all(rows, recipe, tokenizer, model, known_as or tokenizer_hash(tokenizer), count)


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_as_one_process(tokenizer, model, count):
    alone = list(encoded(tokenizer, batches(), None, None))
    beside = list(encoded(tokenizer, batches(), model, count))
    assert [batch.to_pylist() for batch, _ in beside] == [batch.to_pylist() for batch, _ in alone]
    assert [counts for _, counts in beside] == [counts for _, counts in alone]
    assert sum(counts.rows for _, counts in alone) == BATCHES * 5
    assert sum(counts.dropped.total() for _, counts in alone) > 0


def test_what_rows_are_numbered(tokenizer, model):
    found = [row for batch, _ in encoded(tokenizer, batches(), model, 2) for row in batch.column(2).to_pylist()]
    assert found == sorted(found)
    assert found[-1] == BATCHES * 5 - 1


@pytest.mark.parametrize("bad", [3, 100, BATCHES * 5 - 1])
def test_the_first_bad_row_is_named(tokenizer, model, bad):
    said = []
    for where, count in ((None, None), (model, 3)):
        done = 0
        with pytest.raises(UserError) as caught:
            for _, counts in encoded(tokenizer, batches(bad=bad), where, count):
                done += counts.rows
        assert done == bad // 5 * 5  # all that is before it
        said.append(str(caught.value))
    assert said == [f"t.jsonl:{bad + 1} has '' in column completion; it must be text"] * 2


def test_a_row_that_cannot_be_read(tokenizer, model):
    def rows():
        yield from batches(20)
        raise UserError("t.jsonl:101: not valid JSON")

    with pytest.raises(UserError, match=r"^t.jsonl:101: not valid JSON$"):
        list(encoded(tokenizer, rows(), model, 2))


def test_a_worker_that_is_killed(tokenizer, model):
    """One line, in time, and the others end too."""
    found = encoded(tokenizer, batches(1000), model, 2)
    next(found)
    begin = time.monotonic()
    os.kill(max(children()), signal.SIGKILL)
    with pytest.raises(
        UserError, match=r"^a process that tokenizes has ended with status -9, .*: set data.workers to fewer$"
    ):
        list(found)
    assert time.monotonic() - begin < 20


def test_a_worker_that_cannot_be_started(tokenizer, model, monkeypatch):
    def refuse(*words, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(workers.subprocess, "Popen", refuse)
    with pytest.raises(
        UserError, match=r"^a process that tokenizes cannot be started: Cannot allocate memory: set data.workers"
    ):
        list(encoded(tokenizer, batches(), model, 2))


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, RuntimeError])
def test_who_reads_them_stops(tokenizer, model, error):
    found = encoded(tokenizer, batches(10_000), model, 2)
    next(found)
    begin = time.monotonic()
    if error is GeneratorExit:
        found.close()
    else:
        with pytest.raises(error):
            found.throw(error)
    assert time.monotonic() - begin < 10


def test_only_a_few_batches_are_read_ahead(tokenizer, model):
    """However many rows there are, few are in memory."""
    read = []

    def rows():
        for number, batch in enumerate(batches(200)):
            read.append(number)
            yield batch

    for number, _ in enumerate(encoded(tokenizer, rows(), model, 2)):
        assert len(read) <= number + 2 + max(workers._ALONE, workers._AHEAD * 2)


def test_a_tokenizer_whose_files_are_others(tokenizer, model, tmp_path):
    make_tokenizer(merges=[("1", "+")]).save_pretrained(tmp_path)
    other = ModelConfig(path=str(tmp_path))
    with pytest.raises(
        UserError, match=r"^the tokenizer's files change while it is read: start again when they are whole$"
    ):
        list(encoded(tokenizer, batches(), other, 2))
    gone = ModelConfig(path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"model\.path"):
        list(encoded(tokenizer, batches(), gone, 2))


def test_a_tokenizer_that_was_used_is_the_same(model):
    used = load_tokenizer(model)
    used(["a", "bcd"], padding=False, truncation=True, max_length=2)
    assert len(list(encoded(used, batches(20), model, 2))) == 20


@pytest.mark.parametrize(("rows", "count"), [(workers._ALONE - 1, 4), (BATCHES, 1)])
def test_small_data_starts_no_worker(tokenizer, model, monkeypatch, rows, count):
    monkeypatch.setattr(workers.subprocess, "Popen", None)
    assert len(list(encoded(tokenizer, batches(rows), model, count))) == rows


def test_as_many_workers_as_there_are_processors(tokenizer, model, monkeypatch):
    asked = []
    monkeypatch.setattr(workers, "_by_workers", lambda *words: asked.append(words[-1]) or iter(()))
    monkeypatch.setattr(workers, "processors", lambda: 6)
    for count, share in ((None, 1), (None, 2), (None, 6), (3, 2)):
        list(encode_all(batches(), RECIPE, tokenizer, model, "", count, share))
    assert asked == [6, 3, 3]  # a share of one processor starts none


def test_a_file_here_is_no_module_of_theirs(tokenizer, model, tmp_path, monkeypatch):
    """As it is none of the command's: a folder of work may hold a tokenizers.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizers.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    assert len(list(encoded(tokenizer, batches(20), model, 2))) == 20


# Of whole files

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"Hi {n} \u00e9\u2028".encode() if n % 2 else b"Hi", "at": datetime.datetime(2024, 1, 1)},
            {"role": "assistant", "content": f"Bye {n}".encode(), "at": None},
        ],
        "tools": None,
    }
    for n in range(60)
]  # fmt: skip


def test_values_that_json_does_not_have(tmp_path, monkeypatch):
    """Bytes that are text, and times beside them, as Parquet files of conversations have them."""
    monkeypatch.setattr("cola_ds.data.tokenize._BATCH_ROWS", 5)
    chat_tokenizer("chatml").save_pretrained(tmp_path / "model")
    model = ModelConfig(path=str(tmp_path / "model"))
    tokenizer = load_tokenizer(model)
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(TALKS), path)
    text = tmp_path / "t.jsonl"
    plain = [
        {"messages": [{"role": m["role"], "content": m["content"].decode()} for m in row["messages"]]} for row in TALKS
    ]
    text.write_text("".join(json.dumps(row) + "\n" for row in plain))
    found = []
    for train, count in ((path, 1), (path, 2), (text, 2)):
        config = DataConfig(train=str(train), cache="none", workers=count)
        found.append(tokenize(config, tokenizer, model).splits["train"][0])
    assert len({each.content for each in found}) == 1
    assert [each.counts for each in found] == [found[0].counts] * 3
    bad = [{"messages": [{"role": "user", "content": b"\xff"}, {"role": "assistant", "content": b"x"}]}]
    pq.write_table(pa.Table.from_pylist(TALKS[:1] + bad), path)
    for count in (1, 2):
        with pytest.raises(UserError, match=r"t.parquet row 2: column messages is not UTF-8"):
            tokenize(DataConfig(train=str(path), cache="none", workers=count), tokenizer, model)


def test_the_fingerprint_follows_from_the_rows_alone(tmp_path, tokenizer, model, monkeypatch):
    """Not from what is tokenized together, nor by how many, nor from the cache."""
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(2500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = set()
    for size, count, cache in (
        (1000, 1, "none"),
        (7, 1, "none"),
        (300, 1, tmp_path / "c"),
        (250, 2, "none"),
        (100, 2, tmp_path / "d"),
    ):
        monkeypatch.setattr("cola_ds.data.tokenize._BATCH_ROWS", size)
        config = DataConfig(train=str(path), cache=str(cache), workers=count)
        (tokens,) = tokenize(config, tokenizer, model).splits["train"]
        assert content_of(tokens.batches) == tokens.content
        found.add((tokens.content, tokens.duplicates, str(tokens.counts)))
    assert len(found) == 1
