"""The cache of tokenized data: found again, made anew where anything differs, never half-written, and able to fail."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cola_ds.config.schema import DataConfig
from cola_ds.data import cache, encode
from cola_ds.data import tokenize as tokenizing
from cola_ds.data.cache import clean
from cola_ds.data.tokenize import tokenize
from cola_ds.data.tokenizer import tokenizer_hash
from cola_ds.errors import UserError
from tests.data.test_tasks import make_tokenizer
from tests.support.chat import chat_tokenizer, template_text
from tests.support.data import load_splits
from tests.support.toys import REPOSITORY, run_config, save_sums


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def path(tmp_path):
    return save_sums(tmp_path / "t.jsonl", 30)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def config_of(path, folder, **options):
    return DataConfig(train=str(path), cache=str(folder), **options)


def tokens_of(tokenizer, path, folder, **options):
    (tokens,) = tokenize(config_of(path, folder, **options), tokenizer).splits["train"]
    return tokens


def ids(tokens):
    return [batch.to_pylist() for batch in tokens.batches]


def entries(folder):
    return sorted(each.name for each in folder.iterdir()) if folder.exists() else []


# Found again


def test_a_second_start_tokenizes_nothing(tokenizer, path, folder, monkeypatch):
    made = tokens_of(tokenizer, path, folder)
    assert (made.found, entries(folder)) == (False, [made.place.name])
    monkeypatch.setattr(encode.Encoder, "encode", None)
    again = tokens_of(tokenizer, path, folder)
    assert again.found
    assert ids(again) == ids(made)
    assert dataclasses.replace(again, batches=[], found=False) == dataclasses.replace(made, batches=[])


@pytest.mark.parametrize(
    "options", [{}, {"eval_examples": 5}, {"duplicates": "drop"}, {"too_long": "drop", "max_length": 8}]
)
def test_the_same_examples_with_and_without_a_cache(tokenizer, path, folder, options):
    path.write_text(path.read_text() * 2)

    def load(cache):
        splits = load_splits(config_of(path, cache, **options), tokenizer)
        return [
            ([(i.tolist(), s.tolist()) for i, s in map(data.example, range(len(data)))], data.fingerprint(), data.lost)
            for data in splits
            if data is not None
        ]

    assert load("none") == load(folder) == load(folder)


def keys(tokenizer, train, folder, **options):
    return tokens_of(tokenizer, train, folder, **options).place.name


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 16}, {"too_long": "drop"}, {"completion": "prompt"}, {"text": "prompt"}, {"limit": 7},
        {"format": "text", "text": "completion"},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_ids_follow_from(tokenizer, path, folder, options):
    options = dict(options)
    first = keys(tokenizer, path, folder)
    if limit := options.pop("limit", None):
        config = DataConfig(train=[{"path": str(path), "limit": limit}], cache=str(folder))
        other = tokenize(config, tokenizer).splits["train"][0].place.name
    else:
        other = keys(tokenizer, path, folder, **options)
    assert other != first
    assert entries(folder) == sorted([first, other])


TALKS = [
    {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Bye"}]} for n in range(5)
]
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {}}}


@pytest.fixture
def talks(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TALKS))
    return path


@pytest.mark.parametrize(
    "options", [{"loss_on": "all"}, {"loss_on": "last"}, {"system": "Be kind"}, {"tools": [TOOL]}], ids=str
)
def test_options_that_conversations_follow_from(talks, folder, options):
    tokenizer = chat_tokenizer("chatml")
    assert keys(tokenizer, talks, folder) != keys(tokenizer, talks, folder, **options)
    assert len(entries(folder)) == 2


def test_the_template(talks, folder, tmp_path):
    first = keys(chat_tokenizer("chatml"), talks, folder)
    template = tmp_path / "t.jinja"
    template.write_text(template_text("chatml"))
    named = keys(chat_tokenizer("chatml"), talks, folder, chat_template=str(template))
    template.write_text(template_text("chatml") + " ")
    changed = keys(chat_tokenizer("chatml"), talks, folder, chat_template=str(template))
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template += " "
    assert len({first, named, changed, keys(tokenizer, talks, folder)}) == 4


def test_options_that_nothing_follows_from(tokenizer, path, folder, tmp_path):
    """A moved file, another order of sources, what is held out: the same tokens."""
    first = keys(tokenizer, path, folder)
    moved = tmp_path / "moved.jsonl"
    path.rename(moved)
    other = save_sums(tmp_path / "other.jsonl", 10, seed=3)
    for train, options in (
        (moved, {}),
        (moved, {"workers": 2}),
        (moved, {"eval_fraction": 0.2}),
        (moved, {"eval_examples": 3}),
        (moved, {"duplicates": "drop"}),
        (moved, {"packing": "best_fit"}),
        (moved, {"eval": str(other)}),
    ):
        assert keys(tokenizer, train, folder, **options) == first
    sources = [{"path": str(other), "weight": 2}, {"path": str(moved), "weight": 1}]
    found = tokenize(DataConfig(train=sources, cache=str(folder)), tokenizer).splits["train"]
    assert (found[1].place.name, found[1].found) == (first, True)
    assert keys(tokenizer, moved, tmp_path / "elsewhere") == first


def test_one_byte_of_a_row(tokenizer, path, folder):
    first = tokens_of(tokenizer, path, folder)
    text = path.read_text()
    path.write_text(text.replace("+", "-", 1))
    second = tokens_of(tokenizer, path, folder)
    assert (second.found, second.place == first.place) == (False, False)
    assert ids(second) != ids(first)
    path.write_text(text)
    again = tokens_of(tokenizer, path, folder)
    assert (again.found, ids(again)) == (True, ids(first))


def test_rows_that_move_between_shards(tokenizer, tmp_path, folder):
    rows = save_sums(tmp_path / "all.jsonl", 6).read_text().splitlines(keepends=True)
    shards = tmp_path / "shards"
    shards.mkdir()
    seen = set()
    for cut in (2, 3):
        (shards / "a.jsonl").write_text("".join(rows[:cut]))
        (shards / "b.jsonl").write_text("".join(rows[cut:]))
        seen.add(keys(tokenizer, shards, folder))
    assert len(seen) == 2


def test_the_tokenizers_files(path, folder, tmp_path):
    from transformers import AutoTokenizer

    first = keys(make_tokenizer(), path, folder)
    assert keys(make_tokenizer(), path, folder) == first
    assert keys(make_tokenizer(merges=[("1", "+")]), path, folder) != first
    for name in ("a", "b"):  # the same files at another place
        make_tokenizer().save_pretrained(tmp_path / name)
    loaded = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("a", "b")]
    assert tokenizer_hash(loaded[0]) == tokenizer_hash(loaded[1])
    said = json.loads((tmp_path / "b/tokenizer.json").read_text())
    said["model"]["vocab"]["1"], said["model"]["vocab"]["2"] = said["model"]["vocab"]["2"], said["model"]["vocab"]["1"]
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(said))
    changed = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert keys(changed, path, folder) != keys(loaded[0], path, folder)


def test_a_tokenizer_that_cannot_be_written(tokenizer, path, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"^the tokenizer cannot be written to .*/file: .*; set TMPDIR to a folder that can"
    ):
        tokens_of(tokenizer, path, folder)


def test_a_tokenizer_is_known_by_the_same_hash_once_it_was_used(tokenizer):
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "bc"], padding=False, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before


def test_the_code_and_the_libraries(tokenizer, path, folder, monkeypatch):
    first = keys(tokenizer, path, folder)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_code", lambda: "another")
        second = keys(tokenizer, path, folder)
    versions = cache.importlib.metadata.version
    seen = {first, second}
    for library in ("transformers", "tokenizers", "jinja2", "pyarrow"):
        monkeypatch.setattr(
            cache.importlib.metadata,
            "version",
            lambda name, library=library: "0.1" if name == library else versions(name),
        )
        seen.add(keys(tokenizer, path, folder))
    assert len(seen) == 6


def test_the_code_is_that_of_every_module_here(tmp_path, monkeypatch):
    names = {each.name for each in (REPOSITORY / "cola_ds/data").glob("*.py")}
    assert {"chat.py", "conversations.py", "encode.py", "tokens.py", "files.py", "arrow.py", "cache.py"} <= names
    for name in names:
        (tmp_path / name).write_bytes((REPOSITORY / "cola_ds/data" / name).read_bytes())
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    before = cache._code()
    (tmp_path / "chat.py").write_text("# changed\n")
    assert cache._code() != before


# Damaged


@pytest.mark.parametrize("name", ["tokens.arrow", "facts.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "missing", "a folder"])
def test_a_damaged_entry_is_made_anew(tokenizer, path, folder, name, damage):
    made = tokens_of(tokenizer, path, folder)
    held = made.place / name
    whole = held.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)) if damage == "flipped" else [0]:
        held.unlink()
        if damage == "flipped":
            held.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        elif damage == "a folder":
            held.mkdir()
        elif damage != "missing":
            held.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
        again = tokens_of(tokenizer, path, folder)
        assert not again.found, at
        assert (again.counts, again.content, again.duplicates) == (made.counts, made.content, made.duplicates)
        assert ids(again) == ids(made)
        assert entries(folder) == [made.place.name]
        assert held.read_bytes() == whole


@pytest.mark.parametrize("said", [b"3", b"[]", b"null", b"{}", b'{"facts": 3, "sha256": ""}', b"[" * 100_000])
def test_facts_of_another_kind(tokenizer, path, folder, said):
    made = tokens_of(tokenizer, path, folder)
    (made.place / "facts.json").write_bytes(said)
    assert not tokens_of(tokenizer, path, folder).found
    assert tokens_of(tokenizer, path, folder).found


@pytest.mark.parametrize("what", ["a file", "an empty folder", "a dangling link"])
def test_something_else_in_an_entrys_place(tokenizer, path, folder, what):
    made = tokens_of(tokenizer, path, folder)
    clean(folder)
    if what == "a file":
        made.place.write_text("x")
    elif what == "an empty folder":
        made.place.mkdir()
    else:
        made.place.symlink_to(folder / "gone")
    again = tokens_of(tokenizer, path, folder)
    assert ids(again) == ids(made)
    assert tokens_of(tokenizer, path, folder).found


def test_a_file_that_changes_while_it_is_read(tokenizer, path, folder, monkeypatch):
    """Its hash was that of the old rows: what is made of the new ones is not kept under it."""
    rows = encode.Encoder.encode

    def slow(*words):
        save_sums(path, 30, seed=5)
        return rows(*words)

    with monkeypatch.context() as patch:
        patch.setattr(encode.Encoder, "encode", slow)
        for named in (folder, "none"):
            with pytest.raises(UserError) as caught:
                tokens_of(tokenizer, path, named)
            assert str(caught.value) == f"data.train {path} has changed while it was read: start again when it is whole"
    assert entries(folder) == []


# Killed, at once, without room

JOB = """
import json, os, signal, sys, time
sys.path.insert(0, {repository!r})
from pathlib import Path
from cola_ds.config.schema import DataConfig
from cola_ds.data.tokenize import tokenize
from tests.data.test_tasks import make_tokenizer
tokenizer = make_tokenizer()
path, cache, what, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if what == "together":
    print("ready", flush=True)
    sys.stdin.readline()
