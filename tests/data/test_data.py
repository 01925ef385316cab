"""Rows to token ids, token ids to batches."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ds.config.loading import load_config
from cola_ds.config.schema import DataConfig
from cola_ds.data.batch import IGNORED
from cola_ds.data.batcher import Batcher
from cola_ds.data.collate import collate
from cola_ds.data.tokens import COMPLETION_END, PROMPT_BEGIN, WHOLE_PROMPT, cut_pair, pairs_of
from tests.data.test_tasks import make_tokenizer
from tests.support.data import load_split
from tests.support.toys import REPOSITORY, run_config, save_metaspace_tokenizer, save_run, save_sums, save_tokenizer


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


def ids_at(data, index):
    return data.example(index)[0].tolist()


def prompt_lengths(data):
    """Ids of each example before its loss begins, which goes on to its end."""
    spans = [data.example(index)[1].tolist() for index in range(len(data))]
    assert all(len(own) == 1 and own[0][1] == length for own, length in zip(spans, data.lengths, strict=True))
    return [own[0][0] for own in spans]


def examples(data):
    return list(zip([ids_at(data, index) for index in range(len(data))], prompt_lengths(data), strict=True))


def texts(tokenizer, data):
    return [tokenizer.decode(ids) for ids, _ in examples(data)]


# Rows to ids


def test_prompt_and_completion(tokenizer, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": "ab", "completion": "cd"}, {"prompt": "", "completion": "x"}])
    data = load(tokenizer, path)
    assert texts(tokenizer, data) == ["<s>abcd</s>", "<s>x</s>"]  # BOS as the tokenizer puts it, EOS after the answer
    assert prompt_lengths(data) == [3, 1]
    assert (data.lengths.tolist(), data.loss_tokens.tolist(), data.lost) == ([6, 3], [3, 2], {})


def pieces(tokenizer, prompt, completion):
    """The pieces of a pair, with a bar where the loss begins."""
    ((ids, begin),) = pairs_of([(prompt, completion)], tokenizer)
    names = tokenizer.convert_ids_to_tokens(ids)
    return " ".join([*names[:begin], "|", *names[begin:]])


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("metaspace")
    save_metaspace_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_ids_are_those_of_the_whole_text(metaspace, tmp_path):
    data = load(metaspace, write(tmp_path / "t.jsonl", [{"prompt": "12+30=", "completion": "42"}]))
    assert ids_at(data, 0) == [*metaspace("12+30=42").input_ids, metaspace.eos_token_id]
    assert prompt_lengths(data) == [8]
    assert metaspace.decode(ids_at(data, 0), skip_special_tokens=True) == "12+30=42"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("12+30=", "42", "<s> ▁ 1 2 + 3 0 = | 42 </s>"),
        ("", "42", "<s> | ▁42 </s>"),
        ("1 ", "42", "<s> ▁ 1 | ▁42 </s>"),  # a space of the prompt in a piece of the completion
        ("<s>1", "42", "<s> ▁ 1 | 42 </s>"),
        ("1", "42</s>", "<s> ▁ 1 | 42 </s>"),
        ("<s>a</s>", "42", "<s> ▁ a </s> | ▁42 </s>"),
        ("a</s>", "42</s>", "<s> ▁ a </s> | ▁42 </s>"),
        ("", "<s>a</s>", "<s> | ▁ a </s>"),
        ("<s><s>", "a</s></s>", "<s> <s> | ▁ a </s> </s>"),  # what the text itself has twice stays
        ("é", "è", "<s> ▁ <0xC3> <0xA9> | <0xC3> <0xA8> </s>"),
    ],
)
def test_bos_and_eos_are_there_once(metaspace, prompt, completion, expected):
    assert pieces(metaspace, prompt, completion) == expected


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("a", "b", "a | b </s>"),
        ("a</s>", "b", "a </s> | b </s>"),
        ("a", "b</s>", "a | b </s>"),
        ("a", "</s>", "a | </s>"),
        ("", "b", "| b </s>"),
        ("a</s>", "</s>", "a </s> | </s>"),
    ],
)
def test_whatever_the_tokenizer_adds_itself(template, prompt, completion, expected):
    tokenizer = make_tokenizer(template)
    begin = "<s> " if "<s>" in template else ""
    assert pieces(tokenizer, prompt, completion) == begin + expected
    assert pieces(tokenizer, "<s>" + prompt, completion) == "<s> " + expected


def test_bos_and_eos_may_be_the_same_token():
    tokenizer = make_tokenizer("</s> $A")
    tokenizer.bos_token = "</s>"
    assert pieces(tokenizer, "a", "b") == "</s> a | b </s>"
    assert pieces(tokenizer, "</s>a", "b</s>") == "</s> a | b </s>"
    assert pieces(tokenizer, "", "b") == "</s> | b </s>"


def test_a_piece_of_both_is_the_completions(tmp_path):
    tokenizer = make_tokenizer(merges=[("b", "c"), ("a", "bc")])
    assert pieces(tokenizer, "xab", "cd") == "<s> x | abc d </s>"
    data = load(tokenizer, write(tmp_path / "t.jsonl", [{"prompt": "xab", "completion": "cd"}]))
    assert (prompt_lengths(data), data.loss_tokens.tolist()) == ([2], [3])


class WithoutSpans:
    """A tokenizer that does not say which letters a piece has."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner
        self.bos_token_id, self.eos_token_id = inner.bos_token_id, inner.eos_token_id
        self.convert_ids_to_tokens = inner.convert_ids_to_tokens

    def __call__(self, texts, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self.inner(texts, **options)


def test_without_the_letters_of_pieces(metaspace):
    tokenizer = WithoutSpans(make_tokenizer(merges=[("b", "c"), ("a", "bc")]))
    assert pieces(tokenizer, "xa", "d") == "<s> x a | d </s>"
    assert pieces(tokenizer, "xab", "cd") == "<s> x | abc d </s>"
    assert pieces(WithoutSpans(metaspace), "<s>a</s>", "42</s>") == "<s> ▁ a </s> | ▁42 </s>"
    from transformers import ByT5Tokenizer  # one that is written in Python, and ends texts with EOS itself

    assert pieces(ByT5Tokenizer(), "a</s>", "b") == "a </s> | b </s>"
    assert pieces(ByT5Tokenizer(), "a", "b</s>") == "a | b </s>"


letters = st.text(st.sampled_from("abéß😀 \n"), max_size=6)


@settings(max_examples=60, deadline=None)
@given(prompt=letters, completion=letters.filter(bool))
def test_no_letter_of_a_completion_is_left_out_of_the_loss(prompt, completion):
    tokenizer = _merging
    ((ids, begin),) = pairs_of([(prompt, completion)], tokenizer)
    assert ids == [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
    of_bytes = [len(tokenizer.convert_ids_to_tokens(token)) for token in ids[1:-1]]  # byte-level: a letter a byte
    before, here = sum(of_bytes[: begin - 1]), sum(of_bytes[:begin])
    assert before <= len(prompt.encode()) < here


_merging = make_tokenizer(merges=[("a", "b"), ("b", "a"), ("ab", "ab"), ("Ġ", "a"), ("Ã", "©")])


def test_the_readmes_example(metaspace):
    text = (REPOSITORY / "launch/README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(.*?)` \| `(.*?)` \| `(<s>.*?)` \|$", text, re.MULTILINE)
    assert len(found) == 4
    for prompt, completion, expected in found:
        assert pieces(metaspace, prompt, completion) == expected.replace("→", "|")
    ids = re.search(r"ids of the first row are `([\d ]+)`", text)
    assert pairs_of([(found[0][0], found[0][1])], metaspace)[0][0] == [int(word) for word in ids[1].split()]


# Too long


@pytest.mark.parametrize(
    ("max_length", "expected", "lost"),
    [
        (10, "<s>cdefghXY</s>", [PROMPT_BEGIN]),
        (5, "<s>hXY</s>", [PROMPT_BEGIN]),
        (4, "<s>XY</s>", [WHOLE_PROMPT]),
        (3, "<s>XY", [WHOLE_PROMPT, COMPLETION_END]),
        (2, "<s>X", [WHOLE_PROMPT, COMPLETION_END]),
    ],
)
def test_a_long_prompt_loses_its_beginning_but_not_bos(tokenizer, tmp_path, max_length, expected, lost):
    rows = [{"prompt": "abcdefgh", "completion": "XY"}]
    data = load(tokenizer, write(tmp_path / "t.jsonl", rows), max_length=max_length)
    assert texts(tokenizer, data) == [expected]  # without EOS where the completion goes on
    assert data.lost == dict.fromkeys(lost, 1)
    assert data.lengths[0] <= max_length


@pytest.mark.parametrize(
    ("prompt", "completion", "expected", "lost"),
    [
        ("", "abcdef", "<s>abc", [COMPLETION_END]),
        ("x", "abc", "xabc", [COMPLETION_END]),
        ("xyz", "ab", "zab</s>", [PROMPT_BEGIN]),
        ("", "abc", "abc</s>", []),
        ("", "abcd", "abcd", [COMPLETION_END]),  # the first id is not predicted: it is what there is to begin with
    ],
)
def test_without_a_prompt_or_bos(prompt, completion, expected, lost):
    tokenizer = make_tokenizer("<s> $A" if expected.startswith("<s>") else "$A")
    ((ids, begin),) = pairs_of([(prompt, completion)], tokenizer)
    kept, _, what = cut_pair(ids, begin, 4, tokenizer.bos_token_id)
    assert "".join(tokenizer.convert_ids_to_tokens(kept)) == expected
    assert what == lost


def test_three_losses_are_told_apart(toy, tmp_path):
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    rows = [
        {"prompt": "Q0? ", "completion": "answer " * 20},
        {"prompt": "Q1? ", "completion": "answer " * 20},
        {"prompt": "Why? " * 10, "completion": "so"},
        {"prompt": "Why? " * 10, "completion": "x" * 30},
        {"prompt": "1+1=", "completion": "2"},
    ]
    path = write(tmp_path / "t.jsonl", rows)
    write(tmp_path / "w.jsonl", [rows[4], {"prompt": "2+2=", "completion": "4"}])
    data = {"max_length": 32, "eval": str(path), "watch": str(tmp_path / "w.jsonl")}
    config = run_config(toy[0], path, tmp_path / "run", data=data, chain={"diagnostics": True})
    prepared = prepare(load_config(save_run(tmp_path / "run.yaml", config)), 1)
    assert prepared.train.lost == {PROMPT_BEGIN: 1, WHOLE_PROMPT: 3, COMPLETION_END: 2}
    said = summarize(prepared, 1)
    line = next(line for line in said.splitlines() if line.startswith("data "))
    assert line.endswith(
        "5 training examples, 5 held out, 2 watched; 2 lost the beginning of their prompt, 6 lost their whole prompt, "
        "4 lost the end of their completion, too long for data.max_length; 5 rows of data.eval in data.train too; "
        "1 row of data.watch in data.train too"
    )
    assert "\ndiagnostics at each knot, to links.jsonl\n" in said


# Plain text


def test_text_is_predicted_once(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghij", encoding="utf-8")
    data = load(tokenizer, tmp_path / "t.txt", text="text", max_length=4)
    assert texts(tokenizer, data) == ["<s>abc", "cdef", "fghi", "ij</s>"]
    assert sum(data.loss_tokens) == 11  # ten letters and EOS


@pytest.mark.parametrize("text", ["hello", "<s>hello", "hello</s>", "<s>hello</s>"])
@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_text_has_bos_and_eos_once(tmp_path, template, text):
    path = write(tmp_path / "t.jsonl", [{"text": text}])
    tokenizer = make_tokenizer(template)
    assert texts(tokenizer, load(tokenizer, path, text="text")) == ["<s> h e l l o </s>"]


def test_empty_lines_of_text_are_left_out(tokenizer, tmp_path):
    rows = [{"text": "ab"}, {"text": ""}, {"text": " "}, {"text": "c"}]
    path = write(tmp_path / "t[1].jsonl", rows)  # no glob pattern either
    assert texts(tokenizer, load(tokenizer, path, text="text")) == ["<s>ab</s>", "<s>c</s>"]


def test_what_a_run_is_known_by(tokenizer, tmp_path):
    """As it was when runs that are there already wrote it down."""
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(1001)]
    data = load(tokenizer, write(tmp_path / "t.jsonl", rows))
    digest = hashlib.sha256(np.array(data.lengths, dtype=np.int64).tobytes())
    for part in (slice(0, 1000), slice(1000, 1001)):
        ids = [token for example, _ in examples(data)[part] for token in example]
        for column in (ids, prompt_lengths(data)[part]):
            digest.update(np.array(column, dtype=np.int32).tobytes())
    assert data.fingerprint() == digest.hexdigest()


# Batches


def test_collate_counts_completions_alone():
    batch = collate([([1, 5, 6, 7], [(2, 4)]), ([1, 8], [(1, 2)])])
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
    assert sorted(seen) == sorted(tuple(ids) for ids, _ in examples(data))


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
    assert sorted(found) == sorted(tuple(ids) for ids, _ in examples(data))
    assert sum(part.examples for part in shares[0]) == 21
    assert sum(part.loss_tokens for part in shares[0]) == sum(data.loss_tokens)


def test_a_batch_that_counts_nothing(data):
    (filler,) = Batcher(data, 1, 2).step(2, 0, 10, 5).micro_batches  # the last of 21 examples is process 0's
    assert (filler.labels == IGNORED).all()
    assert torch.equal(filler.attention_mask, torch.ones(1, 1, dtype=torch.long))
