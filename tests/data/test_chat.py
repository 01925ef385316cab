"""Conversations as ids, and which of these are trained: expectations are written by hand, a star before what is trained."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from cola_ds.data import chat
from cola_ds.data.chat import ChatTemplate
from cola_ds.data.conversations import Columns, Conversation, conversation_of
from cola_ds.errors import UserError
from tests.support.chat import chat_tokenizer, conversation, encoded, marked, template_text
from tests.support.toys import save_metaspace_tokenizer

HI = ("user", "Hi"), ("assistant", "Hello there")
TWO = ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye")
KIND = ("system", "Be kind")
TOOLS = [{"name": "sky"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sky", "arguments": '{"x": 1}'}}]}
ASKED = ("user", "Hi"), CALL, ("tool", "21"), ("assistant", "sun")


def letters(text, star=""):
    """Text whose letters are tokens each."""
    return " ".join(star + {" ": "Ġ", "\n": "Ċ"}.get(letter, letter) for letter in text)


CASES = {
    "chatml, one turn": (
        "chatml",
        HI,
        ["<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ *Hello *Ġthere *<|im_end|> Ċ"],
    ),
    "chatml, two turns and a system message": (
        "chatml",
        (KIND, *TWO),
        [
            "<|im_start|> system Ċ Be Ġkind <|im_end|> Ċ "
            "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ *Hello *<|im_end|> Ċ "
            "<|im_start|> user Ċ Bye <|im_end|> Ċ <|im_start|> assistant Ċ *Bye *<|im_end|> Ċ"
        ],
    ),
    "chatml, tools": (
        "chatml",
        ASKED,
        [
            f"<|im_start|> system Ċ {letters(chr(10) + '# Tools' + chr(10))} {letters(json.dumps(TOOLS[0]))} <|im_end|> Ċ "
            "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ "
            f"*< *tool {letters('_call>', '*')} *Ċ "
            + letters('{"name": "sky", "arguments": {"x": 1}}', "*").replace("*Ġ *1", "*Ġ *1")
            + f" *Ċ *< */ *tool {letters('_call>', '*')} *<|im_end|> Ċ "
            f"<|im_start|> user Ċ < tool {letters('_response>')} Ċ 2 1 Ċ < / tool {letters('_response>')} <|im_end|> Ċ "
            "<|im_start|> assistant Ċ *sun *<|im_end|> Ċ"
        ],
    ),
    "chatml, nothing to say": (
        "chatml",
        (("user", ""), ("assistant", "")),
        ["<|im_start|> user Ċ <|im_end|> Ċ <|im_start|> assistant Ċ *<|im_end|> Ċ"],
    ),
    "chatml, white space around": (
        "chatml",
        (("user", " Hi\n"), ("assistant", " \nHello \n")),
        ["<|im_start|> user Ċ Ġ Hi Ċ <|im_end|> Ċ <|im_start|> assistant Ċ *Ġ *Ċ *Hello *Ġ *Ċ *<|im_end|> Ċ"],
    ),
    "chatml, letters of several bytes": (
        "chatml",
        (("user", "é"), ("assistant", "é😀")),
        ["<|im_start|> user Ċ Ã © <|im_end|> Ċ <|im_start|> assistant Ċ *Ã *© *ð *Ł *ĺ *Ģ *<|im_end|> Ċ"],
    ),
    "chatml, parts of text": (
        "chatml",
        (
            ("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
            ("assistant", [{"type": "text", "text": "Hello"}]),
        ),
        ["<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ *Hello *<|im_end|> Ċ"],
    ),
    "chatml, a role out of order": (
        "chatml",
        (("assistant", "Hi"), ("assistant", "Hello"), ("user", "Bye")),
        [
            "<|im_start|> assistant Ċ *Hi *<|im_end|> Ċ <|im_start|> assistant Ċ *Hello *<|im_end|> Ċ "
            "<|im_start|> user Ċ Bye <|im_end|> Ċ"
        ],
    ),
    "llama3, one turn": (
        "llama3",
        HI,
        [
            "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> Ċ Ċ Hi <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> Ċ Ċ *Hello *Ġthere *<|eot_id|>"
        ],
    ),
    "llama3, two turns and a system message": (
        "llama3",
        (KIND, *TWO),
        [
            "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> Ċ Ċ Be Ġkind <|eot_id|> "
            "<|start_header_id|> user <|end_header_id|> Ċ Ċ Hi <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> Ċ Ċ *Hello *<|eot_id|> "
            "<|start_header_id|> user <|end_header_id|> Ċ Ċ Bye <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> Ċ Ċ *Bye *<|eot_id|>"
        ],
    ),
    "llama3, tools": (
        "llama3",
        ASKED,
        [
            f"<|begin_of_text|> <|start_header_id|> user <|end_header_id|> Ċ Ċ {letters(json.dumps(TOOLS[0]))} Ċ Ċ Hi "
            "<|eot_id|> <|start_header_id|> assistant <|end_header_id|> Ċ Ċ "
            + letters('{"name": "sky", "parameters": {"x": 1}}', "*")
            + " *<|eot_id|> <|start_header_id|> ipython <|end_header_id|> Ċ Ċ 2 1 <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> Ċ Ċ *sun *<|eot_id|>"
        ],
    ),
    "llama3, nothing to say, and white space that the template trims": (
        "llama3",
        (("user", ""), ("assistant", ""), ("user", " Hi\n"), ("assistant", " Hello \n")),
        [
            "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> Ċ Ċ <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> Ċ Ċ *<|eot_id|> "
            "<|start_header_id|> user <|end_header_id|> Ċ Ċ Hi <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> Ċ Ċ *Hello *<|eot_id|>"
        ],
    ),
    "llama3, the assistant first": (
        "llama3",
        (("assistant", "Hi"), ("user", "Bye")),
        [
            "<|begin_of_text|> <|start_header_id|> assistant <|end_header_id|> Ċ Ċ *Hi *<|eot_id|> "
            "<|start_header_id|> user <|end_header_id|> Ċ Ċ Bye <|eot_id|>"
        ],
    ),
    "mistral, one turn": ("mistral", HI, ["<s> [INST] Ġ Hi [/INST] *Ġ *Hello *Ġthere *</s>"]),
    "mistral, two turns": (
        "mistral",
        TWO,
        ["<s> [INST] Ġ Hi [/INST] *Ġ *Hello *</s> [INST] Ġ Bye [/INST] *Ġ *Bye *</s>"],
    ),
    "mistral, a system message": (
        "mistral",
        (KIND, *HI),
        ["<s> [INST] Ġ Be Ġkind Ċ Ċ Hi [/INST] *Ġ *Hello *Ġthere *</s>"],
    ),
    # The system message goes to the last user's message, which is another one for each turn.
    "mistral, two turns and a system message": (
        "mistral",
        (KIND, *TWO),
        [
            "<s> [INST] Ġ Be Ġkind Ċ Ċ Hi [/INST] *Ġ *Hello *</s>",
            "<s> [INST] Ġ Hi [/INST] Ġ Hello </s> [INST] Ġ Be Ġkind Ċ Ċ Bye [/INST] *Ġ *Bye *</s>",
        ],
    ),
    "mistral, tools": (
        "mistral",
        ASKED,
        [
            f"<s> [AVAILABLE_TOOLS] Ġ {letters(json.dumps(TOOLS))} [/AVAILABLE_TOOLS] [INST] Ġ Hi [/INST] *[TOOL_CALLS] "
            + letters(' [{"name": "sky", "arguments": {"x": 1}}]', "*")
            + f" *</s> [TOOL_RESULTS] {letters(' {' + chr(34) + 'content' + chr(34) + ': 21}')} [/TOOL_RESULTS] "
            "*Ġ *sun *</s>"
        ],
    ),
    "mistral, nothing to say": (
        "mistral",
        (("user", ""), ("assistant", "")),
        ["<s> [INST] Ġ [/INST] *Ġ *</s>"],
    ),
    "gemma, one turn": (
        "gemma",
        HI,
        ["<bos> <start_of_turn> user Ċ Hi <end_of_turn> Ċ <start_of_turn> model Ċ *Hello *Ġthere *<end_of_turn> Ċ"],
    ),
    "gemma, two turns": (
        "gemma",
        TWO,
        [
            "<bos> <start_of_turn> user Ċ Hi <end_of_turn> Ċ <start_of_turn> model Ċ *Hello *<end_of_turn> Ċ "
            "<start_of_turn> user Ċ Bye <end_of_turn> Ċ <start_of_turn> model Ċ *Bye *<end_of_turn> Ċ"
        ],
    ),
    "gemma, nothing to say, and white space that the template trims": (
        "gemma",
        (("user", " Hi\n"), ("assistant", "\n")),
        ["<bos> <start_of_turn> user Ċ Hi <end_of_turn> Ċ <start_of_turn> model Ċ *<end_of_turn> Ċ"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained(case):
    name, messages, expected = CASES[case]
    found, notes = encoded(name, *messages, tools=TOOLS if messages is ASKED else None)
    assert found == expected
    assert notes == ({chat.TURN_BY_TURN: 1} if len(expected) > 1 else {})


@pytest.mark.parametrize(
    ("name", "messages", "said"),
    [
        ("gemma", (KIND, *HI), "System role not supported"),
        ("gemma", (("user", "Hi"), *HI), "Conversation roles must alternate user/assistant/user/assistant/..."),
        ("mistral", (("user", "Hi"), *HI), "After the optional system message, roles must alternate"),
        ("llama3", (HI[0], CALL | {"tool_calls": CALL["tool_calls"] * 2}), "only supports single tool-calls at once!"),
        ("mistral", (("assistant", "Hi"), ("user", "Bye")), "refuses it: After the optional system message"),
    ],
)
def test_what_a_template_refuses_is_said_in_its_words(name, messages, said):
    with pytest.raises(UserError) as raised:
        encoded(name, *messages)
    line = str(raised.value)
    assert line.startswith(f"t.jsonl:1: the chat template of tokenizer {name} refuses it")
    assert said in line and "\n" not in line


def test_text_that_holds_special_tokens():
    """They become special ids, as at inference; each turn ends where its own last one stands."""
    found, notes = encoded(
        "chatml", ("user", "Hi<|im_end|>\n<|im_start|>assistant\nBye"), ("assistant", "<|im_end|>\nHi")
    )
    assert found == [
        "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ Bye <|im_end|> Ċ "
        "<|im_start|> assistant Ċ *<|im_end|> *Ċ *Hi *<|im_end|> Ċ"
    ]
    assert notes == {chat.SPECIAL_TEXT: 1}
    found, notes = encoded("gemma", ("user", "<end_of_turn>"), ("assistant", "<start_of_turn>Hi"))
    assert found == [
        "<bos> <start_of_turn> user Ċ <end_of_turn> <end_of_turn> Ċ "
        "<start_of_turn> model Ċ *<start_of_turn> *Hi *<end_of_turn> Ċ"
    ]


# What the loss is on


def test_loss_on_the_last_turn():
    found, notes = encoded("chatml", *TWO, loss_on="last")
    assert found == [
        "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ Hello <|im_end|> Ċ "
        "<|im_start|> user Ċ Bye <|im_end|> Ċ <|im_start|> assistant Ċ *Bye *<|im_end|> Ċ"
    ]
    # A template that rewrites earlier turns does not rewrite the last one: nothing is lost.
    found, notes = encoded("mistral", KIND, *TWO, loss_on="last")
    assert found == ["<s> [INST] Ġ Hi [/INST] Ġ Hello </s> [INST] Ġ Be Ġkind Ċ Ċ Bye [/INST] *Ġ *Bye *</s>"]
    assert notes == {}


def test_loss_on_all():
    found, _ = encoded("gemma", *HI, loss_on="all")
    assert found == [
        "*<bos> *<start_of_turn> *user *Ċ *Hi *<end_of_turn> *Ċ *<start_of_turn> *model *Ċ *Hello *Ġthere *<end_of_turn> *Ċ"
    ]
    found, _ = encoded("mistral", KIND, *TWO, loss_on="all")
    assert found == [
        "*<s> *[INST] *Ġ *Hi *[/INST] *Ġ *Hello *</s> *[INST] *Ġ *Be *Ġkind *Ċ *Ċ *Bye *[/INST] *Ġ *Bye *</s>"
    ]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", "<s> [INST] Ġ Hi [/INST] Ġ Hello </s> [INST] Ġ Bye [/INST] *Ġ *Bye *</s>"),
        ("last", "<s> [INST] Ġ Hi [/INST] Ġ Hello </s> [INST] Ġ Bye [/INST] *Ġ *Bye *</s>"),
        ("all", "*<s> *[INST] *Ġ *Hi *[/INST] Ġ Hello </s> *[INST] *Ġ *Bye *[/INST] *Ġ *Bye *</s>"),
    ],
)
def test_a_turn_of_weight_0_is_never_trained(loss_on, expected):
    wrong = {"role": "assistant", "content": "Hello", "weight": 0}
    assert encoded("mistral", TWO[0], wrong, *TWO[2:], loss_on=loss_on)[0] == [expected]


def test_a_turn_of_weight_0_that_cannot_be_told_apart():
    wrong = {"role": "assistant", "content": "Hello", "weight": 0}
    with pytest.raises(UserError, match=r"t.jsonl:1 message 3 may not be trained.*rewrites.*data.loss_on=assistant"):
        encoded("mistral", KIND, TWO[0], wrong, *TWO[2:], loss_on="all")
    found, _ = encoded("mistral", KIND, TWO[0], wrong, *TWO[2:])
    assert found == ["<s> [INST] Ġ Hi [/INST] Ġ Hello </s> [INST] Ġ Be Ġkind Ċ Ċ Bye [/INST] *Ġ *Bye *</s>"]


@pytest.mark.parametrize(
    ("loss_on", "roles", "trained"),
    [
        ("assistant", {"prompt": 18, "assistant": 6}, {"assistant": 4}),  # the line end after a turn is not trained
        ("last", {"prompt": 21, "assistant": 3}, {"assistant": 2}),
        (
            "all",
            {"system": 7, "user": 12, "assistant": 12},
            {"system": 6, "user": 12, "assistant": 12},
        ),  # not the first
    ],
)
def test_ids_are_counted_by_role(loss_on, roles, trained):
    chosen = ChatTemplate(chat_tokenizer("chatml"), None, loss_on)
    messages = TWO if loss_on != "all" else (KIND, *TWO)
    (one,) = chosen.encode("t.jsonl:1", conversation(*messages))
    assert sum(roles.values()) == len(one.ids)
    assert sum(trained.values()) == sum(end - max(start, 1) for start, end in one.spans)
    assert (one.roles, one.trained) == (roles, trained)
    shorter = one.cut(len(one.ids) - 4)
    assert shorter.ids == one.ids[:-4]
    assert shorter.roles.total() == len(one.ids) - 4
    assert shorter.trained.total() == sum(min(end, len(shorter.ids)) - max(start, 1) for start, end in shorter.spans)


# Marks, and templates that rewrite


def test_marks_say_what_is_trained_and_take_the_end_along():
    found, notes = encoded("chatml", *TWO, template="generation")
    assert found == [
        "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ *Hello *<|im_end|> Ċ "
        "<|im_start|> user Ċ Bye <|im_end|> Ċ <|im_start|> assistant Ċ *Bye *<|im_end|> Ċ"
    ]
    found, notes = encoded("chatml", ("user", "Hi"), ("assistant", ""), template="generation", loss_on="last")
    assert found == ["<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ *<|im_end|> Ċ"]
    assert notes == {}


def test_marks_of_a_part_of_the_turn():
    """What the marks leave out is not trained, though it is in the assistant's turn."""
    text = template_text("generation").replace(
        "{{- message.content -}}\n        {%- endgeneration", "{%- endgeneration"
    )
    text = text.replace("{%- generation -%}", "{{- 'Hi' -}}{%- generation -%}{{- message.content -}}")
    tokenizer = chat_tokenizer("chatml")
    (one,) = ChatTemplate(tokenizer, text, "assistant").encode("t.jsonl:1", conversation(*HI))
    assert marked(tokenizer, one).endswith("assistant Ċ Hi *Hello *Ġthere *<|im_end|> Ċ")


