"""Examples of a task: read, sampled, turned into token ids, and scored. Also tasks that a user writes down as YAML."""

from __future__ import annotations

import bisect
import collections
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from cola_ds.data.files import check_text, json_rows
from cola_ds.data.hub import load_hub
from cola_ds.data.task_table import Example, Row, Task, fields_of, list_of, nearest, strip
from cola_ds.data.tokens import ANSWER_BEGIN, PROMPT_BEGIN, WHOLE_PROMPT, ids_of, keep_end
from cola_ds.errors import UserError, quoted

# Reading

_FILES = {"validation": ("validation.jsonl", "val.jsonl", "dev.jsonl")}


@dataclass(frozen=True)
class Rows:
    """The examples of a split."""

    examples: list[Example]
    left_out: dict[str, int]
    """How many rows made no example, by reason: "without answers", for one."""
    source: str
    """Where they were read: a file, or a set on the hub and its split."""


def read_rows(task: Task, folder: str | Path | None, split: str, revision: str | None = None) -> Rows:
    """Every example of `split`, train or validation, from a .jsonl file of the folder, or of its folder of the task's name; from
    the hub where `folder` is None.

    Raises UserError for a set that cannot be loaded, for a split without an example, and, with file and line, for a bad row.
    """
    if folder is None:
        source, rows = _hub_rows(task, split, revision)
    else:
        own = Path(folder, task.name)
        source, rows = _file_rows(own if own.is_dir() else Path(folder), split)
    return examples_of(task, rows, source)


def examples_of(task: Task, rows: Iterable[tuple[str, Row]], source: str) -> Rows:
    """The examples of rows, each of which comes with the place to name in an error.

    Raises UserError for a bad row, and where no row makes an example.
    """
    examples: list[Example] = []
    left_out: collections.Counter[str] = collections.Counter()
    for place, row in rows:
        try:
            found, reasons = task.read(row)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        examples += found
        left_out.update(reasons)
    if not examples:
        raise UserError(f"{source} holds no example of {task.name}{_reasons(left_out)}")
    return Rows(examples, dict(left_out), source)


def _reasons(left_out: dict[str, int]) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    return f"; rows left out: {counts}" if counts else ""


def _file_rows(folder: Path, split: str) -> tuple[str, Iterator[tuple[str, Row]]]:
    names = _FILES.get(split, (f"{split}.jsonl",))
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has no {' or '.join(names)}, which the task's {split} split is read from")
    return str(found[0]), _of_text(json_rows(found[0]))


