"""Rows of files of every kind, sound and not: each value is the file's own text, or one line names the file and the line."""

import csv
import gc
import gzip
import json
import math
import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cola_ds.config.inputs import files_of, find_files
from cola_ds.config.schema import DataConfig, RunConfig
from cola_ds.data.files import text_rows
from cola_ds.errors import UserError
from tests.data.test_tasks import make_tokenizer
from tests.support.data import load_split
from tests.support.toys import REPOSITORY, run_config, save_run, save_sums

SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(3, 7) for b in range(5, 8)]
PAIRS = [[row["prompt"], row["completion"]] for row in SUMS]
COLUMNS = ["prompt", "completion"]


@pytest.fixture(autouse=True)
def nothing_is_collected():
    """What other tests have left has finalizers, which fail where a collection finds the stack at its deepest."""
    gc.disable()
    yield
    gc.enable()


def lines(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(name, columns=COLUMNS):
    return [row for path in find_files(str(name)) for _, row in text_rows(path, columns)]


def refusal(name, columns=COLUMNS):
    with pytest.raises(UserError) as caught:
        read(name, columns)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 400 + len(str(name))
    return said


# Sound files

WRITTEN = {
    "t.jsonl": lines(SUMS),
    "t.JSONL": lines(SUMS),
    "t.ndjson": lines(SUMS),
    "lines.json": lines(SUMS),
    "list.json": json.dumps(SUMS),
    "indented.json": json.dumps(SUMS, indent=1),
    "indented.jsonl": "\n" + json.dumps(SUMS, indent=1) + "\n\n",
    "bom.jsonl": b"\xef\xbb\xbf" + lines(SUMS).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(SUMS).encode(),
    "crlf.jsonl": lines(SUMS).replace("\n", "\r\n"),
    "blank.jsonl": lines(SUMS).replace("\n", "\n \n") + "\n\n",
    "no-end.jsonl": lines(SUMS)[:-1],
    "t.jsonl.gz": gzip.compress(lines(SUMS).encode()),
    "t.json.gz": gzip.compress(json.dumps(SUMS).encode()),
    "disguised.jsonl": gzip.compress(lines(SUMS).encode()),
    "t.jsonl.zst": pa.compress(lines(SUMS).encode(), codec="zstd", asbytes=True),
    "t.csv": "prompt,completion\n" + "".join(f"{p},{c}\n" for p, c in PAIRS),
    "t.CSV": "completion,id,prompt\r\n" + "".join(f'{c},7,"{p}"\r\n' for p, c in PAIRS),
    "t.csv.gz": gzip.compress(("prompt,completion\n" + "".join(f"{p},{c}\n\n" for p, c in PAIRS)).encode()),
    "t.tsv": b"\xef\xbb\xbfprompt\tcompletion\n" + "".join(f"{p}\t{c}\n" for p, c in PAIRS).encode(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_rows(tmp_path, name):
    assert read(put(tmp_path / name, WRITTEN[name])) == PAIRS


def columns_as(kind):
    return [pa.array(list(column)).cast(kind) for column in zip(*PAIRS, strict=True)]


KINDS = {
    "string": columns_as(pa.string()),
    "large string": columns_as(pa.large_string()),
    "string view": columns_as(pa.string_view()),
    "binary": columns_as(pa.binary()),
    "dictionary": [column.dictionary_encode() for column in columns_as(pa.string())],
    "dictionary of large": [column.dictionary_encode() for column in columns_as(pa.large_string())],
}


def save_arrow(table, path, stream):
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


@pytest.mark.parametrize("form", ["parquet", "arrow stream", "arrow file"])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_text(tmp_path, kind, form):
    prompts, completions = KINDS[kind]
    others = {"id": list(range(12)), "messages": [[{"role": "a", "content": "b"}]] * 12, "m": [{"k": 1}] * 12}
    table = pa.table({**others, "completion": completions, "prompt": prompts})
    path = tmp_path / f"t.{form.split()[0]}"
    if form == "parquet":
        pq.write_table(table, path, row_group_size=5)
    else:
        save_arrow(table, path, "stream" in form)
    assert read(path) == PAIRS


def test_dates_and_numbers_that_are_text_stay_text(tmp_path):
    values = ["2021-03-12", "2021-03-12T10:00:00Z", "2021-03-12 10:00:00", "007", "1e5", "true", "null", "NaN", "-0.0"]
    rows = [{"prompt": value, "completion": value} for value in values]
    expected = [[value, value] for value in values]
    assert read(put(tmp_path / "t.jsonl", lines(rows))) == expected
    text = "prompt,completion\n" + "".join(f"{value},{value}\n" for value in values)
    assert read(put(tmp_path / "t.csv", text)) == expected


def test_letters_that_others_take_for_ends(tmp_path):
    value = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x00h \r\n\n\ttail "
    rows = [{"prompt": value, "completion": "\ufeffx"}] * 2
    expected = [[value, "\ufeffx"]] * 2
    for name, options in (("raw.jsonl", {"ensure_ascii": False}), ("escaped.jsonl", {})):
        assert read(put(tmp_path / name, lines(rows, **options))) == expected
    assert read(put(tmp_path / "t.json", json.dumps(rows, ensure_ascii=False, indent=2))) == expected
    with open(tmp_path / "t.csv", "w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([COLUMNS, *expected])
    if sys.version_info >= (3, 11):  # before, csv refuses a NUL
        assert read(tmp_path / "t.csv") == expected
    text = put(tmp_path / "t.txt", b"\xef\xbb\xbf" + value.encode())
    assert read(text, ["text"]) == [[value]]


OTHERS = [
    {"id": 3}, {"id": "x3"}, {"id": None}, {"id": 0.5}, {"id": [1, "b"]}, {"id": {"a": {}}}, {"id": math.nan}, {},
    {"tag": "x"}, {"id": "2021-03-12"}, {"id": "\ud83d"},
]  # fmt: skip


def test_columns_that_are_not_read_may_hold_anything(tmp_path):
    rows = [{**SUMS[0], **other} for other in OTHERS]
    assert read(put(tmp_path / "t.jsonl", lines(rows))) == [PAIRS[0]] * len(OTHERS)


@pytest.mark.parametrize("late", OTHERS, ids=str)
def test_what_comes_after_ten_megabytes(tmp_path, late):
    """Where a reader that guesses types in blocks has long made up its mind."""
    first = json.dumps({"prompt": "1", "completion": "2021-03-12", "id": 1, "pad": "x" * 100_000}) + "\n"
    path = put(tmp_path / "t.jsonl", first * 105 + json.dumps({**SUMS[0], **late}) + "\n")
    assert path.stat().st_size > 10_000_000
    assert read(path) == [["1", "2021-03-12"]] * 105 + [PAIRS[0]]
    with open(path, "ab") as out:
        out.write(b'\n{"prompt": "p", "completion": 7}\n')
    assert refusal(path) == f"{path}:108 has 7 in column completion; it must be text"


def test_a_twin_among_many_keys_is_found_at_once(tmp_path):
    keys = ", ".join(f'"k{number}": 1' for number in range(50_000))
    path = put(tmp_path / "t.jsonl", GOOD + f'{{{keys}, "k49999": 2}}\n')
    begin = time.monotonic()
    assert refusal(path) == f"{path}:6: not usable JSON: key k49999 is given twice"
    assert time.monotonic() - begin < 2  # by counting each key, 40 s


def test_a_line_of_megabytes(tmp_path):
    rows = [SUMS[0], {"prompt": "y" * 3_000_000, "completion": "z" * 200_000}, SUMS[1]]
    assert read(put(tmp_path / "t.jsonl", lines(rows))) == [list(row.values()) for row in rows]
    text = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows)
    assert read(put(tmp_path / "t.csv", text)) == [list(row.values()) for row in rows]


# Several files


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    (folder / ".cache").mkdir(parents=True)
    for number, part in enumerate((SUMS[:5], SUMS[5:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"train-0000{number}-of-00002.parquet")
    for name in (".gitattributes", "README.md", "_SUCCESS"):
        (folder / name).write_text("not data", encoding="utf-8")
    return folder


def test_a_folder_a_glob_and_a_list(shards, tmp_path):
    assert read(shards) == PAIRS
    assert read(f"{shards}/train-*.parquet") == PAIRS
    assert read(f"{tmp_path}/**/*2.parquet") == PAIRS
    more = put(tmp_path / "more[1].jsonl", lines(SUMS[:1]))  # a name that looks like a glob is a name
    tokenizer = make_tokenizer()
    config = DataConfig(train=[str(more), str(shards), f"{shards}/*0-of*"])
    data = load_split(config, "train", tokenizer)
    texts = ["".join(pair) for pair in [*PAIRS[:1], *PAIRS, *PAIRS[:5]]]
    assert ["".join(tokenizer.convert_ids_to_tokens(data.example(i)[0][1:-1])) for i in range(len(data))] == texts


def test_a_sweep_looks_at_every_file(shards, tmp_path):
    """A run that began before one of them changed is not the sweep's any more."""
    more = put(tmp_path / "more.jsonl", lines(SUMS))
    config = run_config(
        tmp_path / "model", more, tmp_path / "run", data={"train": [str(more), str(shards)], "eval": "gone"}
    )
    found = list(files_of(RunConfig.model_validate(config)))
    assert found[1:] == [more, *sorted(shards.glob("*.parquet"))]


def test_a_saved_dataset(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(SUMS).shuffle(seed=0)
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    save_arrow(pa.table({"x": [1]}), tmp_path / "saved/cache-5.arrow", stream=True)  # as Dataset.map leaves it there
    assert read(tmp_path / "saved") == [list(row.values()) for row in made]
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "splits")
    assert "holds the splits test, train of a saved dataset: name the folder of one" in refusal(tmp_path / "splits")
    for state in (b"{}", b"[]", b'{"_data_files": [{}]}', b"x", b"[" * 5000, b'{"_data_files": 3}'):
        put(tmp_path / "saved/state.json", state)
        assert "state.json does not name the files of a saved dataset" in refusal(tmp_path / "saved")
    put(tmp_path / "saved/state.json", '{"_data_files": [{"filename": "../../gone.arrow"}]}')
    assert refusal(tmp_path / "saved").startswith(f"{tmp_path / 'saved/gone.arrow'} cannot be read")


def test_folders_that_are_refused(shards, tmp_path):
    (tmp_path / "none").mkdir()
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'} is empty: it needs at least one file of data"
    put(shards / "more.jsonl", lines(SUMS))
    assert "holds files of several kinds, .jsonl, .parquet" in refusal(shards)
    put(shards / "notes.docx", "x")
    (shards / "inner").mkdir()
    assert "holds inner, notes.docx beside or instead of data" in refusal(shards)


@pytest.mark.parametrize("name", ["gone.jsonl", "a" * 300, "a\0b", "/dev/zero", "gone/*.jsonl", "line\nbreak", "**\0"])
def test_names_of_nothing(name):
    assert "is not a file" in refusal(name)


# Files that are refused

GOOD = lines(SUMS[:5])
HALF = '{"prompt": "cut emoji \\ud83d", "completion": "x"}\n'
TALK = [{"role": "user", "content": "3+5="}, {"role": "assistant", "content": "8"}]
BAD_LINES = {
    "a number": ('{"prompt": "a", "completion": 7}\n', " has 7 in column completion; it must be text"),
    "true": ('{"prompt": true, "completion": "7"}\n', " has True in column prompt"),
    "an object": ('{"prompt": "a", "completion": {"a": 1}}\n', " has {'a': 1} in column completion"),
    "null": ('{"prompt": null, "completion": "7"}\n', " has None in column prompt"),
    "nan": ('{"prompt": "a", "completion": NaN}\n', " has nan in column completion"),
    "a missing column": ('{"prompt": "a", "answer": "b"}\n', " has no column completion; it has prompt, answer: name "),
    "words": ("oops\n", ": not valid JSON: Expecting value (column 1)"),
    "a list": ("[1, 2]\n", ": a row must be an object with fields; it is [1, 2]"),
    "a text": ('"text"\n', ": a row must be an object with fields; it is 'text'"),
    "twice": ('{"prompt": "a", "prompt": "b", "completion": "7"}\n', ": not usable JSON: key prompt is given twice"),
    "twice inside": ('{"prompt": "a", "completion": "7", "m": {"k": 1, "k": 1}}\n', "key k is given twice"),
    "half a letter": (HALF, ": '\\ud83d' is half a letter (a lone surrogate)"),
    "a long number": ('{"prompt": "a", "completion": ' + "9" * 1_000_000 + "}\n", "a number of 1000000 digits"),
    "a long number elsewhere": ('{"prompt": "a", "completion": "b", "n": -' + "1" * 5000 + "}\n", "5000 digits"),
    "a long value": ('{"prompt": "a", "completion": ' + str(["x" * 999] * 999).replace("'", '"') + "}\n", "has ['xxx"),
    "a long key": ('{"' + "k" * 9999 + '": 1}\n', " has no column prompt; it has 'kkkk"),
    "deep": ('{"prompt": "a", "completion": ' + "[" * 5000 + "]" * 5000 + "}\n", ": nested too deeply"),
    "deep, open": ('{"prompt":"a","completion":' + "[" * 100_000 + "\n", ": nested too deeply"),
    "deep objects": ('{"a":' * 50_000 + "\n", ": nested too deeply"),
    "cut off": ('{"prompt": "a", "compl', ": not valid JSON: Unterminated string"),
    "padding": ("\0" * 64, ": not valid JSON: Expecting value"),
    "latin-1": ('{"prompt": "caf\xe9", "completion": "x"}\n'.encode("latin1"), ": not UTF-8"),
    "gbk": ('{"prompt": "\u4f60\u597d", "completion": "x"}\n'.encode("gbk"), ": not UTF-8"),
    "a surrogate in bytes": (b'{"prompt": "\xed\xa0\xbd", "completion": "x"}\n', ": not UTF-8"),
    "messages": (
        json.dumps({"messages": TALK}) + "\n",
        "it has messages: conversations are read with data.format=chat",
    ),
    "messages as columns": (
        json.dumps({"prompt": TALK[:1], "completion": TALK[1:]}) + "\n",
        "in column prompt; it must be text; conversations are read with data.format=chat",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, case):
    line, message = BAD_LINES[case]
    line = line if isinstance(line, bytes) else line.encode()
    path = put(tmp_path / "t.jsonl", GOOD.encode() + b"\n\r\n" + line + b"\n" + GOOD.encode())
    said = refusal(path)
    assert said.startswith(f"{path}:8")
    assert message in said
    if not case.startswith(
        ("padding", "cut off", "deep, open", "deep objects", "latin", "gbk", "a surrogate", "words")
    ):
        listed = ",\n".join([*GOOD.splitlines(), line.decode().strip()])
        path = put(tmp_path / "t.json", f"[{listed}]")
        said = refusal(path)
        assert said.startswith(f"{path}:6")
        assert message.split(";")[0] in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"version": "1", "data": SUMS}),
            ":1 has no column prompt; it has version, data: rows inside an object",
        ),
        (
            json.dumps([{"instruction": "Add.", "input": "1", "output": "2"}], indent=1),
            ":2 has no column prompt; it has ",
        ),
        (json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}), ":1 has ['a', 'b'] in column prompt"),
        ("[" * 100_000, ":1: nested too deeply"),
        (
            '[{"prompt": "a", "completion": "b"}\n{',
            ":2: not valid JSON: a comma or the end of the list must follow a row",
        ),
        ('[{"prompt": "a", "completion": "b"},\n\n{"prompt": "a"', ":3: not valid JSON: Expecting ',' delimiter"),
        ('[{"prompt": "a", "completion": "b"}]\n[]', ":2: not valid JSON: something follows the list"),
        ('[{"prompt": "a", "completion": "b"}', ":1: not valid JSON: a comma or the end"),
        ("[", ":1: not valid JSON: Expecting value"),
        ('[{"prompt": "a"},\n', ":1 has no column completion"),
        ("<!DOCTYPE html><html><body>Sign in</body></html>\n", ":1: not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", " is a pointer of Git LFS"),
        (lines(SUMS).encode("utf-16"), ":1: not UTF-8"),
        (gzip.compress(lines(SUMS).encode())[:-12], " cannot be read: "),
        (pa.compress(lines(SUMS).encode(), codec="zstd", asbytes=True)[:-1], " cannot be read: "),
        (b"\x1f\x8b\x08\x00" + b"x" * 50, " cannot be read: "),
    ],
)
def test_bad_json_files(tmp_path, content, message):
    path = put(tmp_path / "t.json", content)
    said = refusal(path)
    assert said.startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt;completion\n1;2\n", ":1 has no column prompt; it has prompt;completion"),
        ("prompt,completion\n1,2\n3\n", ":3 has 1 fields, where the first row names 2"),
        ("prompt,completion\n1,2\n\n3,4,5\n", ":4 has 3 fields"),
        ('prompt,completion\n1,"a\nb"\n"3"x,4\n', ":4: not valid csv"),
        ('prompt,completion\n1,2\n3,"4\n5,6\n', ":3: not valid csv: unexpected end of data"),
        ("prompt,completion,prompt\n1,2,3\n", ":1 has column prompt twice"),
        ("prompt,completion\r1,2\r", ":1: not valid csv"),
        (b"prompt,completion\n1,2\ncaf\xe9,2\n", ":3: not UTF-8"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    path = put(tmp_path / "t.csv", content)
    assert refusal(path).startswith(f"{path}{message}")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_bad_columns(tmp_path, form):
    def refused(table, columns=COLUMNS):
        path = tmp_path / f"t.{form}"
        pq.write_table(table, path) if form == "parquet" else save_arrow(table, path, stream=True)
        said = refusal(path, columns)
        assert said.startswith(str(path))
        return said.removeprefix(str(path))

    prompts, completions = (list(column) for column in zip(*PAIRS, strict=True))
    numbers = pa.table({"prompt": prompts, "completion": list(range(12))})
    assert refused(numbers) == " has int64 in column completion; it must be text"
    holes = pa.table({"prompt": prompts, "completion": [None if n == 9 else c for n, c in enumerate(completions)]})
    assert refused(holes) == " row 10 has None in column completion; it must be text"
    twice = pa.table([prompts, completions, completions], names=["prompt", "completion", "completion"])
    assert refused(twice) == " has column completion twice"
    assert refused(holes, ["text"]).startswith(" has no column text; it has prompt, completion: name its own")
    talk = pa.table({"prompt": [TALK], "completion": ["x"]})
    assert "in column prompt; it must be text; conversations are read with data.format=chat" in refused(talk)
    latin = pa.array([b"a"] * 7 + [b"caf\xe9"], pa.binary())
    assert " row 8: column completion is not UTF-8" in refused(pa.table({"prompt": ["p"] * 8, "completion": latin}))
    latin = pa.Array.from_buffers(pa.string(), 8, latin.buffers())  # what claims to be UTF-8
    assert " row 8: column completion is not UTF-8" in refused(pa.table({"prompt": ["p"] * 8, "completion": latin}))
    dates = pa.array([2**50] * 2, pa.timestamp("s"))
    assert refused(pa.table({"prompt": ["p"] * 2, "completion": dates})).startswith(" has timestamp[")


def test_offsets_that_lead_outside(tmp_path):
    """Nothing in Arrow's file says whether they do."""
    save_arrow(pa.table({"prompt": ["ab", "cd"], "completion": ["e", "fg"]}), tmp_path / "t.arrow", stream=True)
    assert read(tmp_path / "t.arrow") == [["ab", "e"], ["cd", "fg"]]
    offsets, far = b"\0\0\0\0\1\0\0\0\3\0\0\0", b"\0\0\0\0\1\0\0\0\xff\xff\xff\x7f"
    content = (tmp_path / "t.arrow").read_bytes()
    assert content.count(offsets) == 1
    put(tmp_path / "t.arrow", content.replace(offsets, far))
    assert "cannot be read as arrow" in refusal(tmp_path / "t.arrow")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_columns_name_that_is_not_text(tmp_path, form):
    table, path = pa.table({"prompt": ["a"], "completion": ["b"], "other": ["c"]}), tmp_path / f"t.{form}"
    pq.write_table(table, path, store_schema=False) if form == "parquet" else save_arrow(table, path, stream=True)
    put(path, path.read_bytes().replace(b"other", b"oth\xffr"))
    assert refusal(path).startswith(f"{path} cannot be read as {form}: ")


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"ARROW1", b"ARROW1\0\0" + b"\xff" * 99, b"\0" * 999, b"x,y\n1,2\n"])
def test_files_that_are_not_tables(tmp_path, name, content):
    path = put(tmp_path / name, content)
    if name == "t.arrow" and not content:
        assert read(path) == []  # it is empty, as load_split says
    else:
        assert refusal(path).startswith(f"{path} cannot be read as {name[2:]}")


