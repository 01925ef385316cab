"""Custom tasks: those that a user writes down as YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cola_ds.data.tasks.catalog import Example, Row, Task, fields_of, list_of, nearest, strip
from cola_ds.errors import UserError, quoted

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
            build = _answer_builder(prompt, raw["answer"], generates)
            return Task(name, build=build, objective="answer", metric=metric, generates=generates)
        build = _candidate_builder(prompt, raw["candidates"], raw["label"])
        objective = raw.get("objective", "classification")
        return Task(name, build=build, objective=objective, metric="accuracy")
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
        return Example(text, candidates=filled, correct=(int(value),))

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
