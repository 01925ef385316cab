"""Chat template: conversations to token ids, and which of these are trained.

What is trained is found as characters of the rendered text, and carried over to ids by the tokenizer's offsets. An assistant's
turn is what the rendering up to it adds to the generation prompt; that each is a prefix of what follows is checked for every
conversation, as templates may rewrite earlier turns.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cola_ds.data.conversations import Conversation
from cola_ds.errors import UserError, first_line, quoted

# What there is to know of conversations, as it is reported; each is counted once a conversation.
TURN_BY_TURN = "trained turn by turn: the chat template rewrites earlier turns"
UNENDED = "an assistant's turn ends in no special token"
SPECIAL_TEXT = "special tokens stand in the text of a message"
CHANGED_TEXT = "the chat template changes or leaves out text of a message"
TOOLS_LEFT_OUT = "the chat template leaves out the tools"
DOUBLED_BOS = "BOS stood twice at the beginning, and is there once"
NO_BOS = "the chat template writes no BOS, though the tokenizer puts one in front of texts"
DATED = "the chat template writes the date of the day: without data.cache, a run that goes on another day has other ids"

_REMEDY = "name another in data.chat_template=FILE.jinja"
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """An example: a conversation, or a beginning of one that is trained on its last turn alone."""

    ids: list[int]
    spans: list[_Span]
    """[start, end) of trained ids, in order, disjoint."""
    ends: list[tuple[str, int]]
    """A role, and where its ids end, one after the other; with the loss on the assistant, `assistant` are the trained turns and
    `prompt` is the rest."""
    text: str
    """What the ids were made from."""

    @property
    def roles(self) -> Counter[str]:
        """Ids of each role."""
        found: Counter[str] = Counter()
        for role, first, last in self._parts():
            found[role] += last - first
        return +found

    @property
    def trained(self) -> Counter[str]:
        """Ids of each role that the loss counts; the first of all has nothing before it to be predicted from."""
        found: Counter[str] = Counter()
        for role, first, last in self._parts():
            found[role] += sum(max(0, min(last, end) - max(first, start, 1)) for start, end in self.spans)
        return +found

    def _parts(self) -> Iterator[tuple[str, int, int]]:
        at = 0
        for role, end in self.ends:
            end = min(end, len(self.ids))
            yield role, at, end
            at = end

    def cut(self, length: int) -> Rendered:
        """Its first ids alone."""
        spans = [(start, min(end, length)) for start, end in self.spans if start < length]
        return Rendered(ids=self.ids[:length], spans=spans, ends=self.ends, text=self.text)


@dataclass(frozen=True)
class _Text:
    """A rendered text with [start, end) of its characters."""

    text: str
    trained: list[_Span]
    roles: list[tuple[str, int]]  # a role and where it ends, in order; what is after the last is the template's


class ChatTemplate:
    """A tokenizer's chat template, or another in its place, with what the loss is on."""

    notes: Counter[str]
    """Conversations by what there is to know of them, of all that were encoded."""

    def __init__(self, tokenizer: Any, template: str | None, loss_on: Literal["assistant", "last", "all"]):
        """Raises UserError for a tokenizer without a chat template or without offsets, and a template that is no Jinja."""
        name = (
            os.path.basename((getattr(tokenizer, "name_or_path", None) or "").rstrip("/")) or type(tokenizer).__name__
        )
        self._named = f"the chat template of tokenizer {name}" if template is None else "data.chat_template"
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"tokenizer {name} does not say which characters its ids are of, which conversations need: "
                "give the model's folder a tokenizer.json"
            )
        if template is None and not tokenizer.chat_template:
            raise UserError(f"tokenizer {name} has no chat template: name one in data.chat_template=FILE.jinja")
        self.notes = Counter()
        self._tokenizer, self._given, self._loss_on = tokenizer, template, loss_on
        self._bos = tokenizer.bos_token_id
        self._begins = self._bos is not None and self._bos in tokenizer("a").input_ids[:1]
        self._names = tokenizer.special_tokens_map
        added = tokenizer.added_tokens_decoder
        self._added = {index: token.content for index, token in added.items() if not token.content.isspace()}
        self._endings = tuple(self._added.values())
        self._ends = _any_of([*self._endings])
        self._special = _any_of([token.content for token in added.values() if token.special])
        self._check_syntax()

    def encode(self, place: str, conversation: Conversation) -> list[Rendered]:
        """The examples of a conversation: one, or one for each trained turn where the template rewrites earlier ones.

        Raises UserError, naming `place`, for what the template does not take, and for turns that cannot be told apart.
        """
        return self.encode_all([(place, conversation)])[0]

    def encode_all(self, conversations: Sequence[tuple[str, Conversation]]) -> list[list[Rendered]]:
        """As `encode`, of many at once, which is faster."""
        texts = [self._texts(place, conversation) for place, conversation in conversations]
        flat = [each.text for some in texts for each in some]
        if not flat:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        encodings = iter(self._tokenizer(flat, verbose=False, **options).encodings)
        return [self._example(place, some, encodings) for (place, _), some in zip(conversations, texts, strict=True)]

    # Rendering

    def _check_syntax(self) -> None:
        from jinja2 import TemplateSyntaxError

        try:
            self._template(None)
        except ValueError as error:  # several templates, none of them the default
            raise UserError(f"{self._named} cannot be chosen: {first_line(error)}; {_REMEDY}") from None
        try:
            self._raw([{"role": "user", "content": "a"}], None, False)
        except TemplateSyntaxError as error:
            raise UserError(f"{self._named} is no Jinja template: line {error.lineno}: {first_line(error)}") from None
        except Exception:  # it may refuse this conversation, and be right for those that come
            return

    def _template(self, tools: Any) -> str:
        return self._tokenizer.get_chat_template(self._given, tools)

    def _raw(self, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> tuple[str, list[_Span] | None]:
        """The rendered text, and [start, end) of what its marks say is generated; None without marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._template(tools)
        marked = not prompt and bool(_MARKS.search(template))
        texts, marks = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **self._names,
        )
        return texts[0], sorted(marks[0]) if marked else None

    def _render(
        self, place: str, conversation: Conversation, count: int, prompt: bool = False
    ) -> tuple[str, list[_Span] | None]:
        """The first `count` messages. Raises UserError in the template's own words."""
        try:
            return self._raw(conversation.messages[:count], conversation.tools, prompt)
        except Exception as error:  # a template is a program, which may fail in any way
            part = "" if count == len(conversation.messages) else f", of its first {count} messages"
            if count == 0:
                part = ", as the assistant speaks first"
            raise UserError(f"{place}: {self._named} refuses it{part}: {first_line(error)}") from None

    # What is trained, in characters

    def _texts(self, place: str, conversation: Conversation) -> list[_Text]:
        count = len(conversation.messages)
        full, marks = self._render(place, conversation, count)
        notes: set[str] = set()
        if self._loss_on == "all":
            texts = [self._all(place, conversation, full)]
        else:
            which = [index for index, trained in enumerate(conversation.trained) if trained]
            turns = [self._turn(place, conversation, index, full) for index in which[-(self._loss_on == "last") :]]
            if all(full.startswith(text) for _, text in turns):
                texts = [self._turns(place, full, [(start, len(text)) for start, text in turns], marks, notes)]
            else:
                notes.add(TURN_BY_TURN)
                texts = [
                    self._turns(
                        place, text, [(start, len(text))], self._render(place, conversation, index + 1)[1], notes
                    )
                    for index, (start, text) in zip(which[-(self._loss_on == "last") :], turns, strict=True)
                ]
        notes |= self._look(conversation, [full, *(each.text for each in texts if each.text is not full)])
        self.notes.update(notes)
        return texts

    def _turn(self, place: str, conversation: Conversation, index: int, full: str) -> tuple[int, str]:
        """Where an assistant's turn begins, and the rendering that ends with it."""
        text = full
        if index + 1 < len(conversation.messages):
            text, _ = self._render(place, conversation, index + 1)
        prompt, _ = self._render(place, conversation, index, prompt=True)
        if not text.startswith(prompt):
            alike = next(
                (at for at, both in enumerate(zip(prompt, text, strict=False)) if both[0] != both[1]), len(text)
            )
            raise UserError(
                f"{place} message {index + 1}: {self._named} prompts the assistant with {quoted(prompt[-40:])}, and writes "
                f"its turn otherwise: {quoted(text[alike : alike + 40])} stands for {quoted(prompt[alike:])}; {_REMEDY}"
            )
        return len(prompt), text

    def _turns(self, place: str, text: str, turns: list[_Span], marks: list[_Span] | None, notes: set[str]) -> _Text:
        """The text with what is trained of each turn."""
        trained, roles = [], []
        for start, end in turns:
            spans = [(start, end)] if marks is None else [mark for mark in marks if _within(mark, start, end)]
            if spans:
                spans[-1] = (spans[-1][0], self._end(place, text, spans[-1], end, marks is not None, notes))
            trained += spans
            roles += [("prompt", start), ("assistant", end)]
        return _Text(text, trained, [*roles, ("prompt", len(text))])

    def _end(self, place: str, text: str, span: _Span, turn_end: int, marked: bool, notes: set[str]) -> int:
        """Where the last span of a turn ends: with the special token that ends the turn."""
        start, end = span
        if marked and (found := self._ends.match(text, end, turn_end)):
            return found.end()
        bare = start + len(text[start:end].rstrip())
        if text.endswith(self._endings, start, bare):
            return end if marked else bare
        if rest := text[end:turn_end].strip():
            raise UserError(
                f"{place}: the generation marks of {self._named} end before {quoted(rest)}, so that the end of the turn would "
                f"never be trained; {_REMEDY}"
            )
        notes.add(UNENDED)
        return end

    def _all(self, place: str, conversation: Conversation, full: str) -> _Text:
        """The whole text but for the assistant's turns that may not be trained."""
        spans, at = [], 0
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant" and not conversation.trained[index]:
                start, text = self._turn(place, conversation, index, full)
                if not full.startswith(text):
                    raise UserError(
                        f"{place} message {index + 1} may not be trained, and cannot be told from the others, as {self._named} "
                        "rewrites earlier turns: choose data.loss_on=assistant"
                    )
                spans.append((at, start))
                at = len(text)
        spans.append((at, len(full)))
        roles = []
        for index, message in enumerate(conversation.messages):
            try:
                text = self._render(place, conversation, index + 1)[0]
            except UserError:  # it is only counted
                continue
            if full.startswith(text):
                roles.append((message["role"], len(text)))
        return _Text(full, [span for span in spans if span[0] < span[1]], roles)

    def _look(self, conversation: Conversation, texts: list[str]) -> set[str]:
        """What there is to know of a conversation that was rendered as `texts`."""
        notes = set()

        def missing(value: Any) -> bool:
            return isinstance(value, str) and not any(value.strip() in text for text in texts)

        for message in conversation.messages:
            calls = [call["function"]["name"] for call in message.get("tool_calls", [])]
            said = [message.get("content"), *(message.get(key) for key in _REASONING)]
            if any(map(missing, [*said, *calls])):
                notes.add(CHANGED_TEXT)
            if any(isinstance(each, str) and self._special.search(each) for each in said):
                notes.add(SPECIAL_TEXT)
        for tool in conversation.tools or []:
            inner = tool.get("function")
            if missing((inner if isinstance(inner, dict) else tool).get("name")):
                notes.add(TOOLS_LEFT_OUT)
        if "strftime_now" in self._template(conversation.tools):
            notes.add(DATED)
        return notes

    # Characters to ids

    def _example(self, place: str, texts: list[_Text], encodings: Any) -> list[Rendered]:
        made, notes = [], set()
        for each in texts:
            encoding = next(encodings)
            ids, offsets = encoding.ids, encoding.offsets
            if self._bos is not None:
                doubled = 0
                while ids[doubled : doubled + 2] == [self._bos, self._bos]:
                    doubled += 1
                if doubled:
                    notes.add(DOUBLED_BOS)
                    ids, offsets = ids[doubled:], offsets[doubled:]
                if self._begins and ids[:1] != [self._bos]:
                    notes.add(NO_BOS)
            spans: list[_Span] = []
            for start, end in each.trained:
                first, last = self._ids_of(ids, offsets, each.text, start, end)
                first = max(first, spans[-1][1] if spans else 0)  # an id may be of two spans
                if first < last:
                    spans.append((first, last))
            if not spans:
                raise UserError(f"{place} has no token to train: {self._named} writes nothing for the assistant")
            made.append(Rendered(ids=ids, spans=spans, ends=_ends(ids, offsets, each), text=each.text))
        self.notes.update(notes)
        return made

    def _ids_of(self, ids: list[int], offsets: list[_Span], text: str, start: int, end: int) -> _Span:
        """[first, last) of the ids that have a character of text[start:end].

        Some tokenizers leave spaces out of offsets: what lies between two ids is the latter's.
        """
        first = bisect_right(offsets, start, key=_end_of)
        while first > 1 and offsets[first - 1] == (start, start) and offsets[first - 2][1] == start:
            first -= 1  # an id of no character
        last = bisect_left(offsets, end, key=_start_of)
        if 0 < last < len(ids) and offsets[last - 1][1] < end:
            last += 1
        # A special token may take the white space beside it into its offsets: what counts is where it stands itself.
        if first < last and offsets[first][0] < start and (own := self._own(ids, offsets, text, first)):
            first += own[1] <= start
        if first < last and offsets[last - 1][1] > end and (own := self._own(ids, offsets, text, last - 1)):
            last -= own[0] >= end
        return first, last

    def _own(self, ids: list[int], offsets: list[_Span], text: str, at: int) -> _Span | None:
        """The characters of an added token without the white space around it; None for any other id."""
        start, end = offsets[at]
        content = self._added.get(ids[at])
        own = text.find(content, start, end) if content else -1
        return (own, own + len(content)) if content and own >= 0 else None


def _within(mark: _Span, start: int, end: int) -> bool:
    """Whether a mark, which may be empty, is of the turn [start, end)."""
    return mark[0] < end and (mark[1] > start or mark[0] == start)


def _start_of(offset: _Span) -> int:
    return offset[0]


def _end_of(offset: _Span) -> int:
    return offset[1]


def _any_of(texts: list[str]) -> re.Pattern[str]:
    """A pattern of any of the texts, the longest that fits; of nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _ends(ids: list[int], offsets: list[_Span], text: _Text) -> list[tuple[str, int]]:
    """Roles, and where their ids end."""
    found, at = [], 0
    for role, end in [*text.roles, ("template", len(text.text))]:
        at = max(at, bisect_left(offsets, end, key=_start_of) if end < len(text.text) else len(ids))
        found.append((role, at))
    return found