def _of_text(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """The rows; any of their texts may be read."""
    for place, row in rows:
        try:
            check_text(place, json.dumps(row, ensure_ascii=False))
        except RecursionError:  # Python may write a little less deep than it reads
            raise UserError(f"{place}: nested too deeply to be read as a row") from None
        yield place, row


def _hub_rows(task: Task, split: str, revision: str | None) -> tuple[str, Iterator[tuple[str, Row]]]:
    if task.hub is None:
        raise UserError(f"task {task.name} is not on the hub: name the folder of its train.jsonl and validation.jsonl")
    path, config = task.hub
    source = f"{path} {config or ''}".rstrip() + f" {split}"
    try:
        rows = load_hub(path, config, split, revision)
    except UserError as error:
        raise UserError(
            f"cannot load {source} from the hub: {error}; or name a folder with train.jsonl and validation.jsonl"
        ) from None
    return source, ((f"{source} row {number}", row) for number, row in enumerate(rows, 1))


# Sampling


@dataclass(frozen=True)
class Splits:
    """The examples of one run."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    left_out: dict[str, int]
    """Rows of both splits that made no example, by reason."""

    def report(self) -> str:
        """The sizes that are used, in one line."""
        sizes = f"train {len(self.train)}, dev {len(self.dev)}, test {len(self.test)}"
        return sizes + _reasons(self.left_out)


def sample(
    task: Task,
    train: Rows,
    validation: Rows,
    seed: int,
    num_train: int = 1000,
    num_dev: int | None = None,
    num_test: int = 1000,
) -> Splits:
    """Draw the examples of a run as MeZO does.

    A permutation of the train split gives num_train + num_dev examples, the last of which are dev; where there are fewer, dev
    keeps its size (None: the task's own) and train gets the rest. test is drawn from validation with the same seed.
    Raises UserError where nothing is left to train on.
    """
    num_dev = task.num_dev if num_dev is None else num_dev
    drawn = _draw(train.examples, seed, num_train + num_dev)
    cut = len(drawn) - num_dev
    if cut < 1:
        raise UserError(
            f"{train.source} has {len(train.examples)} examples; {num_train} for train and {num_dev} for dev leave none to "
            f"train on: ask for fewer than {len(train.examples)} for dev and at least one for train"
        )
    left_out = collections.Counter(train.left_out) + collections.Counter(validation.left_out)
    return Splits(drawn[:cut], drawn[cut:], _draw(validation.examples, seed, num_test), dict(left_out))


def _draw(examples: list[Example], seed: int, count: int) -> list[Example]:
    # numpy promises that this legacy generator never changes, and it is MeZO's: the same rows in the same order.
    return [examples[index] for index in numpy.random.RandomState(seed).permutation(len(examples))[:count]]


# Token ids


@dataclass(frozen=True)
class Encoded:
    """An example as token ids."""

    candidate_ids: list[list[int]]
    """The prompt with each candidate; without candidates, the prompt with the answer alone."""
    answer_lengths: list[int]
    """How many ids at the end of each belong to the answer; at least 1."""
    prompt_ids: list[int]
    """The prompt alone, with room for an answer to be generated."""
    lost: str
    """What the maximum length took from them, as in tokens.py; empty where nothing is lost."""


def encode(example: Example, tokenizer: Any, max_length: int = 2048, reserve: int = 0) -> Encoded:
    """Token ids of at most `max_length`, and of the prompt alone of at most `max_length - reserve`.

    Too long a text loses its beginning, but not the BOS id. Special tokens are the tokenizer's, and BOS is there once; but no EOS
    is added at the end.
    """
    if max_length - reserve < 2:
        raise UserError(f"maximum length {max_length} has no room for a prompt beside {reserve} new tokens")
    bos = tokenizer.bos_token_id
    prompt, *whole = ids_of(_texts(example), tokenizer)
    # The same number of ids from all: what remains of the prompt they still share, and it is computed once.
    excess = max(0, max(map(len, whole)) - max_length)
    kept = [keep_end(ids, max(len(ids) - excess, min(len(ids), 2)), bos) for ids in whole]
    kept_prompt = keep_end(prompt, max_length - reserve, bos)
    # By the difference of lengths: a tokenizer may merge the prompt's end with the answer's beginning.
    lengths = [max(1, min(len(w) - len(prompt), len(k) - 1)) for w, k in zip(whole, kept, strict=True)]
    lost = PROMPT_BEGIN if kept_prompt != prompt else ""
    if excess:
        shown = [ids[: len(ids) - count] for ids, count in zip(kept, lengths, strict=True)]
        if any(count < len(ids) - len(prompt) for ids, count in zip(whole, lengths, strict=True)):
            lost = ANSWER_BEGIN
        else:
            lost = WHOLE_PROMPT if [bos] in shown else PROMPT_BEGIN
    return Encoded(kept, lengths, kept_prompt, lost)


def _texts(example: Example) -> list[str]:
    """The prompt, and the prompt with each candidate or with the answer."""
    return [strip(example.prompt + end) for end in ("", *(example.candidates or (example.answer,)))]


def common_prefix(encoded: Encoded) -> int:
    """How many leading ids can be computed once for all candidates.

    They are the same in all, and each candidate keeps its answer and the id before it, from which the answer is predicted.
    """
    own = min(len(ids) - n - 1 for ids, n in zip(encoded.candidate_ids, encoded.answer_lengths, strict=True))
    columns = zip(*encoded.candidate_ids, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return max(0, min(own, shared))


def with_demonstrations(
    example: Example, demonstrations: Sequence[Example], tokenizer: Any, max_length: int = 2048, reserve: int = 0
) -> Example:
    """The example with solved ones in front of its prompt: the last of `demonstrations` that fit, whole.

    What must fit is the prompt with each candidate or with the answer or, where that is generated, the prompt and `reserve` new
    tokens.
    """
    shown = [(each.prompt + each.answer).strip() for each in demonstrations]

    def after(first: int) -> Example:
        return replace(example, prompt="\n\n".join([*shown[first:], example.prompt]))

    def fits(first: int) -> bool:
        prompt, *whole = _texts(after(first))
        return max(map(len, ids_of([prompt] if reserve else whole, tokenizer))) + reserve <= max_length

    return after(bisect.bisect_left(range(len(shown)), True, key=fits))


# Scores


def squad_f1(prediction: str, golds: Sequence[str]) -> float:
    """SQuAD's F1 of the words that a prediction shares with a right answer, without case, punctuation and articles; the best over
    the answers; between 0 and 1."""
    from torchmetrics.functional.text import squad  # two seconds to import

    found = squad(
        [{"id": "", "prediction_text": prediction}],
        [{"id": "", "answers": {"text": list(golds), "answer_start": [0] * len(golds)}}],
    )
    return found["f1"].item() / 100


def accuracy(prediction: int | str, example: Example) -> float:
    """1 if the candidate of that index is right or, for a generated text, if it is a right answer to the letter, but for white
    space around it; else 0."""
    if isinstance(prediction, int):
        return float(prediction in example.correct)
    return float(prediction.strip() in [answer.strip() for answer in example.answers])


def score(task: Task, example: Example, prediction: int | str) -> float:
    """The task's metric of one example, between 0 and 1; `prediction` is a candidate's index or a generated text."""
    if task.metric == "f1" and isinstance(prediction, str):
        return squad_f1(prediction, example.answers)
    return accuracy(prediction, example)


# A user's own task

_KEYS = ("prompt", "candidates", "label", "answer", "objective", "metric", "generate")


def task_from_yaml(raw: Any, source: str) -> Task:
    """A task from its YAML: `raw` is the parsed text, `source` what to call it in errors; its name is the file's.

    prompt: a template with {field} names. Then either candidates (a list of continuations, which may be templates) and label
    (the field that holds the right one's index or text), or answer (a template of the continuation; where its one field holds
    a list of texts, all are right and the first is taught). generate: true scores generated answers, which a newline ends, by
    metric: f1 as in SQuAD, or accuracy (the same text).
    objective: classification or answer, as in Task; with candidates classification is the default.
    Raises UserError, in one line that names `source`, for unknown keys, wrong types, contradictions and unsafe templates.
    """
    try:
        _check(raw)
        name, prompt = Path(source).stem, raw["prompt"]
        if "candidates" not in raw:
            generates = raw.get("generate", False)
            metric = raw.get("metric", "f1") if generates else None
            return Task(name, _answer_builder(prompt, raw["answer"], generates), "answer", metric, generates)
        build = _candidate_builder(prompt, raw["candidates"], raw["label"])
        return Task(name, build, raw.get("objective", "classification"), "accuracy")
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _check(raw: Any) -> None:
    if not isinstance(raw, dict):
        raise UserError("a task has keys such as prompt, candidates and label")
    for key, value in raw.items():
        if key not in _KEYS:
            raise UserError(f"unknown key {key}; {nearest(str(key), list(_KEYS))}")
        _check_value(key, value)
    if "prompt" not in raw:
        raise UserError("missing key prompt")
    if ("candidates" in raw) == ("answer" in raw):
        raise UserError("a task has either candidates, to choose from, or an answer")
    if ("candidates" in raw) != ("label" in raw):
        raise UserError("candidates and label go together: label names the field that tells the right candidate")
    if "candidates" in raw and (raw.get("generate") or raw.get("metric") == "f1"):
        raise UserError("generate and metric f1 contradict candidates: a choice is scored by accuracy")
    if "answer" in raw and raw.get("objective") == "classification":
        raise UserError("objective classification needs candidates")
    if "answer" in raw and "metric" in raw and not raw.get("generate"):
        raise UserError("metric needs generate: true; without it the held-out loss is the only score")
    for key in ("prompt", "answer"):
        if key in raw and not fields_of(raw[key]):
            raise UserError(f"{key} names no field of the rows, like {{text}}; it is {quoted(raw[key])}")


def _check_value(key: str, value: Any) -> None:
    if key == "generate":
        good, wanted = isinstance(value, bool), "true or false"
    elif key == "objective":
        good, wanted = value in ("classification", "answer"), "classification or answer"
    elif key == "metric":
        good, wanted = value in ("accuracy", "f1"), "accuracy or f1"
    elif key == "candidates":
        good = isinstance(value, list) and len(value) > 1 and all(isinstance(c, str) and c.strip() for c in value)
        wanted = "a list of two texts or more"
    else:
        good, wanted = isinstance(value, str) and bool(value.strip()), "text"
    if not good:
        raise UserError(f"{key} must be {wanted}; it is {quoted(value)}")
    if key in ("prompt", "answer", "candidates"):
        for template in value if isinstance(value, list) else [value]:
            fields_of(template)


def _fill(what: str, template: str, row: Row) -> str:
    """A template with the fields of a row, which may be text or numbers and may be empty; the whole may not."""
    texts = {}
    for name in fields_of(template):
        if name not in row:
            raise UserError(f"{what} names field {name}, which is missing; this row has {', '.join(row) or 'none'}")
        if not isinstance(row[name], str | int | float):
            raise UserError(f"field {name}, which {what} names, must be text; it is {quoted(row[name])}")
        texts[name] = str(row[name])
    text = template.format_map(texts)
    if not text.strip():
        raise UserError(f"{what} is empty: {quoted(template)} finds no text")
    return text


def _fill_prompt(template: str, row: Row) -> tuple[str, str]:
    """The prompt, and the spaces at its end: they begin what follows it."""
    text = _fill("prompt", template, row)
    return strip(text), text[len(text.rstrip(" ")) :]


def _candidate_builder(prompt: str, candidates: list[str], label: str) -> Callable[[Row], Example]:
    def build(row: Row) -> Example:
        text, space = _fill_prompt(prompt, row)
        filled = tuple(space + _fill("candidates", candidate, row).rstrip(" ") for candidate in candidates)
        value = row.get(label)
        if value is None or value == -1:
            what = "it is missing" if label not in row else f"it is {value}"
            raise UserError(f"field {label} holds no label: {what}")
        bare = [candidate.strip() for candidate in filled]
        if isinstance(value, str) and value.strip() in bare:
            value = bare.index(value.strip())
        if not isinstance(value, int) or not 0 <= value < len(filled):
            raise UserError(
                f"field {label} must be an index from 0 to {len(filled) - 1} or one of {bare}; it is {quoted(value)}"
            )
        return Example(text, filled, (int(value),))

    return build


def _answer_builder(prompt: str, answer: str, generates: bool) -> Callable[[Row], Example]:
    fields = fields_of(answer)

    def build(row: Row) -> Example:
        rows = [row]
        if len(set(fields)) == 1 and isinstance(row.get(fields[0]), list):
            rows = [{**row, fields[0]: text} for text in list_of(row, fields[0], str)]
        if not rows:
            raise UserError(f"field {fields[0]} holds no answer")
        text, space = _fill_prompt(prompt, row)
        filled = [_fill("answer", answer, each) for each in rows]
        answers = tuple(each.strip() for each in filled)
        if generates and "\n" in answers[0]:
            raise UserError(
                f"answer has more than one line, and a newline ends what is generated: {quoted(answers[0])}"
            )
        completion = space + (filled[0].rstrip() + "\n" if generates else filled[0])  # or it would not learn to end
        return Example(text, answers=answers, completion=completion)

    return build