def test_a_pointer_instead_of_parquet(tmp_path):
    path = put(tmp_path / "t.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert refusal(path) == f"{path} is a pointer of Git LFS, not the data: fetch it with `git lfs pull`"


def test_unknown_endings(tmp_path):
    for name in ("t.xlsx", "README", "t.txt", "t.gz"):
        assert "use .jsonl, .ndjson, .json, .csv, .tsv" in refusal(put(tmp_path / name, "a,b"))


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.txt", "t.parquet", "t.arrow", "list.json"])
def test_files_without_a_row(tmp_path, name):
    path, text = tmp_path / name, {"text": "text"} if name == "t.txt" else {}
    empty = pa.table({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())})
    if name == "t.parquet":
        pq.write_table(empty, path)
    elif name == "t.arrow":
        save_arrow(empty, path, stream=True)
    else:
        put(path, {"t.csv": "prompt,completion\n", "list.json": " [ ] \n", "t.json": "\n\n"}.get(name, ""))
    with pytest.raises(UserError) as caught:
        load_split(DataConfig(train=str(path), **text), "train", make_tokenizer())
    assert str(caught.value) == f"data.train {path} is empty: it needs at least one row"


def test_an_empty_completion_is_named(tmp_path):
    path = put(tmp_path / "t.jsonl", GOOD + '{"prompt": "a", "completion": ""}\n')
    with pytest.raises(UserError) as caught:
        load_split(DataConfig(train=str(path)), "train", make_tokenizer())
    assert str(caught.value) == f"data.train {path}:6 has '' in column completion; it must be text"