def test_marks_of_the_whole_turn():
    """Marks may hold the header and the line end too: they say what is trained, and Transformers' mask is the same."""
    text = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    text += "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    text += "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    tokenizer = chat_tokenizer("chatml")
    chosen = ChatTemplate(tokenizer, text, "assistant")
    talk = conversation(*TWO)
    (one,) = chosen.encode("t.jsonl:1", talk)
    turn = "<|im_start|> user Ċ {} <|im_end|> Ċ *<|im_start|> *assistant *Ċ *{} *<|im_end|> *Ċ"
    assert marked(tokenizer, one) == f"{turn.format('Hi', 'Hello')} {turn.format('Bye', 'Bye')}"
    theirs = tokenizer.apply_chat_template(talk.messages, chat_template=text, return_assistant_tokens_mask=True)
    trained = {index for first, last in one.spans for index in range(first, last)}
    assert theirs["assistant_masks"] == [int(index in trained) for index in range(len(one.ids))]
    assert chosen.notes == {}


def test_marks_that_end_too_early_are_refused():
    """The token that ends a turn would not be trained: as with marks in a macro, whose places Jinja does not tell."""
    text = template_text("generation").replace("{%- endgeneration -%}", "{%- endgeneration -%}{{- 'Bye' -}}")
    with pytest.raises(
        UserError, match=r"t.jsonl:1: the generation marks of data.chat_template end before 'Bye<|im_end|>'"
    ):
        ChatTemplate(chat_tokenizer("chatml"), text, "assistant").encode("t.jsonl:1", conversation(*HI))
    macro = "{% macro turn(m) %}{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    macro += "{% endmacro %}{% for m in messages %}{% if m.role == 'assistant' %}{{ turn(m) }}{% else %}{{ m.content }}"
    macro += "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    with pytest.raises(UserError, match=r"t.jsonl:1: the generation marks of data.chat_template end before "):
        ChatTemplate(chat_tokenizer("chatml"), macro, "assistant").encode(
            "t.jsonl:1", conversation(("user", "Hi"), ("assistant", "Hello there, Hello there, Hello there"))
        )


