"""What becomes of examples: held out by content, there twice, too long. Nothing depends on the seed or on the order of rows."""

import json
import random

import pytest

from cola_ds.config.schema import DataConfig
from cola_ds.data.encode import TOO_LONG
from cola_ds.data.text import datasets_of, facts_of
from cola_ds.data.tokenize import tokenize
from cola_ds.data.tokens import COMPLETION_END, CONVERSATION_END, WHOLE_PROMPT
from cola_ds.errors import UserError
from tests.data.test_tasks import make_tokenizer
from tests.support.chat import chat_tokenizer
from tests.support.data import load_splits
from tests.support.toys import run_config


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def pairs(*numbers):
    return [{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in numbers]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(train, **options):
    train = [str(path) for path in train] if isinstance(train, list) else str(train)
    return DataConfig(train=train, cache="none", **options)


def texts(tokenizer, data):
    return ["".join(tokenizer.convert_ids_to_tokens(data.example(index)[0][1:-1])) for index in range(len(data))]


def sides(tokenizer, train, **options):
    return [texts(tokenizer, data) for data in load_splits(config_of(train, **options), tokenizer)]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"eval_examples": 7}, 7),
        ({"eval_fraction": 0.1}, 10),
        ({"eval_fraction": 0.001}, 1),
        ({"eval_examples": 99}, 99),
    ],
)
def test_so_many_are_held_out(tokenizer, tmp_path, options, count):
    train, held = sides(tokenizer, write(tmp_path / "t.jsonl", pairs(*range(100))), **options)
    assert (len(train), len(held)) == (100 - count, count)
    assert sorted(train + held) == sorted(f"{n}+1={n + 1}" for n in range(100))


def test_no_content_is_on_both_sides(tokenizer, tmp_path):
    """Of what is there twice, also in another source, all rows are on one side, and one of them is evaluated."""
    first = write(tmp_path / "a.jsonl", pairs(*range(40), *range(40)))
    second = write(tmp_path / "b.jsonl", pairs(*range(20, 60)))
    train, held = sides(tokenizer, [first, second], eval_examples=20)
    assert not set(train) & set(held)
    assert len(held) == len(set(held)) == 20
    assert len(set(train)) == 40
    times = {**{n: 2 for n in range(20)}, **{n: 3 for n in range(20, 40)}, **{n: 1 for n in range(40, 60)}}
    assert len(train) == sum(times.values()) - sum(times[int(text.split("+")[0])] for text in held)


def test_the_same_whatever_the_order(tokenizer, tmp_path):
    rows = pairs(*range(100))
    _, held = sides(tokenizer, write(tmp_path / "a.jsonl", rows), eval_examples=20)
    random.Random(1).shuffle(rows)
    _, shuffled = sides(tokenizer, write(tmp_path / "b.jsonl", rows), eval_examples=20)
    parts = [write(tmp_path / f"{part}.jsonl", rows[part * 50 : part * 50 + 50]) for part in range(2)]
    _, split = sides(tokenizer, parts, eval_examples=20)
    assert sorted(held) == sorted(shuffled) == sorted(split)
    assert held != [f"{n}+1={n + 1}" for n in range(20)]  # not the first ones


def test_other_rows_change_little(tokenizer, tmp_path):
    _, before = sides(tokenizer, write(tmp_path / "a.jsonl", pairs(*range(100))), eval_fraction=0.2)
    _, after = sides(tokenizer, write(tmp_path / "b.jsonl", pairs(*range(200))), eval_fraction=0.2)
    kept = [text for text in after if int(text.split("+")[0]) < 100]
    assert set(kept) <= set(before) or set(before) <= set(kept)
    assert len(set(before) & set(kept)) > 10


@pytest.mark.parametrize(
    ("options", "key"), [({"eval_examples": 3}, "eval_examples 3"), ({"eval_fraction": 0.9}, "eval_fraction 0.9")]
)
def test_nothing_left_to_train_on(tokenizer, tmp_path, options, key):
    path = write(tmp_path / "t.jsonl", pairs(1, 2, 3, 3))
    with pytest.raises(
        UserError, match=rf"^data.{key} leaves nothing to train on: data.train has 3 examples that differ$"
    ):
        sides(tokenizer, path, **options)


