"""Tasks: rows to prompts, samples, token ids and scores. Prompts here are written out by hand."""

import collections
import dataclasses
import json
import re

import numpy
import pytest
import yaml

from cola_ds.config.schema import DataConfig
from cola_ds.data.batch import Encoded
from cola_ds.data.candidates import common_prefix
from cola_ds.data.tasks.catalog import TASKS, Example, fields_of, task_named
from cola_ds.data.tasks.custom import task_from_yaml
from cola_ds.data.tasks.dataset import TaskData, find_task
from cola_ds.data.tasks.encoding import encode, with_demonstrations
from cola_ds.data.tasks.files import Rows, examples_of, read_rows
from cola_ds.data.tasks.metrics import accuracy, score, squad_f1
from cola_ds.data.tasks.sampling import sample
from cola_ds.data.tokens import ANSWER_BEGIN, PROMPT_BEGIN, WHOLE_PROMPT
from cola_ds.errors import UserError
from tests.support.data import load_split
from tests.support.toys import REAL_TASKS


def chosen(prompt, candidates, *correct):
    return Example(prompt, candidates=candidates, correct=correct)


def generated(prompt, completion, *answers):
    return Example(prompt, answers=answers, completion=completion)


NO_YES = ("No", "Yes")
YES_NO = ("Yes", "No")
# Each task's rows with the Hugging Face fields, and what they make.
BY_HAND = [
    (
        "sst2",
        {"sentence": " it 's a charming journey . ", "label": 1, "idx": 0},
        chosen("it 's a charming journey . It was", (" terrible", " great"), 1),
    ),
    (
        "sst2",
        {"sentence": "unflinchingly bleak", "label": 0},
        chosen("unflinchingly bleak It was", (" terrible", " great"), 0),
    ),
    (
        "cb",
        {"premise": "He may be right.", "hypothesis": "he is right", "label": 2},
        chosen(
            'Suppose He may be right. Can we infer that "he is right"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe"), 2
        ),
    ),
    (
        "cb",
        {"premise": "A {brace}.", "hypothesis": "x", "label": 1},
        chosen('Suppose A {brace}. Can we infer that "x"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe"), 1),
    ),
    (
        "rte",
        {"premise": "No weapons found.", "hypothesis": "Weapons found.", "label": 1},
        chosen('No weapons found.\nDoes this mean that "Weapons found." is true? Yes or No?\n', YES_NO, 1),
    ),
    (
        "rte",
        {"premise": "It rains in Rome.", "hypothesis": "It rains.", "label": 0},
        chosen('It rains in Rome.\nDoes this mean that "It rains." is true? Yes or No?\n', YES_NO, 0),
    ),
    (
        "boolq",
        {"passage": "Ethanol -- is a fuel.", "question": "is ethanol a fuel", "label": 1},
        chosen("Ethanol -- is a fuel. Is ethanol a fuel?\n", NO_YES, 1),
    ),
    (
        "boolq",
        {"passage": "Cats purr.", "question": "Do cats bark?", "label": 0},
        chosen("Cats purr. Do cats bark?\n", NO_YES, 0),
    ),
    (
        "wsc",
        {"text": "Mark told Pete lies. He lied.", "span1_text": "Mark", "span2_text": "He", "label": 1},
        chosen(
            'Mark told Pete lies. He lied.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n',
            NO_YES,
            1,
        ),
    ),
    (
        "wsc",
        {"text": "Ann saw Sue and left her.", "span1_text": "Ann", "span2_text": "her", "label": 0},
        chosen(
            'Ann saw Sue and left her.\nIn the previous sentence, does the pronoun "her" refer to Ann? Yes or No?\n',
            NO_YES,
            0,
        ),
    ),
    (
        "wic",
        {"word": "place", "sentence1": "Come to my place.", "sentence2": "No place for it.", "start1": 11, "label": 0},
        chosen(
            'Does the word "place" have the same meaning in these two sentences? Yes, No?\nCome to my place.\nNo place for it.\n',
            NO_YES,
            0,
        ),
    ),
    (
        "wic",
        {"word": "run", "sentence1": "I run.", "sentence2": "They run.", "label": 1},
        chosen(
            'Does the word "run" have the same meaning in these two sentences? Yes, No?\nI run.\nThey run.\n', NO_YES, 1
        ),
    ),
    (
        "multirc",
        {"paragraph": "Force moves things. ", "question": "What moves things?", "answer": "Force", "label": 1},
        chosen(
            "Force moves things. \nQuestion: What moves things?\n"
            'I found this answer "Force". Is that correct? Yes or No?\n',
            NO_YES,
            1,
        ),
    ),
    (
        "multirc",  # an answer may be empty: the official train split has three such
        {"paragraph": "P.", "question": "Q?", "answer": "", "label": 0},
        chosen('P.\nQuestion: Q?\nI found this answer "". Is that correct? Yes or No?\n', NO_YES, 0),
    ),
    (
        "copa",
        {
            "premise": "My body cast a shadow.",
            "choice1": "The sun was rising.",
            "choice2": "I cut the grass.",
            "question": "cause",
            "label": 0,
        },
        chosen("My body cast a shadow because", (" the sun was rising.", " I cut the grass."), 0),
    ),
    (
        "copa",
        {
            "premise": "He turned on the tap. ",
            "choice1": "TV broke.",
            "choice2": "Water flowed. ",
            "question": "effect",
            "label": 1,
        },
        chosen("He turned on the tap so", (" tv broke.", " water flowed."), 1),
    ),
    (
        "record",
        {
            "passage": "Ann met Bob in Rome.\n@highlight\nAnn is well\n@highlight\nBob is not",
            "query": "It was @placeholder who left, said @placeholder",
            "entities": ["Rome", "Bob", "Ann", "Bob"],
            "answers": ["Bob", "Ann", "Eve"],
        },
        chosen(
            "Ann met Bob in Rome.\n- Ann is well\n- Bob is not\n-",
            (" It was Ann who left, said Ann", " It was Bob who left, said Bob", " It was Rome who left, said Rome"),
            1,
            0,
        ),
    ),
    (
        "record",
        {"passage": "Sue sang.", "query": "@placeholder sang ", "entities": ["Sue"], "answers": ["Sue"]},
        chosen("Sue sang.\n-", (" Sue sang",), 0),
    ),
    (
        "squad",
        {
            "title": "Super_Bowl_50",
            "context": "The Panthers gave up 308 points.",
            "question": " How many points? ",
            "answers": {"text": ["308", "308 points"], "answer_start": [21, 21]},
        },
        generated(
            "Title: Super_Bowl_50\nContext: The Panthers gave up 308 points.\nQuestion: How many points?\nAnswer:",
            " 308\n",
            "308",
            "308 points",
        ),
    ),
    (
        "squad",
        {"title": "Rome", "context": "C", "question": "Q?", "answers": {"text": ["Krystyna Kobylańska."]}},
        generated("Title: Rome\nContext: C\nQuestion: Q?\nAnswer:", " Krystyna Kobylańska.\n", "Krystyna Kobylańska."),
    ),
    (
        "drop",
        {
            "passage": "They won 3-1.",
            "question": "How many goals?",
            "answers_spans": {"spans": ["4"], "types": ["number"]},
        },
        generated("Passage: They won 3-1.\nQuestion: How many goals?\nAnswer:", " 4\n", "4"),
    ),
    (
        "drop",
        {"passage": "P", "question": "Who? ", "answers_spans": {"spans": ["Ann", "Bob"]}},
        generated("Passage: P\nQuestion: Who?\nAnswer:", " Ann\n", "Ann", "Bob"),
    ),
]


@pytest.mark.parametrize(("name", "row", "example"), BY_HAND)
def test_prompts_and_candidates(name, row, example):
    assert TASKS[name].read(row) == ([example], [])


def test_every_task_is_written_out_twice():
    assert collections.Counter(name for name, _, _ in BY_HAND) == dict.fromkeys(TASKS, 2)
    assert len(TASKS) == 11


def test_what_training_teaches():
    taught = {name: example.answer for name, _, example in reversed(BY_HAND)}
    assert taught["sst2"] == " great"
    assert taught["copa"] == " the sun was rising."
    assert taught["record"] == " It was Bob who left, said Bob"  # the first of the answers
    assert taught["squad"] == " 308\n"


def test_objectives_and_metrics():
    answer = {name for name, task in TASKS.items() if task.objective == "answer"}
    assert answer == {"copa", "record", "squad", "drop"}
    assert {name for name, task in TASKS.items() if task.generates} == {"squad", "drop"}
    assert {name for name, task in TASKS.items() if task.metric == "f1"} == {"squad", "drop"}
    assert {name for name, task in TASKS.items() if task.num_dev != 500} == {"cb", "copa"}


def test_unknown_task():
    assert task_named("rte") is TASKS["rte"]
    with pytest.raises(UserError, match=r"unknown task copaa; did you mean copa\?"):
        task_named("copaa")


RECORD = {
    "source": "Daily mail",
    "passage": {
        "text": "Ann met Bob.\n@highlight\nBob left",
        "entities": [{"start": 8, "end": 10}, {"start": 0, "end": 2}, {"start": 24, "end": 26}],
    },
    "qas": [
        {"query": "@placeholder ran", "answers": [{"start": 8, "end": 10, "text": "Bob"}, {"text": "Ann"}], "idx": 0},
        {"query": "Then @placeholder sang", "answers": [{"text": "Bob"}], "idx": 1},
    ],
    "idx": 7,
}
MULTIRC = {
    "idx": 3,
    "passage": {
        "text": "P.",
        "questions": [
            {"question": "Q1?", "answers": [{"text": "a", "idx": 0, "label": 1}, {"text": "b", "idx": 1, "label": 0}]},
            {"question": "Q2?", "answers": [{"text": "c", "idx": 2, "label": 0}]},
        ],
    },
}


@pytest.mark.parametrize(
    ("name", "original", "flat"),
    [
        (
            "cb",
            {"premise": "p", "hypothesis": "h", "label": label},
            [{"premise": "p", "hypothesis": "h", "label": index}],
        )
        for index, label in enumerate(["entailment", "contradiction", "neutral"])
    ]
    + [
        (
            "rte",
            {"premise": "p", "hypothesis": "h", "label": label},
            [{"premise": "p", "hypothesis": "h", "label": index}],
        )
        for index, label in enumerate(["entailment", "not_entailment"])
    ]
    + [
        (
            "boolq",
            {"passage": "p", "question": "q", "label": label},
            [{"passage": "p", "question": "q", "label": index}],
        )
        for index, label in [(0, False), (1, True), (0, "false"), (1, "True")]
    ]
    + [
        (
            "wsc",
            {"text": "t", "target": {"span1_text": "A", "span2_text": "B", "span1_index": 0}, "label": False},
            [{"text": "t", "span1_text": "A", "span2_text": "B", "label": 0}],
        ),
        (
            "wic",
            {"word": "w", "sentence1": "a", "sentence2": "b", "label": True, "version": 1.1},
            [{"word": "w", "sentence1": "a", "sentence2": "b", "label": 1}],
        ),
        (
            "multirc",
            MULTIRC,
            [
                {"paragraph": "P.", "question": "Q1?", "answer": "a", "label": 1},
                {"paragraph": "P.", "question": "Q1?", "answer": "b", "label": 0},
                {"paragraph": "P.", "question": "Q2?", "answer": "c", "label": 0},
            ],
        ),
        (
            "record",
            RECORD,
            [
                {
                    "passage": "Ann met Bob.\n@highlight\nBob left",
                    "query": query,
                    "entities": ["Ann", "Bob"],
                    "answers": answers,
                }
                for query, answers in [("@placeholder ran", ["Ann", "Bob"]), ("Then @placeholder sang", ["Bob"])]
            ],
        ),
    ],
)
def test_original_super_glue_rows_make_the_same_examples(name, original, flat):
    task = TASKS[name]
    assert task.read(original) == ([example for row in flat for example in task.read(row)[0]], [])


# Reading


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


GOOD = {name: row for name, row, _ in reversed(BY_HAND)}


def without(name, field):
    return {key: value for key, value in GOOD[name].items() if key != field}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("rte", '{"premise": "p"', "not valid JSON: Expecting ',' delimiter"),
        ("rte", "[1, 2]", "a row must be an object with fields; it is [1, 2]"),
        ("rte", '{"premise": ' + "9" * 5000 + "}", "not usable JSON: a number of 5000 digits"),
        ("rte", '{"premise": "p", "label": 0, "label": 1}', "key label is given twice"),
        ("rte", '{"premise": ' + "[" * 5000 + "}", "nested too deeply"),
        ("rte", '{"premise": "bad \\ud83d end"}', "half a letter"),
        ("rte", without("rte", "premise"), "field premise is missing; this row has hypothesis, label"),
        ("rte", GOOD["rte"] | {"premise": "  "}, "field premise is empty"),
        ("rte", GOOD["rte"] | {"premise": 3}, "field premise must be text; it is 3"),
        ("rte", without("rte", "label"), "field label holds no label: it is missing"),
        ("rte", GOOD["rte"] | {"label": None}, "field label holds no label: it is None"),
        ("rte", GOOD["rte"] | {"label": -1}, "field label holds no label: it is -1"),
        ("rte", GOOD["rte"] | {"label": 2}, "field label must be one of 0 (entailment), 1 (not_entailment); it is 2"),
        ("rte", GOOD["rte"] | {"label": "neutral"}, "1 (not_entailment); it is 'neutral'"),
        ("cb", GOOD["cb"] | {"label": True}, "2 (neutral); it is True"),
        ("boolq", GOOD["boolq"] | {"label": 1.0}, "1 (true); it is 1.0"),
        ("wsc", {"text": "t", "target": {"span1_text": "A"}, "label": True}, "field span2_text is missing"),
        ("wsc", {"text": "t", "target": "A", "label": True}, "field target must be an object; it is 'A'"),
        ("multirc", {"passage": {"text": "P."}}, "field questions is missing; this row has text"),
        (
            "multirc",
            {"passage": {"text": "P.", "questions": ["Q?"]}},
            "field questions holds 'Q?', which is not an object",
        ),
        (
            "multirc",
            {"passage": {"text": "P.", "questions": [{"question": "Q?", "answers": [{"text": "a"}]}]}},
            "field label holds no label: it is None",
        ),
        ("copa", GOOD["copa"] | {"question": "reason"}, "field question must be effect or cause; it is 'reason'"),
        ("copa", GOOD["copa"] | {"choice2": ""}, "field choice2 is empty"),
        ("record", GOOD["record"] | {"query": "who"}, "field query has no @placeholder: 'who'"),
        ("record", GOOD["record"] | {"entities": "Ann"}, "field entities must be a list; it is 'Ann'"),
        ("record", GOOD["record"] | {"entities": ["Ann", " "]}, "field entities holds an empty text"),
        ("record", RECORD | {"passage": {"text": "t", "entities": [{"start": 0}]}}, "which has no start and end"),
        ("squad", GOOD["squad"] | {"answers": {"text": []}}, "field answers holds no answer"),
        ("squad", GOOD["squad"] | {"answers": ["308"]}, "field answers must be an object; it is ['308']"),
        ("drop", without("drop", "answers_spans"), "field answers_spans is missing"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name, row, message):
    path = write(tmp_path / "train.jsonl", [GOOD[name], "", row, GOOD[name]])
    with pytest.raises(UserError) as caught:
        read_rows(TASKS[name], tmp_path, "train")
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"premise": "\xff"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:1: not UTF-8"):
        read_rows(TASKS["rte"], tmp_path, "train")


@pytest.mark.parametrize(
    "line", [b'{"premise": "bad \\ud83d end"}', b'{"premise": "\xed\xa0\xbd"}', b"\xff\xfe{\x00}\x00"]
)
def test_halves_of_letters(tmp_path, line):
    """Which no tokenizer takes."""
    (tmp_path / "train.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"train\.jsonl:1: (not UTF-8|.* half a letter)"):
        read_rows(TASKS["rte"], tmp_path, "train")


@pytest.mark.parametrize(
    ("row", "spans"),
    [
        ({"span1_text": "The lake", "span1_index": 2, "span2_text": "it", "span2_index": 4}, ("the lake", "it")),
        ({"span1_text": "we", "span1_index": 0, "span2_text": "the lake.", "span2_index": 2}, ("We", "the lake")),
        ({"span1_text": "the\nlake", "span1_index": 2, "span2_text": "it", "span2_index": 4}, ("the lake", "it")),
        # What cannot be mended stays as it is.
        ({"span1_text": "sea and lake", "span1_index": 2, "span2_text": "The lake"}, ("sea and lake", "The lake")),
        ({"span1_text": "The lake", "span1_index": 99, "span2_text": "", "span2_index": 1}, ("The lake", "")),
        ({"span1_text": "The lake", "span1_index": -6, "span2_text": "it", "span2_index": 0}, ("The lake", "it")),
    ],
)
def test_spans_of_wsc_are_those_of_its_sentence(row, spans):
    """As in the hub's wsc.fixed, whichever spelling a folder has."""
    for original in (
        {"text": "We saw the lake it fills. It shines.", **row},
        {"text": "We saw the lake it fills. It shines.", "target": row},
    ):
        (flat,) = TASKS["wsc"].flatten(original)
        assert (flat["span1_text"], flat["span2_text"]) == spans


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl", [GOOD["rte"]])

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError) as caught:
        read_rows(TASKS["rte"], tmp_path, "train")
    assert str(caught.value) == f"{path} cannot be read: Permission denied"


def test_lines_end_at_newlines_alone(tmp_path):
    line = json.dumps(GOOD["rte"] | {"premise": "one\u2028two\x85three"}, ensure_ascii=False)
    write(tmp_path / "train.jsonl", [line, GOOD["rte"]])
    assert len(read_rows(TASKS["rte"], tmp_path, "train").examples) == 2


def test_rows_that_make_no_example_are_counted(tmp_path):
    rows = [
        GOOD["record"],
        GOOD["record"] | {"entities": []},
        GOOD["record"] | {"answers": ["Eve"]},
        GOOD["record"] | {"answers": []},
        RECORD | {"qas": [*RECORD["qas"], {"query": "@placeholder", "answers": []}, {"query": "@placeholder"}]},
    ]
    write(tmp_path / "train.jsonl", rows)
    found = read_rows(TASKS["record"], tmp_path, "train")
    assert len(found.examples) == 3
    assert found.left_out == {"without entities": 1, "without an answer among the entities": 4}
    none = [GOOD["drop"] | {"answers_spans": {"spans": spans}} for spans in ([], [""])]
    write(tmp_path / "validation.jsonl", [*none, GOOD["drop"]])
    assert read_rows(TASKS["drop"], tmp_path, "validation").left_out == {"without answers": 2}
    bare = [{"passage": {"text": "P.", "questions": q}} for q in ([], [{"question": "Q?", "answers": []}])]
    write(tmp_path / "train.jsonl", [*bare, MULTIRC])
    assert read_rows(TASKS["multirc"], tmp_path, "train").left_out == {"without a question and an answer": 2}
    write(tmp_path / "validation.jsonl", none)
    with pytest.raises(
        UserError, match=r"validation\.jsonl holds no example of drop; rows left out: 2 without answers"
    ):
        read_rows(TASKS["drop"], tmp_path, "validation")


@pytest.mark.parametrize("file", ["validation.jsonl", "val.jsonl", "dev.jsonl"])
def test_names_of_the_validation_file(tmp_path, file):
    write(tmp_path / file, [GOOD["cb"]])
    assert read_rows(TASKS["cb"], tmp_path, "validation").source == str(tmp_path / file)
    with pytest.raises(UserError, match=r"has no train\.jsonl, which the task's train split is read from"):
        read_rows(TASKS["cb"], tmp_path, "train")


def test_missing_or_empty_files(tmp_path):
    with pytest.raises(UserError, match=r"has no validation\.jsonl or val\.jsonl or dev\.jsonl"):
        read_rows(TASKS["cb"], tmp_path, "validation")
    write(tmp_path / "train.jsonl", [])
    with pytest.raises(UserError, match=r"train\.jsonl holds no example of cb"):
        read_rows(TASKS["cb"], tmp_path, "train")


def test_the_hub(tmp_path):
    """A folder stands in for a name on the hub: it is loaded the same way."""
    write(tmp_path / "train.jsonl", [GOOD["squad"], GOOD["squad"] | {"question": ""}])
    task = dataclasses.replace(TASKS["squad"], hub=(str(tmp_path), None))
    assert read_rows(task, None, "train[:1]").examples == TASKS["squad"].read(GOOD["squad"])[0]
    with pytest.raises(UserError) as caught:
        read_rows(task, None, "train")
    assert str(caught.value) == f"{tmp_path} train row 2: field question is empty; it must be text"
    with pytest.raises(UserError, match=r"cannot load .* nope from the hub: .*; or name a folder") as caught:
        read_rows(task, None, "nope")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is not on the hub"):
        read_rows(dataclasses.replace(task, hub=None), None, "train")


REAL = {
    "sst2": (6920, 872),
    "cb": (250, 56),
    "copa": (400, 100),
    "rte": (2490, 277),
    "wsc": (554, 104),
    "wic": (5428, 638),
    "multirc": (1002, 603),
    "squad": (1500, 1190),
}


def real_data(name):
    if not (REAL_TASKS / name).is_dir():
        pytest.skip(f"there is no {REAL_TASKS / name}: COLA_DS_TASKS names the folder of the tasks' data")
    return REAL_TASKS / name


@pytest.mark.beyond_ci
@pytest.mark.parametrize("name", REAL)
def test_real_data(name):
    task, folder = TASKS[name], real_data(name)
    in_train, in_validation = REAL[name]
    train, validation = read_rows(task, folder, "train"), read_rows(task, folder, "validation")
    assert (len(train.examples), len(validation.examples)) == (in_train, in_validation)
    assert train.left_out == validation.left_out == {}
    splits = sample(task, train, validation, seed=0)
    in_dev = 100 if name in ("cb", "copa") else 500
    assert len(splits.dev) == in_dev
    assert len(splits.train) == min(1000, in_train - in_dev)
    assert len(splits.test) == min(1000, in_validation)
    for example in splits.train + splits.dev + splits.test:
        assert example.prompt == example.prompt.lstrip().rstrip(" ")
        assert example.answer.rstrip(" ") == example.answer != ""


@pytest.mark.beyond_ci
def test_real_instructions(tokenizer, tmp_path):
    """Of its 1000 rows two have an empty output, the first of which is named: as a task, and as a file to train on."""
    path = real_data("alpaca") / "train.jsonl"
    task = task_from_yaml({"prompt": "{instruction}\n{input}\nAnswer: ", "answer": "{output}"}, "alpaca.yaml")
    lines = path.read_text(encoding="utf-8").splitlines()
    write(tmp_path / "train.jsonl", [row for row in map(json.loads, lines) if row["output"]])

    def load(file):
        return load_split(DataConfig(train=str(file), prompt="instruction", completion="output"), "train", tokenizer)

    with pytest.raises(UserError, match=r"alpaca/train.jsonl:244: answer is empty: '{output}' finds no text"):
        read_rows(task, path.parent, "train")
    with pytest.raises(UserError, match=r"alpaca/train.jsonl:244 has '' in column output; it must be text"):
        load(path)
    assert (len(lines), len(read_rows(task, tmp_path, "train").examples)) == (1000, 998)
    assert len(load(tmp_path / "train.jsonl")) == 998


# Sampling


def numbered(count, left_out=None):
    return Rows(
        [Example(str(n), candidates=NO_YES, correct=(0,)) for n in range(count)], left_out or {}, "set/train.jsonl"
    )


def numbers(examples):
    return [int(example.prompt) for example in examples]


def test_samples_are_those_of_a_seeded_permutation():
    splits = sample(TASKS["rte"], numbered(90), numbered(40), 3, num_train=20, num_dev=10, num_test=15)
    numpy.random.seed(3)
    train = numpy.random.permutation(90)[:30].tolist()
    numpy.random.seed(3)
    test = numpy.random.permutation(40)[:15].tolist()
    assert (numbers(splits.train), numbers(splits.dev), numbers(splits.test)) == (train[:20], train[20:], test)


def test_samples_are_the_same_on_every_machine():
    splits = sample(TASKS["rte"], numbered(5), numbered(5), 0, num_train=3, num_dev=2, num_test=3)
    assert (numbers(splits.train), numbers(splits.dev), numbers(splits.test)) == ([2, 0, 1], [3, 4], [2, 0, 1])


@pytest.mark.parametrize(
    ("name", "available", "asked", "expected"),
    [
        ("rte", 2490, {}, (1000, 500)),
        ("cb", 250, {}, (150, 100)),
        ("copa", 400, {}, (300, 100)),
        ("wsc", 554, {}, (54, 500)),
        ("cb", 250, {"num_dev": 249}, (1, 249)),
        ("cb", 250, {"num_dev": 0}, (250, 0)),
        ("wsc", 554, {"num_train": 50, "num_dev": 20}, (50, 20)),
    ],
)
def test_sizes_of_samples(name, available, asked, expected):
    splits = sample(TASKS[name], numbered(available), numbered(56), 1, **asked)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (*expected, 56)
    assert len(set(numbers(splits.train + splits.dev))) == sum(expected)
    assert splits.report() == f"train {expected[0]}, dev {expected[1]}, test 56"


def test_seeds_differ():
    one, two = (sample(TASKS["rte"], numbered(2000), numbered(2000), seed) for seed in (0, 1))
    assert numbers(one.train) != numbers(two.train)
    assert numbers(one.test) != numbers(two.test)


@pytest.mark.parametrize("asked", [{}, {"num_train": 0, "num_dev": 5}, {"num_dev": 250}])
def test_nothing_to_train_on(asked):
    with pytest.raises(UserError, match=r"set/train\.jsonl has 250 examples; .* leave none to train on"):
        sample(TASKS["rte"], numbered(250), numbered(50), 0, **asked)


def test_rows_left_out_are_reported():
    splits = sample(
        TASKS["cb"],
        numbered(200, {"without answers": 2}),
        numbered(9, {"without answers": 1, "without entities": 1}),
        0,
    )
    assert splits.report() == "train 100, dev 100, test 9; rows left out: 3 without answers, 1 without entities"


# Token ids


def make_tokenizer(template="<s> $A", merges=()):
    """One id a byte, and one a merge; `template` says where the special tokens go."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1}
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def spelled(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ").replace("Ċ", "\n")


@pytest.mark.parametrize("name", ["sst2", "cb", "copa", "record", "squad"])
def test_ids_of_prompt_and_candidates(tokenizer, name):
    (example,) = TASKS[name].read(GOOD[name])[0]
    encoded = encode(example, tokenizer)
    ends = example.candidates or (example.answer,)
    assert [spelled(tokenizer, ids) for ids in encoded.candidate_ids] == ["<s>" + example.prompt + end for end in ends]
    assert encoded.answer_lengths == [len(end) for end in ends]
    assert spelled(tokenizer, encoded.prompt_ids) == "<s>" + example.prompt
    assert not encoded.lost


def test_white_space_at_the_ends(tokenizer):
    encoded = encode(Example(" \n ab\n", candidates=(" c  ", "d\n"), correct=(0,)), tokenizer)
    assert [spelled(tokenizer, ids) for ids in encoded.candidate_ids] == ["<s>ab\n c", "<s>ab\nd\n"]
    assert encoded.answer_lengths == [2, 2]


def test_a_merge_across_the_boundary():
    tokenizer = make_tokenizer(merges=[("b", "c"), ("a", "bc")])
    encoded = encode(Example("xab", candidates=("cd", "c", "d"), correct=(0,)), tokenizer)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in encoded.candidate_ids] == [
        ["<s>", "x", "abc", "d"],
        ["<s>", "x", "abc"],
        ["<s>", "x", "a", "b", "d"],
    ]
    assert encoded.answer_lengths == [1, 1, 1]  # by lengths: 0, -1 and 1 more than the prompt's, and at least 1
    assert common_prefix(encoded) == 1


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "$A"])
def test_end_of_text_is_not_part_of_an_answer(template):
    tokenizer = make_tokenizer(template)
    encoded = encode(Example("ab", candidates=("c", "de"), correct=(1,)), tokenizer)
    begin = "<s>" if "<s>" in template else ""
    assert [spelled(tokenizer, ids) for ids in encoded.candidate_ids] == [begin + "abc", begin + "abde"]
    assert spelled(tokenizer, encoded.prompt_ids) == begin + "ab"
    assert encoded.answer_lengths == [1, 2]


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_special_tokens_of_the_text_itself(template):
    """BOS once; an EOS that a prompt or an answer holds is kept."""
    encoded = encode(Example("<s>Q a</s>", candidates=("b", "c</s>"), correct=(0,)), make_tokenizer(template))
    pieces = [spelled(make_tokenizer(template), ids) for ids in [*encoded.candidate_ids, encoded.prompt_ids]]
    assert pieces == ["<s>Q a</s>b", "<s>Q a</s>c</s>", "<s>Q a</s>"]
    assert encoded.answer_lengths == [1, 2]


@pytest.mark.parametrize("template", ["<s> $A", "$A"])
@pytest.mark.parametrize("max_length", [2, 5, 11, 12, 13, 14, 15])
def test_a_long_prompt_loses_its_beginning_but_not_bos(template, max_length):
    tokenizer = make_tokenizer(template)
    example = Example("0123456789", candidates=(" a", " bcd"), correct=(0,))
    encoded = encode(example, tokenizer, max_length)
    whole = [tokenizer(example.prompt + end).input_ids for end in example.candidates]
    lost = max(0, max(map(len, whole)) - max_length)  # the same number of each, so that they still share what is left
    for ids, kept in zip(whole, encoded.candidate_ids, strict=True):
        left = max(len(ids) - lost, 2)
        assert kept == (ids[:1] + ids[1 - left :] if "<s>" in template else ids[-left:])
        assert len(kept) <= max_length
    answers = [2, 4]
    assert encoded.answer_lengths == [
        min(n, len(kept) - 1) for n, kept in zip(answers, encoded.candidate_ids, strict=True)
    ]
    whole_prompt = "<s>" in template and max_length in (5,)
    answer = max_length == 2 or (max_length < 5 and "<s>" not in template)
    expected = ANSWER_BEGIN if answer else WHOLE_PROMPT if whole_prompt else PROMPT_BEGIN if lost else ""
    assert encoded.lost == expected


def test_room_for_new_tokens(tokenizer):
    example = generated("0123456789", " ab\n", "ab")
    assert len(encode(example, tokenizer, 20).prompt_ids) == 11
    encoded = encode(example, tokenizer, 20, reserve=14)
    assert spelled(tokenizer, encoded.prompt_ids) == "<s>56789"
    assert encoded.lost == PROMPT_BEGIN
    with pytest.raises(UserError, match="maximum length 20 has no room for a prompt beside 19 new tokens"):
        encode(example, tokenizer, 20, reserve=19)


@pytest.mark.parametrize(
    ("ids", "lengths", "expected"),
    [
        ([[1, 2, 3, 9], [1, 2, 3, 8]], [1, 1], 2),  # the last id of the prompt is needed to predict from
        ([[1, 2, 3, 4, 9], [1, 2, 3, 8]], [1, 1], 2),
        ([[1, 2, 3, 4, 9], [1, 5, 3, 4, 8]], [1, 1], 1),
        ([[1, 2, 3, 7, 8], [1, 2, 3, 7, 9]], [2, 2], 2),  # answers that begin alike stay whole
        ([[1, 2], [1, 3, 4, 5]], [1, 3], 0),
        ([[4, 2], [1, 2]], [1, 1], 0),
        ([[1, 2, 3]], [1], 1),
    ],
)
def test_common_prefix(ids, lengths, expected):
    assert common_prefix(Encoded(ids, lengths, [], "")) == expected


# Demonstrations

SHOWN = [
    Example("Q1\n", candidates=NO_YES, correct=(1,)),
    Example("Q2", candidates=(" a", " b"), correct=(0,)),
    generated("Q3", " c\n", "c"),
]


def test_demonstrations_come_first(tokenizer):
    example = Example("Q4\n", candidates=NO_YES, correct=(0,))
    prompted = with_demonstrations(example, SHOWN, tokenizer)
    assert prompted == Example("Q1\nYes\n\nQ2 a\n\nQ3 c\n\nQ4\n", candidates=NO_YES, correct=(0,))
    assert with_demonstrations(example, [], tokenizer) == example


@pytest.mark.parametrize(
    ("spare", "prompt"),
    [
        (0, "Q1\nYes\n\nQ2 a\n\nQ3 c\n\nQ4\n"),
        (-1, "Q2 a\n\nQ3 c\n\nQ4\n"),
        (-8, "Q2 a\n\nQ3 c\n\nQ4\n"),
        (-9, "Q3 c\n\nQ4\n"),
        (-20, "Q4\n"),
        (-24, "Q4\n"),  # the example itself is never dropped
    ],
)
def test_whole_demonstrations_are_dropped_from_the_front(tokenizer, spare, prompt):
    full = len("<s>") - 2 + len("Q1\nYes\n\nQ2 a\n\nQ3 c\n\nQ4\n")
    example = Example("Q4\n", candidates=NO_YES, correct=(0,))
    assert with_demonstrations(example, SHOWN, tokenizer, full + len("Yes") + spare).prompt == prompt
    example = generated("Q4\n", " some long answer\n", "some long answer")
    assert with_demonstrations(example, SHOWN, tokenizer, full + 50 + spare, reserve=50).prompt == prompt
    # One that is scored by its loss is there as a whole.
    assert with_demonstrations(example, SHOWN, tokenizer, full + len(" some long answer\n") + spare).prompt == prompt


# Scores


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("308", ["308"], 1.0),
        ("The Kobylańska Catalogue.", ["kobylańska   catalogue"], 1.0),
        (" Ann\n", ["Bob", "Ann"], 1.0),
        ("red car", ["blue bike"], 0.0),
        ("the red car", ["red"], 2 / 3),  # precision 1/2, recall 1
        ("red red car", ["red red bike"], 2 / 3),  # words are counted: 2 of 3 and 2 of 3
        ("two of five words here", ["five words", "nothing"], 4 / 7),  # precision 2/5, recall 1
        ("don't", ["dont"], 1.0),
        ("the\u2013end", ["\u2013end"], 1.0),  # a dash that is not ASCII is no punctuation, but it ends a word
        ("", ["x"], 0.0),
        ("the", ["a"], 1.0),  # as SQuAD's own script has it: nothing is left of either
        ("the", ["b"], 0.0),
    ],
)
def test_squad_f1(prediction, golds, expected):
    assert squad_f1(prediction, golds) == pytest.approx(expected)


def test_accuracy_and_score():
    example = Example("p", candidates=("a", "b", "c"), correct=(2, 0))
    assert [accuracy(index, example) for index in range(3)] == [1.0, 0.0, 1.0]  # any right entity counts
    assert score(TASKS["record"], example, 1) == 0.0
    free = generated("p", " Ann Lee\n", "Ann Lee")
    assert score(TASKS["squad"], free, "ann") == pytest.approx(2 / 3)
    assert [accuracy(text, free) for text in (" Ann Lee\n", "ann lee", "Ann Lee.", "")] == [1.0, 0.0, 0.0, 0.0]
    assert accuracy("5", generated("p", " -5\n", "-5")) == 0.0


# A user's own task

CHOICE = """
prompt: "{question}\\nIs it {a b}? "
candidates: ["yes, {noun}", "no"]
label: gold
"""


def from_text(text):
    return task_from_yaml(yaml.safe_load(text), "tasks/mine.yaml")


@pytest.mark.parametrize(("gold", "correct"), [(0, 0), (1, 1), ("no", 1), (" yes, Rome ", 0), (True, 1)])
def test_a_task_with_candidates(gold, correct):
    task = from_text(CHOICE)
    assert (task.name, task.objective, task.metric, task.generates) == ("mine", "classification", "accuracy", False)
    row = {"question": "Q {x}", "a b": 3, "noun": "Rome", "gold": gold}
    # Spaces at the prompt's end begin what follows it.
    assert task.read(row)[0] == [Example("Q {x}\nIs it 3?", candidates=(" yes, Rome", " no"), correct=(correct,))]
    assert from_text(CHOICE + "objective: answer").objective == "answer"


def test_a_task_with_an_answer():
    task = from_text('{prompt: "{instruction}\\n{input}\\n ", answer: "{output}"}')
    assert (task.objective, task.metric, task.generates) == ("answer", None, False)
    row = {"instruction": "Say hello.", "input": "", "output": "Hello, {you}."}
    assert task.read(row)[0] == [generated("Say hello.\n\n", " Hello, {you}.", "Hello, {you}.")]


def test_a_task_that_generates():
    text = '{prompt: "{{{q}}} A:", answer: " {golds}\\n", generate: true}'
    task = from_text(text)
    assert (task.metric, task.generates) == ("f1", True)
    assert task.read({"q": "Who?", "golds": ["Ann", "Bob"]})[0] == [generated("{Who?} A:", " Ann\n", "Ann", "Bob")]
    assert from_text(text[:-1] + ", metric: accuracy}").metric == "accuracy"
    # Training teaches it to end, whatever the template says.
    for answer in ("{a}", "{a} ", "{a}\\n"):
        task = from_text(f'{{prompt: "{{q}} A: ", answer: "{answer}", generate: true}}')
        assert task.read({"q": "Who?", "a": "Ann"})[0] == [generated("Who? A:", " Ann\n", "Ann")]
    with pytest.raises(
        UserError, match=r"here: answer has more than one line, and a newline ends what is generated: 'a\\nb'"
    ):
        examples_of(task, [("here", {"q": "Who?", "a": "a\nb"})], "rows")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"a b": 1, "noun": "x", "gold": 0},
            "prompt names field question, which is missing; this row has a b, noun, gold",
        ),
        (
            {"question": None, "a b": 1, "noun": "x", "gold": 0},
            "field question, which prompt names, must be text; it is None",
        ),
        ({"question": "q", "a b": 1, "noun": ["x"], "gold": 0}, "field noun, which candidates names, must be text"),
        ({"question": "q", "a b": 1, "noun": "x"}, "field gold holds no label: it is missing"),
        ({"question": "q", "a b": 1, "noun": "x", "gold": None}, "field gold holds no label: it is None"),
        ({"question": "q", "a b": 1, "noun": "x", "gold": -1}, "field gold holds no label: it is -1"),
        ({"question": "q", "a b": 1, "noun": "x", "gold": 2}, "field gold must be an index from 0 to 1 or one of"),
        ({"question": "q", "a b": 1, "noun": "x", "gold": "maybe"}, "one of ['yes, x', 'no']; it is 'maybe'"),
    ],
)
def test_bad_rows_of_a_users_task(tmp_path, row, message):
    path = write(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError) as caught:
        read_rows(from_text(CHOICE), tmp_path, "train")
    assert str(caught.value).startswith(f"{path}:1: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": " ", "a": "x"}, "prompt is empty"),
        ({"q": "x", "a": ""}, "answer is empty"),
        ({"q": "x", "a": []}, "field a holds no answer"),
        ({"q": "x", "a": [1]}, "field a holds 1, which is not text"),
    ],
)
def test_empty_texts_of_a_users_task(row, message):
    with pytest.raises(UserError, match=f"^here: {message}"):
        examples_of(from_text('{prompt: "{q}", answer: " {a}"}'), [("here", row)], "rows")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just text", "a task has keys such as prompt"),
        (CHOICE + "candidate: [a, b]", "unknown key candidate; did you mean candidates?"),
        (CHOICE + "xyz: 1", "unknown key xyz; known are prompt, candidates"),
        ('{answer: "{a}"}', "missing key prompt"),
        ('{prompt: "{a}"}', "either candidates, to choose from, or an answer"),
        (CHOICE + 'answer: "{a}"', "either candidates, to choose from, or an answer"),
        ('{prompt: "{a}", candidates: [x, y]}', "candidates and label go together"),
        ('{prompt: "{a}", answer: "{b}", label: c}', "candidates and label go together"),
        ('{prompt: "{a}", candidates: [x], label: c}', "candidates must be a list of two texts or more; it is ['x']"),
        ('{prompt: "{a}", candidates: [x, ""], label: c}', "candidates must be a list of two texts or more"),
        (CHOICE + "generate: true", "generate and metric f1 contradict candidates"),
        (CHOICE + "metric: f1", "generate and metric f1 contradict candidates"),
        (CHOICE + "generate: 1", "generate must be true or false; it is 1"),
        (CHOICE + "metric: bleu", "metric must be accuracy or f1; it is 'bleu'"),
        (CHOICE + "objective: lm", "objective must be classification or answer; it is 'lm'"),
        ('{prompt: "{a}", answer: "{b}", objective: classification}', "objective classification needs candidates"),
        ('{prompt: "{a}", answer: "{b}", metric: f1}', "metric needs generate: true"),
        ('{prompt: "{a}", answer: output}', "answer names no field of the rows, like {text}; it is 'output'"),
        ('{prompt: hello, answer: "{b}"}', "prompt names no field of the rows"),
        ('{prompt: 3, answer: "{b}"}', "prompt must be text; it is 3"),
        ('{prompt: "{a.__class__}", answer: "{b}"}', "{a.__class__} is not the plain name of a field"),
        (CHOICE.replace("yes", "{a[0]}"), "{a[0]} is not the plain name of a field"),
    ],
)
def test_a_bad_task_is_refused(text, message):
    with pytest.raises(UserError) as caught:
        from_text(text)
    assert str(caught.value).startswith("tasks/mine.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{a.__class__}",
        "{a[0]}",
        "{0}",
        "{}",
        "{a!r}",
        "{a:>10}",
        "{a:{b}}",
        "{a.b.c!s:x}",
        "{ a}",
        "{",
        "a}",
        "{a",
        "{{a}",
    ],
)
def test_templates_take_plain_names_alone(template):
    with pytest.raises(UserError, match=r"plain name of a field|is not a template"):
        fields_of(template)


def test_fields_of_a_template():
    assert fields_of("{a} {{no}} {snake_case} {a} {with space} {été-1}") == [
        "a",
        "snake_case",
        "a",
        "with space",
        "été-1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt: a\nprompt: b\n", "key prompt is given twice"),
        ('prompt: "a\ncandidates: [x, y]\n', "line 3: .*found unexpected end of stream"),
        ("prompt: 2001-99-99\n", "cannot be read as date"),
    ],
)
def test_a_task_that_is_no_yaml(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"data.task {path} is not valid YAML: ") as caught:
        find_task(str(path))
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_how_a_task_is_scored_is_part_of_what_a_run_is(tmp_path):
    """A finished run of a metric does not answer for another."""
    example = generated("p", " a\n", "a")
    digests, none = set(), collections.Counter()
    for metric, generates, objective in (("f1", True, "answer"), ("accuracy", True, "answer"), (None, False, "answer")):
        task = dataclasses.replace(TASKS["squad"], metric=metric, generates=generates, objective=objective)
        data = TaskData(
            task=task, examples=[example], encoded=[Encoded([[1, 2]], [1], [1], "")], lengths=[2], loss_tokens=[1],
            lost=none, largest_id=2,
        )  # fmt: skip
        digests.add(data.fingerprint())
    assert len(digests) == 3