def test_marks_that_hold_nothing_are_refused():
    text = template_text("generation").replace("== 'assistant'", "== 'developer'")
    with pytest.raises(UserError, match=r"t.jsonl:1 has no token to train: data.chat_template writes nothing"):
        ChatTemplate(chat_tokenizer("chatml"), text, "assistant").encode("t.jsonl:1", conversation(*HI))


def test_reasoning_that_is_dropped_from_earlier_turns():
    thought = {"role": "assistant", "content": "Hello", "reasoning_content": "sun"}
    found, notes = encoded("chatml", HI[0], thought, *TWO[2:], template="reasoning")
    think = "*< *think *> *Ċ {}*Ċ *< */ *think *> *Ċ *Ċ "
    assert found == [
        "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ "
        + think.format("*sun ")
        + "*Hello *<|im_end|> Ċ",
        "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ Hello <|im_end|> Ċ "
        "<|im_start|> user Ċ Bye <|im_end|> Ċ <|im_start|> assistant Ċ " + think.format("") + "*Bye *<|im_end|> Ċ",
    ]
    assert notes == {chat.TURN_BY_TURN: 1}
    # With the loss on the last turn there is one example, from which the reasoning of the first is gone: said.
    found, notes = encoded("chatml", HI[0], thought, *TWO[2:], template="reasoning", loss_on="last")
    assert len(found) == 1 and "sun" not in found[0] and notes == {chat.CHANGED_TEXT: 1}


