"""Conversations: rows as the hub's sets have them (`messages`, ShareGPT, Alpaca, prompt and completion) become lists of messages
as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from cola_ds.config.inputs import shown, shown_names
from cola_ds.data.columns import check_text, text_of
from cola_ds.errors import UserError, quoted

Kind = Literal["messages", "conversations", "pairs", "alpaca", "text"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SYSTEM = ("system", "developer")
_SHAREGPT = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard")},
    "system": "system",
    **{name: "tool" for name in ("tool", "observation", "function_response")},
    "function_call": "assistant",
}
"""Who speaks, by ShareGPT's names."""


@dataclass(frozen=True)
class Columns:
    """The configured columns of pairs and of plain text."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str | None = None
    """None: `text`, where a row has no other kind's columns."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them: a role each, content that is text, no key without a value."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    trained: list[bool]
    """Of each message, whether it is an assistant's that may be trained."""


def kind_of_row(names: Collection[str], columns: Columns) -> Kind | None:
    """What a row with these columns is; None where they are no kind's."""
    if "messages" in names:
        return "messages"
    if _talk_column(names):
        return "conversations"
    if columns.prompt in names and columns.completion in names:
        return "pairs"
    if "instruction" in names and "output" in names:
        return "alpaca"
    return "text" if (columns.text or "text") in names else None


def is_talk(value: Any) -> bool:
    """Whether a value is a list of messages, such as a prompt or a completion may be instead of a text."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & {*value[0]})
    )


def conversation_of(
    place: str, row: dict[str, Any], columns: Columns, system: str | None, tools: list[dict[str, Any]] | None
) -> Conversation:
    """The conversation of a row, with `system` in front where it has no system message, and `tools` where it has none of its own.

    `place` names the row in errors. Raises UserError for a row of no known kind and for messages that are wrong.
    """
    kind = kind_of_row(row.keys(), columns)
    if kind is None or kind == "text":
        raise UserError(
            f"{place} has no conversation; it has {shown_names(row)}: it needs messages, conversations, "
            f"{shown(columns.prompt)} and {shown(columns.completion)}, or instruction and output"
        )
    if kind == "messages":
        messages, trained = _messages(place, "messages", row["messages"])
    elif kind == "conversations":
        column = _talk_column(row.keys())
        messages, trained = _messages(place, column, row[column])
    elif kind == "pairs":
        messages, trained = _pair(place, row, columns)
    else:
        messages, trained = _alpaca(place, row)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{place} has no message of the assistant's: there is nothing to learn from it")
    if not any(trained):
        raise UserError(
            f"{place} has no message of the assistant's to train: all of them have weight 0 or are the prompt's"
        )
    first = _first_system(
        place, row, messages, system if kind == "messages" else _own_system(place, row) or system, kind
    )
    return Conversation(
        messages=first + messages,
        tools=_tools(place, row.get("tools")) or tools,
        trained=[False] * len(first) + trained,
    )


def _talk_column(names: Collection[str]) -> str:
    return next((name for name in ("conversations", "conversation") if name in names), "")


# What stands around the messages


def _own_system(place: str, row: dict[str, Any]) -> str | None:
    value = row.get("system")
    return None if value is None else text_of(place, "system", value)


def _first_system(
    place: str, row: dict[str, Any], messages: list[dict[str, Any]], system: str | None, kind: Kind
) -> list[dict[str, Any]]:
    """The system message to put in front, if any."""
    there = [message for message in messages if message["role"] in _SYSTEM]
    own = None if kind == "messages" else row.get("system")
    if there and own and all(message.get("content") != own for message in there):
        raise UserError(f"{place} has a system message and another text in column system: leave one of them out")
    return [] if there or not system else [{"role": "system", "content": system}]


def _tools(place: str, value: Any) -> list[dict[str, Any]] | None:
    """A row's own tools, a list or JSON text of one; None where it has none."""
    if value is None or value == "" or value == []:
        return None
    found = _parsed(place, "column tools", value)
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UserError(
            f"{place} has {quoted(value)} in column tools; it must be a list of objects, or JSON text of one"
        )
    _check_texts(f"{place} column tools", found)
    return found or None


def _parsed(place: str, what: str, value: Any) -> Any:
    """A value, or what it says where it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"{place} {what} has {quoted(value)}; it must be a list, or JSON text of one") from None


def _check_texts(place: str, value: Any) -> None:
    """Raise UserError where a text within the value is none; what is nested is walked without recursion."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            if not one.isascii():
                check_text(place, one)
        elif isinstance(one, dict):
            left.extend(one)
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)


# Kinds of rows


def _pair(place: str, row: dict[str, Any], columns: Columns) -> tuple[list[dict[str, Any]], list[bool]]:
    prompt, completion = row[columns.prompt], row[columns.completion]
    if is_talk(prompt) != is_talk(completion):
        raise UserError(
            f"{place} has messages in one of the columns {shown(columns.prompt)} and {shown(columns.completion)} alone: "
            "both must be texts, or both lists of messages"
        )
    if not is_talk(prompt):
        return _exchange(text_of(place, columns.prompt, prompt), text_of(place, columns.completion, completion))
    before, _ = _messages(place, columns.prompt, prompt)
    after, trained = _messages(place, columns.completion, completion)
    return before + after, [False] * len(before) + trained