def test_what_is_there_twice(tokenizer, tmp_path):
    a, b = write(tmp_path / "a.jsonl", pairs(1, 2, 1)), write(tmp_path / "b.jsonl", pairs(2, 3))
    for options, expected, sizes in (
        ({}, [1, 2, 1, 2, 3], [3, 2]),
        ({"duplicates": "drop"}, [1, 2, 3], [2, 1]),
    ):
        config = config_of([a, b], **options)
        found = tokenize(config, tokenizer)
        data, _ = datasets_of(config, found)
        assert texts(tokenizer, data) == [f"{n}+1={n + 1}" for n in expected]
        assert data.source_sizes == sizes
        assert facts_of(config, "train", data, found).duplicates == 2


def test_what_is_there_twice_of_what_is_left(tokenizer, tmp_path):
    train, held = sides(
        tokenizer, write(tmp_path / "t.jsonl", pairs(*range(20), *range(20))), eval_examples=5, duplicates="drop"
    )
    assert (len(train), len(held)) == (15, 5)


def test_the_windows_of_a_row_stay_together(tokenizer, tmp_path):
    rows = [{"text": f"{n % 10}" * 9} for n in range(20)]
    path = write(tmp_path / "t.jsonl", rows)
    train, held = (set("".join(side)) for side in sides(tokenizer, path, eval_examples=3, max_length=4))
    assert not train & held - {"<", ">", "/", "s"}
    data, _ = load_splits(config_of(path, duplicates="drop", max_length=4), tokenizer)
    whole, _ = load_splits(config_of(path, max_length=4), tokenizer)
    assert 2 * len(data) == len(whole)


@pytest.mark.parametrize("too_long", ["truncate", "drop", "error"])
def test_too_long(tokenizer, tmp_path, too_long):
    rows = [*pairs(1), {"prompt": "x" * 20, "completion": "y"}, {"prompt": "", "completion": "z" * 20}, *pairs(2)]
    config = config_of(write(tmp_path / "t.jsonl", rows), max_length=8, too_long=too_long)
    if too_long == "error":
        with pytest.raises(
            UserError, match=r"t.jsonl:2 has 23 tokens, more than data.max_length 8: shorten it, or set data.too_long"
        ):
            tokenize(config, tokenizer)
        return
    (tokens,) = tokenize(config, tokenizer).splits["train"]
    if too_long == "drop":
        assert (tokens.counts.examples, tokens.counts.rows) == (2, 4)
        assert (tokens.counts.dropped, tokens.counts.lost) == ({TOO_LONG: 2}, {})
    else:
        assert (tokens.counts.examples, tokens.counts.dropped) == (4, {})
        assert tokens.counts.lost[COMPLETION_END] == 1
        assert sum(tokens.counts.lost.values()) - tokens.counts.lost[WHOLE_PROMPT] == 2


@pytest.mark.parametrize("too_long", ["truncate", "drop", "error"])
def test_conversations_that_are_too_long(tmp_path, too_long):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye there"}]
    rows = [{"messages": talk}, {"messages": talk * 9}]
    config = config_of(write(tmp_path / "t.jsonl", rows), max_length=30, too_long=too_long)
    if too_long == "error":
        with pytest.raises(UserError, match=r"t.jsonl:2 has \d+ tokens, more than data.max_length 30"):
            tokenize(config, chat_tokenizer("chatml"))
        return
    (tokens,) = tokenize(config, chat_tokenizer("chatml")).splits["train"]
    assert tokens.counts.lost == ({CONVERSATION_END: 1} if too_long == "truncate" else {})
    assert tokens.counts.dropped == ({} if too_long == "truncate" else {TOO_LONG: 1})


def test_a_batch_of_which_nothing_is_left(tokenizer, tmp_path, monkeypatch):
    """In memory and in the cache, at the beginning and at the end."""
    monkeypatch.setattr("cola_ds.data.tokenize._BATCH_ROWS", 3)
    long = {"prompt": "x" * 20, "completion": "y"}
    path = write(tmp_path / "t.jsonl", [long, long, long, *pairs(1, 2), long, long, long, long])
    for cache in ("none", str(tmp_path / "c"), str(tmp_path / "c")):
        config = DataConfig(train=str(path), cache=cache, max_length=12, too_long="drop", duplicates="drop")
        data, _ = load_splits(config, tokenizer)
        assert texts(tokenizer, data) == ["1+1=2", "2+1=3"]


def test_what_was_lost_is_counted_once(toy, tmp_path):
    from cola_ds.config.schema import RunConfig
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    path = write(tmp_path / "t.jsonl", [*pairs(*range(20)), {"prompt": "x" * 90, "completion": "y"}])
    config = run_config(toy[0], path, tmp_path / "run", data={"eval_examples": 5})
    assert "; 1 lost the beginning of their prompt, too long" in summarize(
        prepare(RunConfig.model_validate(config), 1), 1
    )