def test_a_prompt_that_the_turns_do_not_begin_with_is_refused():
    with pytest.raises(UserError) as raised:
        encoded("chatml", *HI, template="think_prompt")
    assert str(raised.value).startswith(
        "t.jsonl:1 message 2: the chat template of tokenizer chatml prompts the assistant"
    )
    assert r"<think>\n" in str(raised.value) and "data.chat_template=FILE.jinja" in str(raised.value)


def test_a_prefix_that_is_refused():
    """A template that reads the first message of none."""
    text = "{{ messages[0].role + '\n' }}" + template_text("chatml")
    with pytest.raises(UserError, match=r"t.jsonl:1: data.chat_template refuses it, as the assistant speaks first: "):
        ChatTemplate(chat_tokenizer("chatml"), text, "assistant").encode(
            "t.jsonl:1", conversation(("assistant", "Hi"), ("user", "Bye"))
        )


# Ends, BOS, and what is said


def test_a_turn_without_an_end_is_trained_whole_and_said():
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    text += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = chat_tokenizer("llama3")
    chosen = ChatTemplate(tokenizer, text, "assistant")
    (one,) = chosen.encode("t.jsonl:1", conversation(*TWO))
    assert marked(tokenizer, one) == "user : Ġ Hi Ċ assistant : Ġ *Hello *Ċ user : Ġ Bye Ċ assistant : Ġ *Bye *Ċ"
    assert chosen.notes == {chat.UNENDED: 1, chat.NO_BOS: 1}


