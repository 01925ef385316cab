"""Rows as the hub's sets have them become messages; what is wrong in them is named by row and message."""

import json

import pyarrow
import pytest

from cola_ds.data.conversations import Columns, Conversation, conversation_of, is_talk, kind_of_row
from cola_ds.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "sky"}}


def read(row, system=None, tools=None, **columns):
    return conversation_of("t.jsonl:7", row, Columns(**columns), system, tools)


def messages(*given, **row):
    return read({"messages": [*given], **row}).messages


def refused(row, **columns):
    with pytest.raises(UserError) as raised:
        read(row, **columns)
    line = str(raised.value)
    assert line.startswith("t.jsonl:7") and "\n" not in line
    return line.removeprefix("t.jsonl:7").lstrip(": ")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["messages", "conversations", "prompt", "completion", "text"], "messages"),
        (["conversations", "prompt", "completion", "text"], "conversations"),
        (["conversation", "instruction", "output"], "conversations"),
        (["prompt", "completion", "instruction", "output", "text"], "pairs"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["prompt", "text"], "text"),
        (["prompt", "instruction"], None),
        ([], None),
    ],
)
def test_what_a_row_is(names, kind):
    assert kind_of_row(names, Columns()) == kind


def test_what_a_row_is_by_the_configured_columns():
    columns = Columns(prompt="instruction", completion="output", text="body")
    assert kind_of_row(["instruction", "output"], columns) == "pairs"
    assert kind_of_row(["body"], columns) == "text"
    assert kind_of_row(["text"], columns) is None


@pytest.mark.parametrize(
    ("value", "answer"),
    [([USER], True), ([{"from": "gpt"}], True), ("Hi", False), ([], False), (["Hi"], False), (None, False)],
)
def test_what_is_a_list_of_messages(value, answer):
    assert is_talk(value) is answer


# messages


def test_messages_and_what_is_trained():
    row = {"messages": [{"role": "system", "content": "Be"}, USER, ASSISTANT], "id": 3}
    assert read(row) == Conversation(row["messages"], None, [False, False, True])


def test_a_weight_of_0_is_not_trained():
    row = {"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}, USER, ASSISTANT]}
    found = read(row)
    assert found.trained == [False, False, False, True, False, True]
    assert found.messages == [USER, ASSISTANT] * 3
    assert row["messages"][1]["weight"] == 0  # the row stays as it was


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "H", "image": None}, {"text": "i"}]
    assert messages({"role": "user", "content": parts}, ASSISTANT) == [USER, ASSISTANT]


def test_other_keys_are_passed_on():
    answer = {"role": "tool", "content": "21", "name": "sky", "tool_call_id": "a"}
    thought = ASSISTANT | {"reasoning_content": "sun"}
    assert messages(USER, answer, thought) == [USER, answer, thought]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("whole", [True, False])
def test_tool_calls(arguments, whole):
    function = {"name": "sky", "arguments": arguments}
    calls = [{"type": "function", "function": function} if whole else function]
    assert messages(USER, {"role": "assistant", "content": None, "tool_calls": calls})[1] == {
        "role": "assistant",
        "tool_calls": [CALL],
    }
    assert messages(USER, {"role": "assistant", "tool_calls": json.dumps(calls)})[1]["tool_calls"] == [CALL]


@pytest.mark.parametrize("arguments", ["sun", "[1]", "{", ""])
def test_arguments_that_are_no_object_stay_as_they_are(arguments):
    calls = [{"function": {"name": "sky", "arguments": arguments}}]
    assert messages(USER, {"role": "assistant", "tool_calls": calls})[1]["tool_calls"] == calls


def test_what_arrow_fills_in_is_dropped():
    given = [
        USER,
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "sky", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "21", "tool_call_id": "a"},
        ASSISTANT | {"tool_calls": [{"function": {"name": "sun"}}]},
    ]
    (row,) = pyarrow.Table.from_pylist([{"messages": given}]).to_pylist()
    assert row["messages"][0]["tool_calls"] is None and row["messages"][3]["tool_calls"][0]["id"] is None
    found = read(row).messages
    assert found == [
        USER,
        given[1] | {"tool_calls": [CALL | {"id": "a", "function": CALL["function"] | {"arguments": {}}}]},
        *given[2:],
    ]
    assert messages(USER, ASSISTANT | {"tool_calls": []}) == [USER, ASSISTANT]


def test_a_column_of_json_text():
    assert read({"messages": json.dumps([USER, ASSISTANT]), "tools": json.dumps([TOOL])}) == Conversation(
        [USER, ASSISTANT], [TOOL], [False, True]
    )


