"""Rows to token ids, token ids to batches."""

import json

import pytest
import torch

from cola_ds.config import DataConfig
from cola_ds.data.batching import IGNORED, Batcher, collate
from cola_ds.data.sources import load_split
from cola_ds.errors import UserError
from tests.toys import save_sums, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(tokenizer, path, **options):
    return load_split(DataConfig(train=str(path), **options), "train", tokenizer)


def test_prompt_and_completion(tokenizer, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": "ab", "completion": "cd"}, {"prompt": "", "completion": "x"}])
    data = load(tokenizer, path)
    assert (
        tokenizer.decode(data.rows[0]["input_ids"]) == "<s>abcd</s>"
    )  # BOS as the tokenizer puts it, EOS after the answer
    assert data.rows["prompt_length"][:] == [3, 1]
    assert (data.lengths, data.loss_tokens, data.shortened) == ([6, 3], [3, 2], 0)


def test_parquet_and_other_columns(tokenizer, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"q": ["ab"], "a": ["c"]}).to_parquet(tmp_path / "t.parquet")
    data = load(tokenizer, tmp_path / "t.parquet", prompt="q", completion="a")
    assert tokenizer.decode(data.rows[0]["input_ids"]) == "<s>abc</s>"


def test_dataset_by_name_and_split(tokenizer, tmp_path):
    """A folder stands in for a name on the hub: it is loaded the same way."""
    write(tmp_path / "train.jsonl", [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "e"}])
    data = load(tokenizer, "train[:1]", hub=str(tmp_path))
    assert [tokenizer.decode(ids) for ids in data.rows["input_ids"]] == ["<s>abc</s>"]
    with pytest.raises(UserError, match=r"data\.train: cannot load split nope of data\.hub"):
        load(tokenizer, "nope", hub=str(tmp_path))


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(10, "<s>cdefghXY</s>"), (5, "<s>hXY</s>"), (4, "<s>XY</s>"), (3, "<s>XY"), (2, "<s>X")],
)
def test_a_long_prompt_loses_its_beginning_but_not_bos(tokenizer, tmp_path, max_length, expected):
    data = load(
        tokenizer, write(tmp_path / "t.jsonl", [{"prompt": "abcdefgh", "completion": "XY"}]), max_length=max_length
    )
    assert tokenizer.decode(data.rows[0]["input_ids"]) == expected
    assert data.shortened == 1
    assert data.lengths[0] <= max_length


def test_text_is_predicted_once(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghij", encoding="utf-8")
    data = load(tokenizer, tmp_path / "t.txt", text="text", max_length=4)
    windows = [tokenizer.decode(ids) for ids in data.rows["input_ids"]]
    assert windows == ["<s>abc", "cdef", "fghi", "ij</s>"]
    assert sum(data.loss_tokens) == 11  # ten letters and EOS


def test_empty_lines_of_text_are_left_out(tokenizer, tmp_path):
    path = write(
        tmp_path / "t[1].jsonl", [{"text": "ab"}, {"text": ""}, {"text": " "}, {"text": "c"}]
    )  # no glob pattern either
    data = load(tokenizer, path, text="text")
    assert [tokenizer.decode(ids) for ids in data.rows["input_ids"]] == ["<s>ab</s>", "<s>c</s>"]


def test_file_that_is_not_utf8(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe", "completion": "b"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl"):
        load(tokenizer, path)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "is not a file"),
        ("", {}, "is empty: it needs at least one row"),
        ("not json\n", {}, "cannot be read as json"),
        ('{"prompt": "a", "answer": "b"}\n', {}, "has no column completion; it has prompt, answer"),
        ('{"prompt": "a", "completion": ""}\n', {}, "row 1 has '' in column completion; it must be text"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": null, "completion": "b"}\n',
            {},
            "row 2 has None in column prompt",
        ),
        ('{"prompt": "a", "completion": 3}\n', {}, "row 1 has 3 in column completion"),
        ('{"prompt": "a", "completion": "b"}\n', {"text": "text"}, "has no column text"),
        ('{"text": ""}\n', {"text": "text"}, "leaves nothing to predict"),
    ],
)
def test_files_that_are_refused(tokenizer, tmp_path, content, options, message):
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(tokenizer, path, **options)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_unknown_suffix(tokenizer, tmp_path):
    (tmp_path / "t.csv").write_text("a,b", encoding="utf-8")
    with pytest.raises(UserError, match=r"use a .jsonl, .json or .parquet file"):
        load(tokenizer, tmp_path / "t.csv")


def test_collate_counts_completions_alone():
    batch = collate([([1, 5, 6, 7], 2), ([1, 8], 1)])
    assert batch.input_ids.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.positions.tolist() == [0, 1, 2]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    return load(tokenizer, save_sums(tmp_path_factory.mktemp("data") / "t.jsonl", 21))


def examples_of(batches):
    """Unpadded ids of every example that counts something."""
    found = []
    for batch in batches:
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            if (labels != IGNORED).any():
                found.append(tuple(ids[mask.bool()].tolist()))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_an_epoch_holds_each_example_once_at_every_world_size(data, world_size, micro_batch_size):
    batchers = [Batcher(data, rank, world_size) for rank in range(world_size)]
    alone = Batcher(data, 0, 1)
    seen = []
    for step in range(3):  # 21 examples: the last step of the epoch holds 5
        shares = [batcher.step(step, 7, 8, micro_batch_size) for batcher in batchers]
        assert len({len(share.micro_batches) for share in shares}) == 1
        found = [example for share in shares for example in examples_of(share.micro_batches)]
        assert sorted(found) == sorted(examples_of(alone.step(step, 7, 8, 8).micro_batches))
        labels = sum(int((batch.labels != IGNORED).sum()) for share in shares for batch in share.micro_batches)
        assert {share.loss_tokens for share in shares} == {labels}
        assert {share.tokens for share in shares} == {sum(map(len, found))}
        seen += found
    assert sorted(seen) == sorted(map(tuple, data.rows["input_ids"]))


def test_epochs_and_seeds_differ_in_order_alone(data):
    batcher = Batcher(data, 0, 1)

    def epoch(number, seed):
        return [e for step in range(3) for e in examples_of(batcher.step(3 * number + step, seed, 8, 8).micro_batches)]

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(1, 1)
    assert epoch(0, 1) != epoch(0, 2)
    assert sorted(epoch(0, 1)) == sorted(epoch(1, 1)) == sorted(epoch(0, 2))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_holds_each_example_once(data, world_size):
    shares = [list(Batcher(data, rank, world_size).evaluation(2)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    found = [example for share in shares for part in share for example in examples_of(part.micro_batches)]
    assert sorted(found) == sorted(map(tuple, data.rows["input_ids"]))
    assert sum(part.examples for part in shares[0]) == 21
    assert sum(part.loss_tokens for part in shares[0]) == sum(data.loss_tokens)


def test_a_batch_that_counts_nothing(data):
    (filler,) = Batcher(data, 1, 2).step(2, 0, 10, 5).micro_batches  # the last of 21 examples is process 0's
    assert (filler.labels == IGNORED).all()
    assert torch.equal(filler.attention_mask, torch.ones(1, 1, dtype=torch.long))
