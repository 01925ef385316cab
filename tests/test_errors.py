"""How messages are put: one short line, whatever a value holds, and at no cost."""

import time

import pytest

from cola_ds.errors import UserError, cut, first_line, one_line, quoted


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("fast", "'fast'"),
        ([8, 0], "[8, 0]"),
        ({"b": 1, "a": None}, "{'b': 1, 'a': None}"),
        (True, "True"),
        (2**31, "2147483648"),
        (10**5000, "a number of about 4983 digits"),
        ("x" * 10**7, "'xxx"),
        (nested(30), "[[[[...]"),
        ({"k": nested(30)}, "{'k': [["),
        ({"k" * 10**6: 1}, "{'kkk"),
        ("a\nb\x1b[31m", "'a\\nb\\x1b[31m'"),
    ],
    ids=lambda value: "",
)
def test_values_are_shown_short(value, shown):
    begin = time.monotonic()
    assert quoted(value).startswith(shown)
    assert len(quoted(value)) <= 80
    assert time.monotonic() - begin < 0.5


def test_a_message_is_one_short_line():
    error = UserError("begin\n\r\x1b[2J\u2028" + "x" * 10**6 + " the remedy")
    assert str(error).startswith("begin [2J xxx")
    assert str(error).endswith("xxx the remedy")
    assert len(str(error)) == 1000
    assert len(str(error).splitlines()) == 1
    assert str(UserError("as it is: ['q_prj']  matches")) == "as it is: ['q_prj']  matches"
    assert len(first_line(ValueError("x" * 5000 + "\nmore"))) == 400
    assert first_line(ValueError()) == "ValueError"
    assert cut("/a/" + "b" * 300 + "/run.yaml", 40) == "/a/bbbbbbbbbbbbbbb ... bbbbbbbb/run.yaml"
    assert one_line("") == ""