def test_text_is_taken_as_it_is():
    said = {"role": "user", "content": " \x00é😀\r\n"}
    assert messages(said, ASSISTANT | {"content": ""}) == [said, ASSISTANT | {"content": ""}]
    assert messages(said | {"content": "é".encode()}, ASSISTANT)[0]["content"] == "é"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "has [] in column messages; it must be a list of messages"),
        (None, "has None in column messages; it must be a list of messages"),
        ("Hi", "column messages has 'Hi'; it must be a list, or JSON text of one"),
        ("{}", "has '{}' in column messages; it must be a list of messages"),
        ("[" * 100000, "it must be a list, or JSON text of one"),
        ([USER, "Hi"], "message 2 is 'Hi'; it must be an object with role and content"),
        ([{"content": "Hi"}], "message 1 has no role; it has content: it needs one of system, developer, user"),
        ([{"role": None, "content": "Hi"}], "message 1 has no role; it has content"),
        ([USER, {"role": "narrator", "content": "Hi"}], "message 2 has role 'narrator'; it must be one of system, dev"),
        ([{"role": ["user"], "content": "Hi"}], "message 1 has role ['user']; it must be one of"),
        ([USER, {"role": "assistant"}], "message 2 has no content; it must have a text, or tool_calls"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], "message 2 has no content"),
        ([USER, ASSISTANT | {"content": 3}], "message 2 has content 3; it must be text, or a list of parts of text"),
        ([USER, ASSISTANT | {"content": {"text": "a"}}], "message 2 has content {'text': 'a'}; it must be text"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "a"}]}, ASSISTANT],
            "message 1 has a part of type 'image' in its content; only text is trained",
        ),
        ([{"role": "user", "content": ["Hi"]}, ASSISTANT], "message 1 has 'Hi' in its content; only text is trained"),
        ([{"role": "user", "content": [{"type": "text"}]}, ASSISTANT], "message 1 has {'type': 'text'} in its content"),
        ([USER], "has no message of the assistant's"),
        ([USER, ASSISTANT | {"weight": 0}], "has no message of the assistant's to train: all of them have weight 0"),
        ([USER, ASSISTANT | {"weight": 0.5}], "message 2 has weight 0.5; it must be 0 (not trained) or 1"),
        ([USER, ASSISTANT | {"content": "a\ud83d"}], r"message 2: '\ud83d' is half a letter"),
        ([USER, ASSISTANT | {"reasoning_content": "\ud83d"}], r"message 2: '\ud83d' is half a letter"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": {"x": ["\ud83d"]}}]}],
            r"message 2: '\ud83d' is half a letter",
        ),
        ([USER, ASSISTANT | {"content": b"\xff"}], "message 2: column content is not UTF-8"),
        (
            [USER, ASSISTANT | {"tool_calls": [{"arguments": {}}]}],
            "message 2 has a tool call {'arguments': {}} without a name",
        ),
        ([USER, ASSISTANT | {"tool_calls": "sky"}], "message 2 tool_calls has 'sky'; it must be a list, or JSON text"),
        (
            [USER, ASSISTANT | {"tool_calls": {"name": "a"}}],
            "message 2 has tool_calls {'name': 'a'}; they must be a list",
        ),
        ([USER, ASSISTANT | {"function_call": {}}], "message 2 has function_call, which chat templates do not take"),
    ],
)
def test_messages_that_are_refused(given, line):
    assert line in refused({"messages": given})


def test_a_row_that_holds_no_conversation():
    line = refused({"question": "Hi", "answer": "Hello"})
    assert line == (
        "has no conversation; it has question, answer: it needs messages, conversations, prompt and completion, "
        "or instruction and output"
    )
    assert "has no conversation; it has text" in refused({"text": "Hi"})


def test_deep_nesting_is_no_crash():
    deep = None
    for _ in range(100_000):
        deep = [deep]
    assert "content" in refused({"messages": [USER, ASSISTANT | {"content": deep}]})
    assert messages(USER, ASSISTANT | {"extra": deep})


# System and tools


def test_a_system_message_is_put_in_front_where_there_is_none():
    be = {"role": "system", "content": "Be"}
    found = read({"messages": [USER, ASSISTANT]}, system="Be")
    assert found == Conversation([be, USER, ASSISTANT], None, [False, False, True])
    own = {"role": "system", "content": "Kind"}
    for role in ("system", "developer"):
        assert read({"messages": [own | {"role": role}, USER, ASSISTANT]}, system="Be").messages[0] == own | {
            "role": role
        }
    assert read({"prompt": "Hi", "completion": "Hello"}, system="Be").messages == [be, USER, ASSISTANT]


def test_a_row_may_bring_its_own_system_text():
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert read(row | {"system": "Kind"}, system="Be").messages[0] == {"role": "system", "content": "Kind"}
    for empty in ("", None):
        assert read(row | {"system": empty}, system="Be").messages[0] == {"role": "system", "content": "Be"}
        assert read(row | {"system": empty}).messages == [USER, ASSISTANT]
    row["conversations"].insert(0, {"from": "system", "value": "Kind"})
    assert read(row | {"system": "Kind"}).messages[1:] == [USER, ASSISTANT]
    assert "has a system message and another text in column system" in refused(row | {"system": "Be"})
    assert "has 3 in column system; it must be text" in refused(row | {"system": 3})