# Whatever there is

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800") | st.just("2021-03-12"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
objects = st.fixed_dictionaries(
    {}, optional={"prompt": st.text() | values, "completion": st.text(min_size=1) | values, "id": values}
)
_byte_level = make_tokenizer()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(objects | values, min_size=1, max_size=4), raw=st.booleans(), listed=st.booleans())
@example(rows=[{"prompt": "<s>a", "completion": "</s>"}], raw=False, listed=False)
def test_a_row_is_trained_to_the_letter_or_named(tmp_path, rows, raw, listed):
    rows = [SUMS[0], *rows]  # the file's first letter says whether it is a list
    texts = [json.dumps(row, ensure_ascii=not raw) for row in rows]
    content = "[" + ",\n".join(texts) + "]" if listed else "\n".join(texts)
    path = put(tmp_path / "t.jsonl", content.encode("utf-8", "surrogatepass"))
    try:
        data = load_split(DataConfig(train=str(path)), "train", _byte_level)
    except UserError as error:
        said = str(error)
        assert said.startswith(f"data.train {path}:")
        assert int(said.removeprefix(f"data.train {path}:").split()[0].rstrip(":")) <= len(rows)
        assert "\n" not in said
        assert len(said) < 500 + len(str(path))
        sound = [
            isinstance(row, dict) and all(_is_text(row.get(c)) for c in COLUMNS) and row["completion"] for row in rows
        ]
        assert not all(sound) or "\ud800" in content  # which is not UTF-8
        return
    for index, row in enumerate(rows):
        text = row["prompt"] + row["completion"]
        expected = "<s>" + text.removeprefix("<s>") + ("" if text.endswith("</s>") else "</s>")
        assert _spelled(data.example(index)[0]) == expected