def test_a_prompt_that_ends_in_a_special_token_ends_no_turn():
    """The special token in front of an empty turn is not the turn's."""
    text = template_text("mistral").replace("+ eos_token -}}", "-}}").replace("' ' +", "")
    tokenizer = chat_tokenizer("mistral")
    chosen = ChatTemplate(tokenizer, text, "assistant")
    with pytest.raises(UserError, match="no token to train"):
        chosen.encode("t.jsonl:1", conversation(("user", "Hi"), ("assistant", "")))
    assert chosen.notes == {chat.UNENDED: 1}


@pytest.mark.parametrize("text", ["{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_bos_stands_once(text):
    text += "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokenizer = chat_tokenizer("llama3")
    chosen = ChatTemplate(tokenizer, text, "assistant")
    found = chosen.encode("t.jsonl:1", conversation(("user", "<|begin_of_text|>Hi"), ("assistant", "Hello")))
    assert [marked(tokenizer, one) for one in found] == ["<|begin_of_text|> Hi <|eot_id|> *Hello *<|eot_id|>"]
    assert chosen.notes == {chat.DOUBLED_BOS: 1, chat.SPECIAL_TEXT: 1}
    assert found[0].roles == {"prompt": 3, "assistant": 2}


def test_what_a_template_leaves_out_is_said():
    found, notes = encoded("gemma", *ASKED[:1], CALL | {"content": "Hello"}, tools=TOOLS)
    assert found == [CASES["gemma, one turn"][2][0].replace(" *Ġthere", "")]
    assert notes == {chat.CHANGED_TEXT: 1, chat.TOOLS_LEFT_OUT: 1}


def test_a_date_of_the_day_is_said():
    chosen = ChatTemplate(chat_tokenizer("chatml"), "{{ strftime_now('%d') }}" + template_text("chatml"), "assistant")
    chosen.encode("t.jsonl:1", conversation(*HI))
    assert chosen.notes == {chat.DATED: 1}


def test_notes_count_conversations():
    chosen = ChatTemplate(chat_tokenizer("mistral"), None, "assistant")
    chosen.encode_all([("t.jsonl:1", conversation(KIND, *TWO)), ("t.jsonl:2", conversation(KIND, *TWO, *TWO))])
    assert chosen.notes == {chat.TURN_BY_TURN: 2}
    assert chosen.encode_all([]) == []


# Tokenizers


def test_a_tokenizer_without_a_template_is_refused_by_name():
    tokenizer = chat_tokenizer("gemma")
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"^tokenizer gemma has no chat template: name one in data.chat_template=FILE.jinja$"
    ):
        ChatTemplate(tokenizer, None, "assistant")
    assert ChatTemplate(tokenizer, template_text("gemma"), "assistant").encode("t.jsonl:1", conversation(*HI))


def test_a_tokenizer_without_offsets_is_refused_by_name():
    class Slow:
        name_or_path, is_fast = "models/old", False

    with pytest.raises(
        UserError, match=r"^tokenizer old does not say which characters its ids are of.*tokenizer.json$"
    ):
        ChatTemplate(Slow(), "x", "assistant")


def test_a_template_that_is_no_jinja_is_refused():
    with pytest.raises(UserError, match=r"^data.chat_template is no Jinja template: line 2: "):
        ChatTemplate(chat_tokenizer("chatml"), "a\n{% for %}", "assistant")


def test_templates_by_name():
    """A tokenizer may have one for conversations with tools."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = {"default": template_text("generation"), "tool_use": template_text("chatml")}
    chosen = ChatTemplate(tokenizer, None, "assistant")
    (one,) = chosen.encode("t.jsonl:1", conversation(*ASKED, tools=TOOLS))
    assert marked(tokenizer, one) == CASES["chatml, tools"][2][0]
    tokenizer.chat_template = {"rag": template_text("chatml")}
    with pytest.raises(UserError, match=r"multiple chat templates with no default.*data.chat_template=FILE.jinja"):
        ChatTemplate(tokenizer, None, "assistant")


def test_offsets_without_spaces():
    """Spaces that a tokenizer leaves out of its offsets are trained where they are the assistant's, and only there."""
    tokenizer = chat_tokenizer("chatml", trim_offsets=True)
    text = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' \\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ '<|im_start|>assistant \\n' }}{% endif %}"
    (one,) = ChatTemplate(tokenizer, text, "assistant").encode(
        "t.jsonl:1", conversation(("user", " Hi "), ("assistant", "  Hello there "))
    )
    assert marked(tokenizer, one) == (
        "<|im_start|> user Ġ Ċ Ġ Hi Ġ <|im_end|> Ċ <|im_start|> assistant Ġ Ċ *Ġ *Ġ *Hello *Ġthere *Ġ *<|im_end|> Ċ"
    )


def test_offsets_without_spaces_where_a_turn_has_no_end():
    tokenizer = chat_tokenizer("chatml", trim_offsets=True)
    text = (
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    (one,) = ChatTemplate(tokenizer, text, "assistant").encode(
        "t.jsonl:1", conversation(("assistant", " Hi "), ("user", "Hi"))
    )
    assert marked(tokenizer, one) == "assistant *Ġ *Hi *Ġ user Hi"


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_special_tokens_that_take_white_space_along(side):
    """Their offsets have the white space beside them; they are trained where they stand themselves."""
    tokenizer = chat_tokenizer("chatml")
    for token in ("<|im_start|>", "<|im_end|>"):
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False, **{side: True})], special_tokens=True)
    text = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    text += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    chosen = ChatTemplate(tokenizer, text, "assistant")
    (one,) = chosen.encode("t.jsonl:1", conversation(("user", "Hi"), ("assistant", " Hi "), ("user", "Bye")))
    before, after = (" *Ġ", "") if side == "lstrip" else ("", " *Ġ")
    assert marked(tokenizer, one) == (
        f"<|im_start|> Hi <|im_end|> <|im_start|>{before} *Hi{after} *<|im_end|> <|im_start|> Bye <|im_end|>"
    )


