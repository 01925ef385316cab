"""Sources: the same examples of every kind of file, whatever the rows are; bad rows by file and row."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cola_ds.config.schema import DataConfig
from cola_ds.data.encode import NOTHING_LEFT, TOO_LONG
from cola_ds.data.text import datasets_of, facts_of
from cola_ds.data.tokenize import check_sources, tokenize
from cola_ds.data.tokens import CONVERSATION_END
from cola_ds.errors import UserError
from tests.support.chat import chat_tokenizer
from tests.support.data import load_split, load_splits


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer("chatml")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def config_of(train, **options):
    options = {"cache": "none", **options}
    return DataConfig(train=str(train) if not isinstance(train, list) else train, **options)


def found_of(tokenizer, train, **options):
    config = config_of(train, **options)
    return config, tokenize(config, tokenizer)


def examples(data):
    return [tuple(part.tolist() for part in data.example(index)) for index in range(len(data))]


def load(tokenizer, train, **options):
    return load_splits(config_of(train, **options), tokenizer)[0]


def texts(tokenizer, data):
    return [tokenizer.decode(ids) for ids, _ in examples(data)]


def refusal(tokenizer, train, **options):
    with pytest.raises(UserError) as caught:
        load_splits(config_of(train, **options), tokenizer)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) <= 1000
    return said


# Every kind of file, every kind of row


def talk(number):
    return [{"role": "user", "content": f"Hi {number}"}, {"role": "assistant", "content": f"Bye {number}"}]


def row_of(kind, number):
    user, assistant = talk(number)
    return {
        "pairs": {"prompt": user["content"], "completion": assistant["content"]},
        "messages": {"messages": talk(number)},
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": user["content"]},
                {"from": "gpt", "value": assistant["content"]},
            ]
        },
        "alpaca": {"instruction": user["content"], "input": "", "output": assistant["content"]},
        "chat pairs": {"prompt": [user], "completion": [assistant]},
        "text": {"text": f"Hello there {number}"},
    }[kind]


def save_table(path, rows, form):
    table = pa.Table.from_pylist(rows)
    if form == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


def save_as(folder, form, rows):
    """A file, or a folder, with these rows."""
    if form in ("parquet", "stream", "file"):
        return save_table(folder / f"t.{'parquet' if form == 'parquet' else 'arrow'}", rows, form)
    if form == "saved":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved", num_shards=2)
        return folder / "saved"
    if form == "shards":
        (folder / "shards").mkdir()
        put(folder / "shards/a.jsonl", lines(rows[:2]))
        put(folder / "shards/b.jsonl.gz", gzip.compress(lines(rows[2:]).encode()))
        return folder / "shards"
    if form in ("csv", "tsv"):
        between = "," if form == "csv" else "\t"
        held = [list(rows[0]), *([v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows)]
        quoted = [between.join('"' + value.replace('"', '""') + '"' for value in line) for line in held]
        return put(folder / f"t.{form}", "\n".join(quoted) + "\n")
    text = lines(rows).encode()
    return put(
        folder / {"list": "t.json"}.get(form, f"t.{form}"),
        {
            "jsonl": text,
            "jsonl.gz": gzip.compress(text),
            "jsonl.zst": pa.compress(text, codec="zstd", asbytes=True),
            "list": json.dumps(rows, indent=1).encode(),
        }[form],
    )


FORMS = ["jsonl", "jsonl.gz", "jsonl.zst", "list", "csv", "tsv", "parquet", "stream", "file", "saved", "shards"]
KINDS = ["pairs", "messages", "sharegpt", "alpaca", "chat pairs", "text"]
TALKS = "<|im_start|>user\nHi {0}<|im_end|>\n<|im_start|>assistant\nBye {0}<|im_end|>\n"


# Messages in two columns of a CSV file are two texts.
BOTH = [(f, k) for f in FORMS for k in KINDS if k != "chat pairs" or f not in ("csv", "tsv")]


@pytest.mark.parametrize(("form", "kind"), BOTH)
def test_the_same_examples_of_every_kind_of_file(tokenizer, tmp_path, form, kind):
    rows = [row_of(kind, number) for number in range(5)]
    data = load(tokenizer, save_as(tmp_path, form, rows))
    plain = {"pairs": "Hi {0}Bye {0}<|im_end|>", "text": "Hello there {0}<|im_end|>"}.get(kind, TALKS)
    assert texts(tokenizer, data) == [plain.format(number) for number in range(5)]
    put(tmp_path / "plain.jsonl", lines(rows))
    assert examples(data) == examples(load(tokenizer, tmp_path / "plain.jsonl"))


def test_a_text_file_is_one_text(tokenizer, tmp_path):
    path = put(tmp_path / "t.txt", b"\xef\xbb\xbfHi\r\nBye\x00")
    assert texts(tokenizer, load(tokenizer, path)) == ["Hi\r\nBye\x00<|im_end|>"]
    assert texts(tokenizer, load(tokenizer, path, format="text")) == ["Hi\r\nBye\x00<|im_end|>"]
    assert "t.txt" in refusal(tokenizer, path, format="pairs")
    assert "has no conversation" in refusal(tokenizer, path, format="chat")


def test_a_format_that_is_said(tokenizer, tmp_path):
    pairs = put(tmp_path / "pairs.jsonl", lines([{**row_of("pairs", 1), "text": "there"}]))
    assert texts(tokenizer, load(tokenizer, pairs)) == ["Hi 1Bye 1<|im_end|>"]
    assert texts(tokenizer, load(tokenizer, pairs, format="pairs")) == ["Hi 1Bye 1<|im_end|>"]
    assert texts(tokenizer, load(tokenizer, pairs, format="chat")) == [TALKS.format(1)]
    assert texts(tokenizer, load(tokenizer, pairs, format="text")) == ["there<|im_end|>"]
    assert texts(tokenizer, load(tokenizer, pairs, text="prompt")) == ["Hi 1<|im_end|>"]
    both = put(tmp_path / "both.jsonl", lines([{**row_of("pairs", 1), **row_of("messages", 2)}]))
    assert texts(tokenizer, load(tokenizer, both)) == [TALKS.format(2)]  # a conversation is the richer one
    assert texts(tokenizer, load(tokenizer, both, format="pairs")) == ["Hi 1Bye 1<|im_end|>"]
    text = put(tmp_path / "text.jsonl", lines([row_of("text", 1)]))
    said = refusal(tokenizer, text, format="chat")
    assert said.startswith(f"data.train {text}:1 has no conversation: it needs messages")
    assert said.endswith("it has text")
    assert "has no column prompt; it has text" in refusal(tokenizer, text, format="pairs")
    said = refusal(tokenizer, put(tmp_path / "messages.jsonl", lines([row_of("messages", 1)])), format="pairs")
    assert "conversations are read with data.format=chat" in said
    strange = put(tmp_path / "strange.jsonl", lines([{"question": "a", "answer": "b"}]))
    assert "has no column prompt; it has question, answer" in refusal(tokenizer, strange)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet", "file"])
def test_mixed_columns_between_shards(tokenizer, tmp_path, form):
    ending = {"file": "arrow"}.get(form, form)
    for number, kind in enumerate(("messages", "sharegpt")):
        (tmp_path / "made").mkdir(exist_ok=True)
        save_as(tmp_path / "made", form, [row_of(kind, number)] * 3).rename(tmp_path / f"{number}.{ending}")
    said = refusal(tokenizer, f"{tmp_path}/*.{ending}")
    assert said.startswith(f"data.train {tmp_path}/1.{ending}")
    assert "has no column messages; it has conversations" in said
    assert said.endswith(
        "the rows of one source are of one kind: list these files as a source of their own in data.train"
    )


def test_mixed_columns_of_pairs(tokenizer, tmp_path):
    put(tmp_path / "0.jsonl", lines([row_of("pairs", 0)]))
    put(tmp_path / "1.jsonl", lines([row_of("pairs", 0), {"question": "a", "completion": "b"}]))
    said = refusal(tokenizer, f"{tmp_path}/*.jsonl")
    assert said.startswith(f"data.train {tmp_path}/1.jsonl:2 has no column prompt; it has question, completion")


# Several sources


def test_a_list_of_sources(tokenizer, tmp_path):
    put(tmp_path / "talks.jsonl", lines([row_of("messages", number) for number in range(5)]))
    put(tmp_path / "asked.csv", "q,a\n" + "".join(f"Hi {number},Bye {number}\n" for number in range(5)))
    put(tmp_path / "notes.jsonl", lines([{"note": f"there {number}", "text": "-"} for number in range(5)]))
    config, found = found_of(
        tokenizer,
        [
            {"path": str(tmp_path / "talks.jsonl"), "limit": 2, "weight": 1},
            {"path": str(tmp_path / "asked.csv"), "prompt": "q", "completion": "a", "weight": 2.5},
            {"path": str(tmp_path / "asked.csv"), "prompt": "q", "completion": "a", "format": "chat", "limit": 1, "weight": 4},
            {"path": str(tmp_path / "notes.jsonl"), "text": "note", "limit": 3, "weight": 0.5},
        ],
    )  # fmt: skip
    data, _ = datasets_of(config, found)
    assert (data.source_sizes, data.source_weights) == ([2, 5, 1, 3], [1.0, 2.5, 4.0, 0.5])
    expected = [TALKS.format(number) for number in range(2)]
    expected += [f"Hi {number}Bye {number}<|im_end|>" for number in range(5)]
    expected += [TALKS.format(0), *(f"there {number}<|im_end|>" for number in range(3))]
    assert texts(tokenizer, data) == expected
    names = [source.name for source in facts_of(config, "train", data, found).sources]
    assert names == [str(tmp_path / name) for name in ("talks.jsonl", "asked.csv", "asked.csv", "notes.jsonl")]


def test_sources_without_weights(tokenizer, tmp_path):
    a, b = (put(tmp_path / f"{name}.jsonl", lines([row_of("pairs", 1)])) for name in "ab")
    data = load(tokenizer, [str(a), {"path": str(b)}])
    assert (data.source_sizes, data.source_weights) == ([1, 1], None)


def test_a_bad_row_of_the_second_source(tokenizer, tmp_path):
    a = put(tmp_path / "a.jsonl", lines([row_of("pairs", 1)]))
    b = put(tmp_path / "b.jsonl", lines([row_of("messages", 1), {"messages": [{"content": "x"}]}]))
    said = refusal(tokenizer, [str(a), str(b)])
    assert said.startswith(f"data.train {b}:2 message 1 has no role; it has content")
    assert refusal(tokenizer, a, eval=str(b)) == "data.eval" + said.removeprefix("data.train")
    assert load(tokenizer, [str(a), {"path": str(b), "limit": 1}]).source_sizes == [1, 1]  # it is never read


def test_names_on_the_hub(tokenizer, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_hub(*words):
        asked.append(words)
        return datasets.Dataset.from_list([row_of("messages", number) for number in range(3)])

    monkeypatch.setattr("cola_ds.data.sources.load_hub", load_hub)
    monkeypatch.chdir(tmp_path)
    data, held = load_splits(config_of("owner/name", eval="owner/other"), tokenizer)
    assert texts(tokenizer, data) == texts(tokenizer, held) == [TALKS.format(number) for number in range(3)]
    assert asked == [("owner/name", None, "train", None), ("owner/other", None, "validation", None)]
    asked.clear()
    own = {"hub": "owner/name", "hub_config": "en", "revision": "abc", "split": "test", "limit": 2}
    assert load(tokenizer, [own, "owner/name"]).source_sizes == [2, 3]
    assert asked == [("owner/name", "en", "test", "abc"), ("owner/name", None, "train", None)]
    (tmp_path / "owner/name").mkdir(parents=True)
    assert "owner/name is empty" in refusal(tokenizer, "owner/name")  # what is there is meant


def test_the_hub_by_a_folder(tokenizer, tmp_path):
    put(tmp_path / "train.jsonl", lines([row_of("messages", number) for number in range(3)]))
    put(tmp_path / "validation.jsonl", lines([row_of("messages", 7), {"messages": [{"role": "user", "content": "a"}]}]))
    assert texts(tokenizer, load(tokenizer, [{"hub": str(tmp_path), "limit": 1}])) == [TALKS.format(0)]
    said = refusal(tokenizer, [{"hub": str(tmp_path)}], eval=[{"hub": str(tmp_path)}])
    assert said.startswith(
        f"data.eval split validation of {tmp_path} on the hub row 2 has no message of the assistant's"
    )


@pytest.mark.parametrize("name", ["gone.jsonl", "gone/there.jsonl", "a/b/c", "gone/*.csv", "gone"])
def test_a_path_that_is_missing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^data\.train .*is not a file") as caught:
        check_sources(config_of(name))
    assert name in str(caught.value)


def test_a_missing_folder_that_may_be_a_hubs_name(tokenizer, tmp_path, monkeypatch):
    """`data/talks` is both: one line says that it is not here either."""
    monkeypatch.chdir(tmp_path)
    said = refusal(tokenizer, "data/talks")
    assert said.startswith("data.train split train of data/talks on the hub cannot be loaded: ")
    assert "data/talks is not here" in said


# Bad data

GOOD = [row_of("messages", number) for number in range(3)]
ROLELESS = {"messages": [{"content": "x"}, {"role": "assistant", "content": "y"}]}
NO_TEXT = {"messages": [{"role": "user", "content": {"a": 1}}, {"role": "assistant", "content": "y"}]}
HALF = {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "y"}]}
UNTRAINED = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}
BAD = {
    "not JSON": (b"oops\n", ":4: not valid JSON"),
    "cut off": (b'{"messages": [{"role"', ":4: not valid JSON"),
    "not UTF-8": ('{"messages": "\xe9"}\n'.encode("latin-1"), ":4: not UTF-8"),
    "NUL": (b"\0\0\0\n", ":4: not valid JSON"),
    "no object": (b"[1]\n", ":4: a row must be an object"),
    "no role": (lines([ROLELESS]).encode(), ":4 message 1 has no role; it has content"),
    "no text": (lines([NO_TEXT]).encode(), ":4 message 1 has content {'a': 1}"),
    "half a letter": (lines([HALF]).encode(), ":4 message 1: "),
    "nothing trained": (lines([UNTRAINED]).encode(), ":4 has no message of the assistant's to train"),
    "no messages": (lines([{"messages": []}]).encode(), ":4 has [] in column messages"),
    "null": (lines([{"messages": None}]).encode(), ":4 has None in column messages"),
    "another kind": (lines([row_of("pairs", 1)]).encode(), ":4 has no column messages; it has prompt, completion"),
}


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "crlf.jsonl", "bom.jsonl"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tokenizer, tmp_path, case, form):
    row, message = BAD[case]
    text = lines(GOOD).encode() + row
    if form == "crlf.jsonl":
        text = text.replace(b"\n", b"\r\n")
    if form == "bom.jsonl":
        text = b"\xef\xbb\xbf" + text
    text = {"jsonl.gz": gzip.compress, "jsonl.zst": lambda t: pa.compress(t, codec="zstd", asbytes=True)}.get(
        form, bytes
    )(text)
    path = put(tmp_path / f"t.{form}", text)
    said = refusal(tokenizer, path)
    assert said.startswith(f"data.train {path}{message}".removesuffix(" "))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_packed_file_that_is_cut_off(tokenizer, tmp_path, ending):
    random.seed(1)
    text = lines([{"messages": [{"role": "user", "content": random.random()}]} for _ in range(5000)]).encode()
    packed = gzip.compress(text) if ending == "gz" else pa.compress(text, codec="zstd", asbytes=True)
    path = put(tmp_path / f"t.jsonl.{ending}", packed[: len(packed) // 2])
    assert refusal(tokenizer, path).startswith(f"data.train {path}")
    flipped = bytearray(gzip.compress(lines(GOOD).encode()))
    flipped[-5] ^= 1
    path = put(tmp_path / "flipped.jsonl.gz", bytes(flipped))
    assert refusal(tokenizer, path).startswith(f"data.train {path} cannot be read")


def test_crlf_bom_and_nul_within_texts_are_kept(tokenizer, tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi\r\n\0"}, {"role": "assistant", "content": "\ufeffBye"}]}
    data = load(tokenizer, put(tmp_path / "t.jsonl", b"\xef\xbb\xbf" + lines([row]).replace("\n", "\r\n").encode()))
    assert texts(tokenizer, data) == [
        "<|im_start|>user\nHi\r\n\0<|im_end|>\n<|im_start|>assistant\n\ufeffBye<|im_end|>\n"
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.jsonl", b""), ("t.jsonl", b"\n \n"), ("t.json", b"[]"), ("t.csv", b""), ("t.csv", b"prompt,completion\n"),
     ("t.jsonl.gz", gzip.compress(b"")), ("t.arrow", b""), ("t.txt", b"")],
)  # fmt: skip
@pytest.mark.parametrize("form", ["auto", "chat", "pairs"])
def test_an_empty_file(tokenizer, tmp_path, name, content, form):
    path = put(tmp_path / name, content)
    if name == "t.txt" and form != "auto":
        assert str(path) in refusal(tokenizer, path, format=form)
    else:
        assert refusal(tokenizer, path, format=form) == f"data.train {path} is empty: it needs at least one row"


def test_an_empty_table(tokenizer, tmp_path):
    for form in ("parquet", "file", "stream"):
        path = tmp_path / f"t-{form}.{'parquet' if form == 'parquet' else 'arrow'}"
        save_table(save_table(path, GOOD, form), GOOD, form)
        table = pa.Table.from_pylist(GOOD).slice(0, 0)
        if form == "parquet":
            pq.write_table(table, path)
        else:
            with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(str(path), table.schema) as writer:
                writer.write_table(table)
        assert refusal(tokenizer, path) == f"data.train {path} is empty: it needs at least one row"


def test_a_folder_without_shards(tokenizer, tmp_path):
    (tmp_path / "none").mkdir()
    put(tmp_path / "none/README.md", "no data")
    assert (
        refusal(tokenizer, tmp_path / "none")
        == f"data.train {tmp_path}/none is empty: it needs at least one file of data"
    )


@pytest.mark.parametrize("kind", ["messages", "pairs"])
def test_a_row_of_50_megabytes(tokenizer, tmp_path, kind):
    """No tokenizer has the memory that it takes: it is named before it is tried."""
    large = {
        "messages": {"messages": [{"role": "user", "content": "Hi there " * 5_600_000}, talk(1)[1]]},
        "pairs": {"prompt": "Hi there " * 5_600_000, "completion": "Bye"},
    }[kind]
    path = put(tmp_path / "t.jsonl.gz", gzip.compress(lines([row_of(kind, 0), large]).encode(), 1))
    said = refusal(tokenizer, path)
    assert said.startswith(f"data.train {path}:2 has 50,400,0")
    assert said.endswith("letters, more than the 10,000,000 of the longest row: split it, or leave it out")


def test_a_row_of_a_megabyte(tokenizer, tmp_path):
    large = {"messages": [*talk(1), {"role": "user", "content": "Hi there " * 120_000}, *talk(2)[1:]]}
    data = load(tokenizer, put(tmp_path / "t.jsonl", lines([GOOD[0], large, GOOD[1]])))
    assert data.lengths.tolist()[1] == 512
    assert data.lost == {CONVERSATION_END: 1}
    assert texts(tokenizer, data)[2] == TALKS.format(1)


def test_all_examples_too_long(tokenizer, tmp_path):
    pairs = put(tmp_path / "pairs.jsonl", lines([row_of("pairs", number) for number in range(3)]))
    said = refusal(tokenizer, pairs, max_length=4, too_long="drop")
    assert said == f"data.train {pairs} has no example left: all 3 are {TOO_LONG}; raise it"
    talks = put(tmp_path / "talks.jsonl", lines(GOOD))
    assert refusal(tokenizer, talks, max_length=8, too_long="drop").endswith(f"all 3 are {TOO_LONG}; raise it")
    assert refusal(tokenizer, talks, max_length=4).endswith(f"all 3 are {NOTHING_LEFT}; raise it")


@pytest.mark.parametrize("option", [{"system": "Be kind"}, {"loss_on": "all"}, {"tools": [{"name": "sun"}]}])
def test_options_of_conversations_want_some(tmp_path, option):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "1+1=", "completion": "2"}\n', encoding="utf-8")
    (name,) = option
    with pytest.raises(
        UserError, match=rf"^data.{name} is for conversations, and there are none: set data.format=chat"
    ):
        load_split(DataConfig(train=str(path), cache="none", **option), "train", chat_tokenizer("chatml"))
    config = DataConfig(train=str(path), cache="none", format="chat", **option)
    assert len(load_split(config, "train", chat_tokenizer("chatml"))) == 1