if what == "size":
    import resource
    import cola_ds.data.tokenize
    known = cola_ds.data.tokenize.tokenizer_hash(tokenizer)
    cola_ds.data.tokenize.tokenizer_hash = lambda tokenizer: known
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
if what == "kill":
    seen = 0
    def hook(event, args):
        global seen
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")) and cache in str(args):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    fsync = os.fsync
    def synced(descriptor):
        hook("os.mkdir", (cache,))
        fsync(descriptor)
    os.fsync = synced
found = tokenize(DataConfig(train=path, **({{}} if cache == "default" else {{"cache": cache}})), tokenizer)
(tokens,) = found.splits["train"]
print(json.dumps([tokens.content, tokens.counts.rows, tokens.found, found.warnings]), flush=True)
"""


def job(*words, **options):
    script = JOB.format(repository=str(REPOSITORY))
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def answer(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error[-2000:]
    return json.loads(out.splitlines()[-1])


def test_killed_at_every_write(tokenizer, path, folder, tmp_path, monkeypatch):
    expected = tokens_of(tokenizer, path, tmp_path / "whole")
    half = 0
    for number in range(1, 30):
        clean(folder)
        process = job(path, folder, "kill", number)
        _, error = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error[-2000:]
        there = [name for name in entries(folder) if not name.startswith(".")]
        half += bool(entries(folder)) and not there
        again = tokens_of(tokenizer, path, folder)
        assert again.found == bool(there)
        assert (ids(again), again.content, again.counts) == (ids(expected), expected.content, expected.counts)
        left = [name for name in entries(folder) if name != again.place.name]
        assert all(name.startswith(".cola-ds-data-") for name in left)
        for name in left:  # a day later
            for each in (*(folder / name).iterdir(), folder / name):
                os.utime(each, (time.time() - 100_000,) * 2)
        (again.place / "facts.json").unlink()
        assert not tokens_of(tokenizer, path, folder).found
        assert entries(folder) == [again.place.name]
    assert number > 6
    assert half >= 4


def test_what_another_build_writes_now_is_left_alone(tokenizer, path, folder):
    other = folder / f".cola-ds-data-{'0' * 40}.{'1' * 32}"
    other.mkdir(parents=True)
    (other / "tokens.arrow").write_text("x")
    old = time.time() - 100_000
    os.utime(other, (old, old))  # begun two days ago, written to now
    tokens_of(tokenizer, path, folder)
    assert other.exists()
    os.utime(other / "tokens.arrow", (old, old))
    tokens_of(tokenizer, path, folder, max_length=7)
    assert not other.exists()


def test_two_starts_at_once(tokenizer, path, folder):
    save_sums(path, 3000)
    processes = [job(path, folder, "together", 0) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [answer(process) for process in processes]
    made = tokens_of(tokenizer, path, folder)
    assert made.found
    assert [each[:2] for each in answers] == [[made.content, 3000]] * 2
    assert entries(folder) == [made.place.name]


@pytest.mark.parametrize("damaged", [False, True])
def test_another_process_that_was_faster(tokenizer, path, folder, monkeypatch, damaged):
    """What is there is kept where it is whole; where it is not, this process's own is put there."""
    rows = encode.Encoder.encode
    held = []

    def late(*words):
        with monkeypatch.context() as patch:
            patch.setattr(encode.Encoder, "encode", rows)
            faster = tokens_of(tokenizer, path, folder)
        held.append((faster.place / "tokens.arrow").stat().st_ino)
        if damaged:
            (faster.place / "facts.json").write_text("{}")
        return rows(*words)

    monkeypatch.setattr(encode.Encoder, "encode", late)
    made = tokens_of(tokenizer, path, folder)
    assert ((made.place / "tokens.arrow").stat().st_ino == held[0]) != damaged
    assert entries(folder) == [made.place.name]
    monkeypatch.setattr(encode.Encoder, "encode", None)
    assert ids(tokens_of(tokenizer, path, folder)) == ids(made)