def test_tools_of_a_row_go_before_the_configured_ones():
    row = {"messages": [USER, ASSISTANT]}
    assert read(row, tools=[TOOL]).tools == [TOOL]
    for none in (None, "", "[]", []):
        assert read(row | {"tools": none}, tools=[TOOL]).tools == [TOOL]
    other = {"name": "sun"}
    for given in ([other], json.dumps([other])):
        assert read(row | {"tools": given}, tools=[TOOL]).tools == [other]
    for wrong in ("sun", '{"name": "sun"}', [1], 3):
        assert "tools" in refused(row | {"tools": wrong})
    assert r"column tools: '\ud83d' is half a letter" in refused(row | {"tools": [{"name": "\ud83d"}]})


# ShareGPT


@pytest.mark.parametrize("column", ["conversations", "conversation"])
@pytest.mark.parametrize(("human", "gpt"), [("human", "gpt"), ("user", "assistant"), ("Human", "chatgpt")])
def test_sharegpt(column, human, gpt):
    talk = [{"from": "system", "value": "Be"}, {"from": human, "value": "Hi"}, {"from": gpt, "value": "Hello"}]
    assert read({column: talk}) == Conversation(
        [{"role": "system", "content": "Be"}, USER, ASSISTANT], None, [False, False, True]
    )
    assert read({column: [USER, ASSISTANT]}).messages == [USER, ASSISTANT]
    assert read({column: json.dumps(talk)}).messages[1:] == [USER, ASSISTANT]


@pytest.mark.parametrize(
    "value", ['{"name": "sky", "arguments": {"x": 1}}', [{"name": "sky", "arguments": '{"x": 1}'}]]
)
@pytest.mark.parametrize("answer", ["observation", "tool", "function_response"])
def test_sharegpt_calls_tools(value, answer):
    talk = [
        {"from": "human", "value": "Hi", "weight": None},
        {"from": "function_call", "value": value},
        {"from": answer, "value": "21"},
        {"from": "gpt", "value": "Hello", "weight": 0},
    ]
    found = read({"conversations": talk, "tools": json.dumps([TOOL])})
    assert found == Conversation(
        [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "21"}, ASSISTANT],
        [TOOL],
        [False, True, False, False],
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"from": "narrator", "value": "Hi"}, "message 1 is from 'narrator'; it must be from one of human, user, gpt"),
        ({"from": 3, "value": "Hi"}, "message 1 is from 3; it must be from one of"),
        ({"from": "human"}, "message 1 has no content"),
        ({"from": "human", "value": 3}, "message 1 has content 3; it must be text"),
        ({"from": "function_call", "value": "sky"}, "message 1 tool_calls has 'sky'"),
        ({"from": "function_call", "value": 3}, "message 1 has tool_calls 3; they must be a list of objects"),
        ({"from": "function_call", "value": ""}, "message 1 tool_calls has ''"),
        ({"from": "function_call"}, "message 1 has no content"),
        ({"value": "Hi"}, "message 1 has no role; it has value"),
    ],
)
def test_sharegpt_that_is_refused(given, line):
    assert line in refused({"conversations": [given, {"from": "gpt", "value": "Hello"}]})


# Alpaca, prompts and completions


def test_alpaca():
    row = {"instruction": "Hi", "output": "Hello"}
    for more in ({}, {"input": ""}, {"input": None}, {"history": []}, {"history": None}):
        assert read(row | more) == Conversation([USER, ASSISTANT], None, [False, True])
    assert read(row | {"input": "21"}).messages[0]["content"] == "Hi\n\n21"
    assert "has [['a', 'b']] in column history, which is not read" in refused(row | {"history": [["a", "b"]]})
    assert "has 3 in column input; it must be text" in refused(row | {"input": 3})
    assert "has None in column output; it must be text" in refused(row | {"output": None})


def test_prompt_and_completion():
    assert read({"q": "Hi", "a": "Hello"}, prompt="q", completion="a") == Conversation(
        [USER, ASSISTANT], None, [False, True]
    )
    assert "has None in column completion" in refused({"prompt": "Hi", "completion": None})


def test_prompt_and_completion_that_are_messages():
    """The prompt's own answers are not trained."""
    found = read({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert found == Conversation([USER, ASSISTANT, USER, ASSISTANT], None, [False, False, False, True])
    assert "in one of the columns prompt and completion alone" in refused({"prompt": [USER], "completion": "Hello"})
    assert "completion message 1 has role 'x'" in refused(
        {"prompt": [USER], "completion": [{"role": "x", "content": ""}]}
    )
    assert "to train: all of them have weight 0 or are the prompt's" in refused(
        {"prompt": [USER, ASSISTANT], "completion": [USER]}
    )