def _alpaca(place: str, row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[bool]]:
    if row.get("history"):
        raise UserError(
            f"{place} has {quoted(row['history'])} in column history, which is not read: write messages instead"
        )
    question = text_of(place, "instruction", row["instruction"])
    if row.get("input") is not None and (more := text_of(place, "input", row["input"])):
        question = f"{question}\n\n{more}"
    return _exchange(question, text_of(place, "output", row["output"]))


def _exchange(question: str, answer: str) -> tuple[list[dict[str, Any]], list[bool]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], [False, True]


def _messages(place: str, column: str, value: Any) -> tuple[list[dict[str, Any]], list[bool]]:
    """The messages of a column, and which of them are trained."""
    found = _parsed(place, f"column {shown(column)}", value)
    if not isinstance(found, list) or not found:
        raise UserError(f"{place} has {quoted(value)} in column {shown(column)}; it must be a list of messages")
    messages, trained = [], []
    for number, each in enumerate(found, 1):
        where = f"{place} {'' if column in ('messages', 'conversations') else shown(column) + ' '}message {number}"
        if not isinstance(each, dict):
            raise UserError(f"{where} is {quoted(each)}; it must be an object with role and content")
        given = {key: value for key, value in each.items() if value is not None}
        weight = given.pop("weight", 1)
        if weight not in (0, 1):
            raise UserError(f"{where} has weight {quoted(weight)}; it must be 0 (not trained) or 1")
        message = _message(where, given) if "role" in given or "from" not in given else _sharegpt(where, given)
        messages.append(message)
        trained.append(message["role"] == "assistant" and weight == 1)
    return messages, trained


# One message


def _sharegpt(where: str, given: dict[str, Any]) -> dict[str, Any]:
    """A message of {from, value}."""
    speaker = given.pop("from")
    role = _SHAREGPT.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{where} is from {quoted(speaker)}; it must be from one of {', '.join(_SHAREGPT)}")
    value = given.pop("value", None)
    if speaker.lower() != "function_call":
        return _message(where, {"role": role, **({} if value is None else {"content": value}), **given})
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    return _message(
        where, {"role": role, "tool_calls": [calls] if isinstance(calls, dict) else calls or value, **given}
    )


def _message(where: str, given: dict[str, Any]) -> dict[str, Any]:
    """A message of {role, content ...} as templates take it."""
    if "role" not in given:
        raise UserError(
            f"{where} has no role; it has {shown_names(map(str, given))}: it needs one of {', '.join(ROLES)}"
        )
    role = given["role"]
    if role not in ROLES:
        raise UserError(f"{where} has role {quoted(role)}; it must be one of {', '.join(ROLES)}")
    if "function_call" in given:
        raise UserError(f"{where} has function_call, which chat templates do not take: write tool_calls instead")
    message = dict(given)
    if "tool_calls" in message:
        calls = _parsed(where, "tool_calls", message.pop("tool_calls"))
        if calls:
            message["tool_calls"] = _tool_calls(where, calls)
    if "content" in message:
        message["content"] = _content(where, message["content"])
    elif "tool_calls" not in message:
        raise UserError(f"{where} has no content; it must have a text, or tool_calls")
    for key, value in message.items():
        if key != "content":
            _check_texts(where, value)
    return message


def _content(where: str, value: Any) -> str:
    """The text of a message; parts of text are joined."""
    if isinstance(value, list):
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                what = f"a part of type {quoted(kind)}" if kind not in (None, "text") else quoted(part)
                raise UserError(f"{where} has {what} in its content; only text is trained: leave such rows out")
        value = "".join(part["text"] for part in value)
    elif isinstance(value, bytes):
        value = text_of(where, "content", value)
    if not isinstance(value, str):
        raise UserError(f"{where} has content {quoted(value)}; it must be text, or a list of parts of text")
    if not value.isascii():
        check_text(where, value)
    return value


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls with arguments that are an object where they were JSON text of one."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where} has tool_calls {quoted(calls)}; they must be a list of objects")
    made = []
    for given in calls:
        call = {key: value for key, value in given.items() if value is not None}
        if isinstance(call.get("function"), dict):
            call["function"] = _function(where, call["function"])
        else:  # {name, arguments} as it is, as in ShareGPT's
            call = {"type": "function", "function": _function(where, call)}
        made.append(call)
    return made


def _function(where: str, given: dict[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in given.items() if value is not None}
    if not isinstance(function.get("name"), str):
        raise UserError(f"{where} has a tool call {quoted(given)} without a name; it must have name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            read = None
        if isinstance(read, dict):
            function["arguments"] = read
    return function