def test_no_room_for_the_rows(tokenizer, path, folder, tmp_path):
    """A file that may not grow any more, as on a full disk, at several places."""
    whole = tokens_of(tokenizer, path, tmp_path / "whole")
    size = (whole.place / "tokens.arrow").stat().st_size
    for limit in (0, 100, size - 20):
        process = job(path, folder, "size", limit)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 1
        assert (
            f"data.train needs the cache {folder}, which cannot be used: File too large; name another folder in data.cache"
            in error
        )
        assert entries(folder) == []
        default = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "default")}
        content, rows, found, (warning,) = answer(job(path, "default", "size", limit, env=default))
        assert (content, rows, found) == (whole.content, 30, False)
        assert warning.startswith(
            f"the cache {tmp_path}/default/cola_ds cannot be used (File too large): tokenized in memory"
        )
        assert entries(tmp_path / "default/cola_ds") == []


@pytest.mark.parametrize("where", ["a file", "/proc", "below a file"])
def test_a_folder_that_cannot_be_written(tokenizer, path, tmp_path, monkeypatch, where):
    (tmp_path / "file").write_text("x")
    home = {"a file": tmp_path / "file", "/proc": "/proc/nohome", "below a file": tmp_path / "file/more"}[where]
    with pytest.raises(
        UserError, match=r"^data\.train needs the cache .*, which cannot be used: .*; name another folder in data"
    ):
        tokens_of(tokenizer, path, home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    config = DataConfig(train=str(path), eval=str(path))
    found = tokenize(config, tokenizer)
    assert len(found.warnings) == 1  # not one for each source
    assert "tokenized in memory, as with data.cache=none" in found.warnings[0]
    assert found.places() is None
    assert found.splits["train"][0].counts.rows == 30
    assert (tmp_path / "file").read_text() == "x"


def test_the_warning_is_summarized_once(toy, tmp_path, monkeypatch):
    from cola_ds.config.schema import RunConfig
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    config = RunConfig.model_validate(run_config(toy[0], toy[1], tmp_path / "run", data={"eval": str(toy[2])}))
    assert summarize(prepare(config, 1), 1).count("cannot be used") == 1


def test_what_is_there_is_read_without_writing(tokenizer, path, folder, monkeypatch):
    made = tokens_of(tokenizer, path, folder)
    before = {each: each.stat().st_mtime_ns for each in folder.rglob("*")}
    seen = []

    def hook(event, args):
        if seen and event in ("os.mkdir", "os.rename", "os.remove") and str(folder) in str(args):
            seen.append(event)

    sys.addaudithook(hook)
    seen.append("begin")
    assert ids(tokens_of(tokenizer, path, folder)) == ids(made)
    assert seen == ["begin"]
    seen.clear()
    assert {each: each.stat().st_mtime_ns for each in folder.rglob("*")} == before


def test_a_bad_row_leaves_nothing(tokenizer, path, folder):
    with open(path, "a") as out:
        out.write('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(UserError, match=r":31 has '' in column completion"):
        tokens_of(tokenizer, path, folder)
    assert entries(folder) == []


def test_without_a_cache(tokenizer, path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    found = tokenize(DataConfig(train=str(path), cache="none"), tokenizer)
    assert (found.places(), found.warnings) == (None, [])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["t.jsonl"]
    tokenize(DataConfig(train=str(path)), tokenizer)
    assert [each.name for each in (tmp_path / "home").iterdir()] == ["cola_ds"]


def test_a_relative_folder_is_found_from_elsewhere(tokenizer, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    found = tokenize(config_of(path, "cache"), tokenizer)
    monkeypatch.chdir(tmp_path / "other")
    (again,) = tokenizing.open_found(found.places(), []).splits["train"]
    assert ids(again) == ids(found.splits["train"][0])
    clean(tmp_path / "cache")
    with pytest.raises(UserError, match="has been removed or changed while the run began; start it again"):
        tokenizing.open_found(found.places(), [])


def test_clean_removes_its_own_alone(tokenizer, path, folder, tmp_path):
    assert clean(folder) == (0, 0)  # no such folder
    first, second = tokens_of(tokenizer, path, folder), tokens_of(tokenizer, path, folder, max_length=7)
    size = sum(each.stat().st_size for tokens in (first, second) for each in tokens.place.iterdir())
    scratch = folder / f".{first.place.name}.{'0' * 32}"
    scratch.mkdir()
    (scratch / "tokens.arrow").write_bytes(b"x" * 10)
    (folder / f".cola-ds-here-{'0' * 32}-3").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    (scratch / "link").symlink_to(outside)
    linked = "cola-ds-data-" + "f" * 40
    (folder / linked).symlink_to(outside)
    for name in ("cola-ds-data-mine", ".cola-ds-data-notes", "models"):
        (folder / name).mkdir()
        (folder / name / "mine.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    entries_, bytes_ = clean(folder)
    assert (entries_, bytes_) == (3, size + 10 + len(str(outside)))
    assert entries(folder) == sorted(["cola-ds-data-mine", ".cola-ds-data-notes", "models", "notes.txt", linked])
    assert (outside / "mine.txt").read_text() == "mine"
    assert all((folder / name / "mine.txt").exists() for name in ("cola-ds-data-mine", ".cola-ds-data-notes", "models"))
