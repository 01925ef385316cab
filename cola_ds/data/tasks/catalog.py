"""Catalogue of tasks: how a row becomes a prompt and its possible answers. Eleven of them.

Prompts and answers are MeZO's (arXiv 2305.17333), which COLA (arXiv 2401.04151) takes over. Rows have the fields of the Hugging
Face sets, or those of the original SuperGLUE files, whose rows may hold several examples. This file needs neither torch nor
datasets. Reading (files.py), sampling (sampling.py) and encoding (encoding.py) follow; tasks that a user writes down are in
custom.py.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from cola_ds.errors import UserError, quoted

Row = dict[str, Any]


class UnusableRowError(Exception):
    """A row such as sound sets hold too, but that makes no example: it is left out and counted, by this text."""


@dataclass(frozen=True)
class Example:
    """A prompt and what may follow it. Texts are exact: the prompt followed by a candidate is what the model reads."""

    prompt: str
    _: KW_ONLY
    candidates: tuple[str, ...] = ()
    """Continuations to choose from, with the leading space where there is one; empty where the answer is free text."""
    correct: tuple[int, ...] = ()
    """Indices of the right candidates; the first is the one that training teaches."""
    answers: tuple[str, ...] = ()
    """Right answers as bare texts, to score a generated one by."""
    completion: str = ""
    """Without candidates: the continuation that training teaches."""

    @property
    def answer(self) -> str:
        """The continuation that training teaches."""
        return self.candidates[self.correct[0]] if self.candidates else self.completion


def _as_it_is(row: Row) -> list[Row]:
    return [row]


@dataclass(frozen=True)
class Task:
    """What a task's rows mean, and how it is trained and scored."""

    name: str
    _: KW_ONLY
    build: Callable[[Row], Example]
    """The example of a flat row. Raises UserError for a bad row, UnusableRowError for one to leave out."""
    objective: Literal["classification", "answer"]
    """classification: cross-entropy over the candidates' mean log-probabilities. answer: language-model loss on the answer."""
    metric: Literal["accuracy", "f1"] | None
    """None: the held-out loss is the only score."""
    generates: bool = False
    """The answer is generated, not chosen."""
    hub: tuple[str, str | None] | None = None
    """Its name on the Hugging Face hub, and its configuration there."""
    num_dev: int = 500
    """Dev examples, unless told otherwise."""
    flatten: Callable[[Row], list[Row]] = _as_it_is
    """A row as flat rows with the Hugging Face field names."""

    def read(self, row: Row) -> tuple[list[Example], list[str]]:
        """The examples of a row, and for each one that is left out the reason. Raises UserError for a bad row."""
        examples, left_out, rows = [], [], self.flatten(row)
        if not rows:
            left_out.append("without a question and an answer")
        for flat in rows:
            try:
                examples.append(self.build(flat))
            except UnusableRowError as reason:
                left_out.append(str(reason))
        return examples, left_out


def strip(text: str) -> str:
    """Text as it is tokenized: no white space in front, no spaces at the end; a newline at the end stays."""
    return text.lstrip().rstrip(" ")


# Fields of a row


def _field(row: Row, name: str, kind: type) -> Any:
    if name not in row:
        raise UserError(f"field {name} is missing; this row has {', '.join(row) or 'none'}")
    if not isinstance(row[name], kind):
        wanted = "text" if kind is str else "a list" if kind is list else "an object"
        raise UserError(f"field {name} must be {wanted}; it is {quoted(row[name])}")
    return row[name]


def _text(row: Row, name: str) -> str:
    text: str = _field(row, name, str)
    if not text.strip():
        raise UserError(f"field {name} is empty; it must be text")
    return text


def list_of(row: Row, name: str, kind: type) -> list[Any]:
    """A field that is a list of texts or of objects."""
    for item in _field(row, name, list):
        if not isinstance(item, kind):
            raise UserError(f"field {name} holds {quoted(item)}, which is not {'text' if kind is str else 'an object'}")
    return list(row[name])


def _label(row: Row, names: Sequence[str]) -> int:
    """The label as an index, from an integer, a name, or (where the names are false and true) a boolean."""
    value = row.get("label")
    if value is None or value == -1:
        what = "it is missing" if "label" not in row else f"it is {value}"
        raise UserError(f"field label holds no label: {what}; use a split whose labels are published")
    if isinstance(value, str) and value.lower() in names:
        return names.index(value.lower())
    if isinstance(value, bool) and tuple(names) == _YES_NO:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
        known = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
        raise UserError(f"field label must be one of {known}; it is {quoted(value)}")
    return value