def test_a_special_token_that_takes_the_end_of_a_turn_along():
    """The one that begins the next turn is not the assistant's, though the last space of a turn without an end is in it."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False, lstrip=True)], special_tokens=True)
    text = "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}"
    text += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    (one,) = ChatTemplate(tokenizer, text, "assistant").encode(
        "t.jsonl:1", conversation(("assistant", "Hi "), ("user", "Bye"))
    )
    assert marked(tokenizer, one) == "<|im_start|> *Hi <|im_start|> Bye"


def test_a_token_of_both_prompt_and_turn_is_trained():
    text = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    text += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = chat_tokenizer("chatml")
    (one,) = ChatTemplate(tokenizer, text, "assistant").encode(
        "t.jsonl:1", conversation(("user", "Hi"), ("assistant", "there"))
    )
    assert marked(tokenizer, one) == "user : Ġ Hi assistant : *Ġthere"


def test_a_token_of_two_marks_is_trained_once():
    half = "{%- generation -%}{{- message.content[:3] -}}{%- endgeneration -%}"
    text = template_text("generation").replace(
        "message.content -}}\n        {%- end", "message.content[3:] -}}\n        {%- end"
    )
    text = text.replace("{%- generation -%}", half + "{%- generation -%}")
    tokenizer = chat_tokenizer("chatml")
    (one,) = ChatTemplate(tokenizer, text, "assistant").encode("t.jsonl:1", conversation(*HI))
    assert marked(tokenizer, one) == CASES["chatml, one turn"][2][0]
    assert all(one.spans[at][1] <= one.spans[at + 1][0] for at in range(len(one.spans) - 1))


def test_white_space_that_is_a_token_of_its_own_ends_no_turn():
    """As Gemma's line ends."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.add_tokens(["\n"])
    text = template_text("generation").replace("{%- endgeneration -%}", "{%- endgeneration -%}{{- '\\n' -}}")
    with pytest.raises(UserError, match=r"end before '<|im_end|>'"):
        ChatTemplate(tokenizer, text, "assistant").encode("t.jsonl:1", conversation(*HI))


