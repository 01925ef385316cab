"""The three ways a run ends early that are not a defect of this program, and how they are put."""

from __future__ import annotations

import re
import reprlib
from typing import Any

_NAMED = 6  # of those that a message is about
_LONGEST = 1000  # characters of a message
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # line ends, and what a terminal obeys


class UserError(ValueError):
    """A mistake in the config, data or model: one line that names the value, what was expected and the remedy. Exit 2."""

    def __str__(self) -> str:  # whatever a value held, or another library said of it
        return one_line(super().__str__())


class ArrivalError(UserError):
    """Processes do not find each other, so that process 0 cannot speak for all: who raises this knows of it by itself."""


class TrainingFailedError(RuntimeError):
    """Training itself went wrong, such as a loss that is not finite. Exit 3."""


class StoppedError(Exception):
    """A signal asked the run to stop, and a checkpoint was written. Exit 75: the same command goes on from there."""


def one_line(text: str, width: int = _LONGEST) -> str:
    """A text without line ends, of at most `width` characters: cut in the middle, as what helps stands at the end."""
    return cut(_UNPRINTABLE.sub(" ", cut(text, 2 * width)).strip(), width)


def cut(text: str, width: int = 200) -> str:
    """A text of at most `width` characters, such as a path: the middle goes."""
    if len(text) <= width:
        return text
    tail = (width - 5) // 2
    return f"{text[: width - 5 - tail]} ... {text[len(text) - tail :]}"


def quoted(value: Any, width: int = 80) -> str:
    """A value as Python writes it, in at most `width` characters, and with as little work, whatever it holds."""
    return cut(_Short(width).repr(value), width)


class _Short(reprlib.Repr):
    """Of what JSON and YAML hold; lists and dicts within it are written to their first few entries, and three deep."""

    def __init__(self, width: int):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, width, width

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 200:  # Python refuses to write one of more than 4300 digits
            return f"a number of about {value.bit_length() * 3 // 10} digits"
        return repr(value)

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:  # in its own order
        if level <= 0 and value:
            return "{...}"
        shown = [f"{self.repr1(k, level - 1)}: {self.repr1(value[k], level - 1)}" for k in list(value)[: self.maxdict]]
        return "{" + ", ".join([*shown, *["..."] * (len(value) > self.maxdict)]) + "}"


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    whole = len(lines) > 1 and lines[0].endswith(":")  # the first one says only that there is a reason
    return cut(" ".join(lines[: 1 + whole]), 400)


def some_of(names: list[str], between: str = ", ") -> str:
    """Names for a message: the first few, and how many there are more."""
    more = len(names) - _NAMED
    return between.join(names[:_NAMED]) + (f"{between}and {more} more" if more > 0 else "")


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and what it counts: 1 row, 1,000 rows."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def inline(text: str, most: int = 1000) -> str:
    """A text of others, such as a folder's name or a line of a log, as part of a line: no line ends in it, nothing that moves a
    terminal's cursor, and it is not endless."""
    plain = re.sub(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]+", " ", text)
    plain = plain.encode(errors="backslashreplace").decode()  # a name may be any bytes
    return plain if len(plain) <= most else f"{plain[:most]}..."