# Templates


def fields_of(template: str) -> list[str]:
    """The names of a template's {fields}.

    After this check `template.format_map` reaches nothing but those fields: names with attributes, indices, formats or
    conversions, and positions, raise UserError, as do single braces.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{quoted(template)} is not a template: {error}; braces themselves are written {{{{ and }}}}"
        ) from None
    names = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in names:
        if spec or conversion or not re.fullmatch(r"[^\W\d][\w -]*", name):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(
                f"{{{shown}}} is not the plain name of a field, like {{premise}}; braces themselves are written {{{{ and }}}}"
            )
    return [name for name, _, _ in names]


# The eleven tasks
_YES_NO = ("false", "true")
_SUPER_GLUE = "aps/super_glue"


def _choice(
    template: str,
    candidates: tuple[str, ...],
    labels: Sequence[str],
    may_be_empty: Sequence[str],
    prepare: dict[str, Callable[[str], str]],
) -> Callable[[Row], Example]:
    """Tasks whose candidates are fixed. `labels` are the names of label 0, 1, ...; `prepare` changes a field's text."""
    fields = fields_of(template)

    def build(row: Row) -> Example:
        texts = {name: _field(row, name, str) if name in may_be_empty else _text(row, name) for name in fields}
        texts |= {name: change(texts[name]) for name, change in prepare.items()}
        return Example(strip(template.format_map(texts)), candidates=candidates, correct=(_label(row, labels),))

    return build


def _as_question(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else "?")


def _copa(row: Row) -> Example:
    premise = _text(row, "premise").rstrip()
    relation = _text(row, "question")
    if relation not in ("effect", "cause"):
        raise UserError(f"field question must be effect or cause; it is {quoted(relation)}")
    conjunction = "so" if relation == "effect" else "because"
    candidates = []
    for name in ("choice1", "choice2"):
        first, *rest = _text(row, name).split(" ")
        candidates.append(" " + " ".join([first if first == "I" else first.lower(), *rest]).rstrip(" "))
    prompt = strip(f"{premise.removesuffix('.')} {conjunction}")
    return Example(prompt, candidates=tuple(candidates), correct=(_label(row, ("choice1", "choice2")),))


def _record(row: Row) -> Example:
    passage = _text(row, "passage").replace("@highlight\n", "- ")
    query = _text(row, "query")
    if "@placeholder" not in query:
        raise UserError(f"field query has no @placeholder: {quoted(query)}")
    # Sorted, as their order differs between releases of the set.
    entities, answers = sorted(set(list_of(row, "entities", str))), list_of(row, "answers", str)
    if not all(entity.strip() for entity in entities):
        raise UserError("field entities holds an empty text")
    if not entities:
        raise UnusableRowError("without entities")
    correct = tuple(entities.index(answer) for answer in dict.fromkeys(answers) if answer in entities)
    if not correct:
        raise UnusableRowError("without an answer among the entities")
    candidates = tuple(" " + query.replace("@placeholder", entity).rstrip(" ") for entity in entities)
    return Example(strip(f"{passage}\n-"), candidates=candidates, correct=correct)


def _squad(row: Row) -> Example:
    title, context, question = (_text(row, name) for name in ("title", "context", "question"))
    answers = list_of(_field(row, "answers", dict), "text", str)
    if not answers or not answers[0].strip():
        raise UserError("field answers holds no answer; use a split whose answers are published")
    prompt = strip(f"Title: {title}\nContext: {context}\nQuestion: {question.strip()}\nAnswer:")
    return Example(prompt, answers=tuple(answers), completion=f" {answers[0]}\n")


def _drop(row: Row) -> Example:
    passage, question = _text(row, "passage"), _text(row, "question")
    spans = [span for span in list_of(_field(row, "answers_spans", dict), "spans", str) if span.strip()]
    if not spans:
        raise UnusableRowError("without answers")
    prompt = strip(f"Passage: {passage}\nQuestion: {question.strip()}\nAnswer:")
    return Example(prompt, answers=tuple(spans), completion=f" {spans[0]}\n")


def _flat_wsc(row: Row) -> list[Row]:
    flat = {**row, **_field(row, "target", dict)} if "target" in row else row
    return [
        {
            **flat,
            **{f"{span}_text": _as_in_the_text(flat, span) for span in ("span1", "span2") if f"{span}_text" in flat},
        }
    ]