def test_ids_of_no_character():
    """Some tokenizers put ids in front of a piece that have no character: they are of the turn that begins there."""
    chosen = ChatTemplate(chat_tokenizer("chatml"), None, "assistant")
    assert chosen._ids_of([0, 1, 2, 3], [(0, 2), (2, 2), (2, 2), (2, 3)], "abc", 2, 3) == (1, 4)
    assert chosen._ids_of([0, 1, 2, 3], [(0, 2), (2, 2), (2, 2), (2, 3)], "abc", 0, 2) == (0, 1)
    # Here it is a space, the last of what stands before, that the tokenizer left out of its offsets.
    assert chosen._ids_of([0, 1, 2], [(0, 1), (2, 2), (2, 3)], "a c", 2, 3) == (2, 3)
    assert chosen._ids_of([0, 1, 2], [(0, 1), (2, 2), (2, 3)], "a c", 0, 2) == (0, 2)


def test_a_tokenizer_as_llama_2s(tmp_path):
    """A space stands before a text, and belongs to its first piece."""
    from transformers import AutoTokenizer

    save_metaspace_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    text += "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    chosen = ChatTemplate(tokenizer, text, "assistant")
    talk = conversation(("user", "1=é"), ("assistant", "42"), ("user", "?"), ("assistant", "4😀"))
    (one,) = chosen.encode("t.jsonl:1", talk)
    assert one.ids == tokenizer.apply_chat_template(talk.messages, chat_template=text)["input_ids"]
    tokens = marked(tokenizer, one).split()
    trained = [token for token in tokens if token.startswith("*")]
    assert trained == [
        *("*▁42", "*▁", "*</s>"),
        *("*▁4", "*<0xF0>", "*<0x9F>", "*<0x98>", "*<0x80>", "*▁", "*</s>"),
    ]
    assert tokens[:2] == ["<s>", "▁"] and chosen.notes == {}
    # The space that a text after a special token is given is of no character.
    text = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (one,) = ChatTemplate(tokenizer, text, "assistant").encode("t.jsonl:1", talk)
    assert marked(tokenizer, one) == (
        "<s> ▁ 1 = <0xC3> <0xA9> </s> *▁42 *</s> ▁ ? </s> *▁4 *<0xF0> *<0x9F> *<0x98> *<0x80> *</s>"
    )
    (one,) = ChatTemplate(tokenizer, text, "assistant").encode(
        "t.jsonl:1", conversation(("user", "="), ("assistant", "x"))
    )
    assert marked(tokenizer, one) == "<s> ▁ = </s> *▁ *x *</s>"