def _is_text(value):
    return isinstance(value, str) and "\ud800" not in value


def _spelled(ids):
    bytes_of = {letter: byte for byte, letter in _letters().items()}
    pieces = _byte_level.convert_ids_to_tokens(ids)
    return b"".join(
        piece.encode() if piece in ("<s>", "</s>") else bytes([bytes_of[piece]]) for piece in pieces
    ).decode()


def _letters():
    """How a byte-level tokenizer writes each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(rest)}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["t.jsonl", "t.json", "t.csv", "t.tsv", "t.txt", "t.jsonl.gz"]), data=st.data())
def test_whatever_bytes_there_are(tmp_path, name, data):
    sound = {
        "t.json": json.dumps(SUMS[:3], indent=1),
        "t.csv": "prompt,completion\n1,2\n",
        "t.tsv": 'prompt\tcompletion\n"1"\t2\n',
    }
    content = bytearray(sound.get(name, lines(SUMS[:3])).encode())
    if name.endswith(".gz"):
        content = bytearray(gzip.compress(content))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path = put(tmp_path / name, bytes(content))
    try:
        read(path, ["text"] if name == "t.txt" else COLUMNS)
    except UserError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)


# Memory and cache


def test_rows_are_read_one_after_the_other(tmp_path):
    """A file that is larger than what the process may take."""
    path = tmp_path / "t.jsonl"
    row = (json.dumps({"prompt": "p", "completion": "c", "pad": "x" * 500_000}) + "\n").encode()
    with open(path, "wb") as out:
        for _ in range(400):
            out.write(row)
    code = (
        "import resource, sys; from pathlib import Path; from cola_ds.data.files import text_rows; "
        "at = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; begin = at(); "
        "rows = sum(1 for _ in text_rows(Path(sys.argv[1]), ['prompt', 'completion'])); print(rows, at() - begin)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    rows, kib = map(int, done.stdout.split())
    assert rows == 400
    assert kib < 20_000  # of 200 MB


@pytest.mark.parametrize("hub", [False, True])
def test_a_cache_that_cannot_be_written(toy, tmp_path, hub):
    """Local files need none; where one is needed, it is named, and not the data."""
    (tmp_path / "data").mkdir()
    path = save_sums(tmp_path / "data/train.jsonl", 8)
    data = {"train": "train", "hub": str(tmp_path / "data")} if hub else {"train": str(path)}
    run = save_run(tmp_path / "run.yaml", run_config(toy[0], path, tmp_path / "run", data=data))
    environment = {**os.environ, "HF_HOME": "/proc/nohome", "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, "-m", "cola_ds", "train", str(run), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=REPOSITORY)
    if not hub:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("cola-ds: ")]
    assert len(said) == 1
    assert "the cache /proc/nohome/datasets cannot be used" in said[0]
    assert said[0].endswith("set HF_HOME to a folder that can be written")


def test_the_hub(tmp_path):
    """A folder stands in for a name on the hub: it is loaded the same way."""
    tokenizer = make_tokenizer()
    put(tmp_path / "train.jsonl", lines(SUMS))
    put(tmp_path / "test.jsonl", lines([*SUMS[:2], {"prompt": "a", "completion": None}]))

    def load(split, **options):
        return load_split(DataConfig(train=split, hub=str(tmp_path), **options), "train", tokenizer)

    assert tokenizer.convert_ids_to_tokens(load("train[:1]").example(0)[0]) == ["<s>", *"3+5=8", "</s>"]
    name = f"data.train split {{}} of data.hub {tmp_path}"
    for split, options, message in (
        ("nope", {}, " cannot be loaded: "),
        ("test", {}, " row 3 has None in column completion; it must be text"),
        ("train", {"completion": "answer"}, " has no column answer; it has prompt, completion"),
    ):
        with pytest.raises(UserError) as caught:
            load(split, **options)
        assert str(caught.value).startswith(name.format(split) + message)
        assert "\n" not in str(caught.value)