def _as_in_the_text(row: Row, span: str) -> Any:
    """A span as the sentence has it. Original rows differ from it in the first letter's case, a full stop or a line's end, and
    the hub's wsc.fixed, which MeZO reads, has that mended."""
    found, text, index = row[f"{span}_text"], row.get("text"), row.get(f"{span}_index")
    if not (isinstance(found, str) and isinstance(text, str) and isinstance(index, int)) or found in text:
        return found
    words = text.split()
    if not (found and 0 <= index < len(words)):
        return found
    first = found[0].lower() if words[index][0].islower() else found[0].upper()
    mended = (first + found[1:]).rstrip(".").replace("\n", " ")
    return mended if mended in text else found


def _flat_multirc(row: Row) -> list[Row]:
    if "passage" not in row:
        return [row]
    passage = _field(row, "passage", dict)
    return [
        {
            "paragraph": passage.get("text"),
            "question": question.get("question"),
            "answer": answer.get("text"),
            "label": answer.get("label"),
        }
        for question in list_of(passage, "questions", dict)
        for answer in list_of(question, "answers", dict)
    ]


def _flat_record(row: Row) -> list[Row]:
    if "qas" not in row:
        return [row]
    passage = _field(row, "passage", dict)
    text = _text(passage, "text")
    # Ends are inclusive.
    entities = [text[entity["start"] : entity["end"] + 1] for entity in _spans(passage)]
    return [
        {
            "passage": text,
            "query": qa.get("query"),
            "entities": entities,
            # The Hugging Face set has them unique and sorted, and the first is what training teaches.
            "answers": sorted({_text(answer, "text") for answer in list_of({"answers": [], **qa}, "answers", dict)}),
        }
        for qa in list_of(row, "qas", dict)
    ]


def _spans(passage: Row) -> list[Row]:
    spans = list_of(passage, "entities", dict)
    for span in spans:
        if not all(isinstance(span.get(end), int) for end in ("start", "end")):
            raise UserError(f"field entities holds {quoted(span)}, which has no start and end")
    return spans


def _classify(
    name: str,
    template: str,
    candidates: tuple[str, ...],
    labels: Sequence[str] = _YES_NO,
    num_dev: int = 500,
    flatten: Callable[[Row], list[Row]] = _as_it_is,
    hub: tuple[str, str] | None = None,
    may_be_empty: Sequence[str] = (),
    **prepare: Callable[[str], str],
) -> Task:
    build = _choice(template, candidates, labels, may_be_empty, prepare)
    return Task(
        name,
        build=build,
        objective="classification",
        metric="accuracy",
        hub=hub or (_SUPER_GLUE, name),
        num_dev=num_dev,
        flatten=flatten,
    )


_ALL = (
    _classify(
        "sst2",
        "{sentence} It was",
        (" terrible", " great"),
        ("negative", "positive"),
        hub=("nyu-mll/glue", "sst2"),
        sentence=str.strip,
    ),
    _classify(
        "cb",
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        ("entailment", "contradiction", "neutral"),
        num_dev=100,
    ),
    _classify(
        "rte",
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        ("Yes", "No"),
        ("entailment", "not_entailment"),
    ),
    _classify("boolq", "{passage} {question}\n", ("No", "Yes"), question=_as_question),
    _classify(
        "wsc",
        '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
        ("No", "Yes"),
        flatten=_flat_wsc,
        hub=(_SUPER_GLUE, "wsc.fixed"),
        span2_text=str.lower,
    ),
    _classify(
        "wic",
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        ("No", "Yes"),
    ),
    _classify(
        "multirc",
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        flatten=_flat_multirc,
        may_be_empty=("answer",),  # three answers of the official train split are
    ),
    Task("copa", build=_copa, objective="answer", metric="accuracy", hub=(_SUPER_GLUE, "copa"), num_dev=100),
    Task(
        "record",
        build=_record,
        objective="answer",
        metric="accuracy",
        hub=(_SUPER_GLUE, "record"),
        flatten=_flat_record,
    ),
    Task("squad", build=_squad, objective="answer", metric="f1", generates=True, hub=("rajpurkar/squad", None)),
    Task("drop", build=_drop, objective="answer", metric="f1", generates=True, hub=("ucinlp/drop", None)),
)
TASKS = {task.name: task for task in _ALL}


def task_named(name: str) -> Task:
    """One of the eleven. Raises UserError for any other name."""
    if name not in TASKS:
        raise UserError(f"unknown task {name}; {nearest(name, list(TASKS))}")
    return TASKS[name]


def nearest(name: str, known: list[str]) -> str:
    """What to say after a name that is not known."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else f"known are {', '.join(known)}"