# Whatever the texts


TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t<|>é😀\u0301\x00")), max_size=12)
TOKENIZERS = {
    (name, trim): chat_tokenizer(name, trim_offsets=trim) for name in ("chatml", "gemma") for trim in (False, True)
}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.none() | TEXTS, st.booleans())
def test_what_is_trained_of_chatml_is_what_the_assistant_says(turns, system, trim):
    tokenizer = TOKENIZERS["chatml", trim]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    talk = conversation_of("t.jsonl:1", {"messages": messages}, Columns(), system, None)
    (one,) = ChatTemplate(tokenizer, None, "assistant").encode("t.jsonl:1", talk)
    assert one.ids == tokenizer.apply_chat_template(talk.messages)["input_ids"]
    trained = [tokenizer.decode(one.ids[first:last]) for first, last in one.spans]
    assert trained == [f"{answer}<|im_end|>" for _, answer in turns]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_marks_and_prefixes_agree(turns):
    tokenizer = TOKENIZERS["chatml", False]
    talk = conversation(*[m for user, answer in turns for m in (("user", user), ("assistant", answer))])
    by_marks = ChatTemplate(tokenizer, template_text("generation"), "assistant").encode("t.jsonl:1", talk)
    assert by_marks == ChatTemplate(tokenizer, None, "assistant").encode("t.jsonl:1", talk)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.sampled_from(["assistant", "last", "all"]))
def test_many_at_once_are_as_each_alone(turns, loss_on):
    talks = [("t.jsonl:1", conversation(("user", user), ("assistant", answer))) for user, answer in turns]
    chosen = ChatTemplate(TOKENIZERS["gemma", False], None, loss_on)
    together = chosen.encode_all(talks)
    assert together == [chosen.encode(*each) for each in talks]
    for (one,) in together:
        assert sum(one.roles.values()) == len(one.ids)
        assert one.trained.total() == sum(last - max(first, 1) for first, last in one.spans)


def test_no_torch_is_imported():
    """These run in processes that tokenize, of which there are many."""
    line = (
        "import sys, cola_ds.data.chat, cola_ds.data.conversations; print({'torch', 'transformers'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_conversation_may_be_built_by_hand():
    talk = Conversation(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], None, [False, True]
    )
    (one,) = ChatTemplate(chat_tokenizer("chatml"), None, "assistant").encode("x", talk)
    assert one.text.startswith("<|im_start|>user\nHi")
