"""Tokenization: texts to token ids.

A text is tokenized as a whole, a prompt together with what follows it, since its ids are not always those of its parts; and the
tokenizer's BOS and EOS are there once, where the text has them itself too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

# What examples lose to a maximum length, as it is reported.
PROMPT_BEGIN = "the beginning of their prompt"
WHOLE_PROMPT = "their whole prompt"
COMPLETION_END = "the end of their completion"
ANSWER_BEGIN = "their whole prompt and the beginning of their answer"
CONVERSATION_END = "the end of their conversation"
LOSSES = (PROMPT_BEGIN, WHOLE_PROMPT, COMPLETION_END, ANSWER_BEGIN, CONVERSATION_END)


def ids_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The ids of each text, with the BOS that the tokenizer puts in front, if it does; the text may begin with its own instead.
    An EOS that the tokenizer adds is not among them."""
    begin = _begin(tokenizer)
    return [begin + ids[_doubled(ids, begin) :] for ids in _bare(texts, tokenizer).input_ids]


def closed_ids_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """As `ids_of`, with an EOS at the end, unless that is how the text ends."""
    begin = _begin(tokenizer)
    return [_closed(ids, len(begin), tokenizer) for ids in ids_of(texts, tokenizer)]


def pairs_of(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[tuple[list[int], int]]:
    """The closed ids of each prompt with its completion, and how many of them are the prompt's.

    An id that has a letter of the completion is the completion's, also where it has some of the prompt as well: what is to be
    learnt is learnt whole. Without a tokenizer that says which letters an id has, the prompt's ids are those with which the
    prompt alone begins too.
    """
    texts = [prompt + completion for prompt, completion in pairs]
    begin = _begin(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        alone = ids_of([prompt for prompt, _ in pairs], tokenizer)
        lengths = [_alike(*both) for both in zip(alone, ids_of(texts, tokenizer), strict=True)]
        return list(zip(closed_ids_of(texts, tokenizer), lengths, strict=True))
    found = _bare(texts, tokenizer, return_offsets_mapping=True)
    made = []
    for (prompt, _), ids, spans in zip(pairs, found.input_ids, found.offset_mapping, strict=True):
        first = _doubled(ids, begin)
        length = next((place for place, (_, end) in enumerate(spans[first:]) if end > len(prompt)), len(ids) - first)
        made.append((_closed(begin + ids[first:], len(begin), tokenizer), len(begin) + length))
    return made


def _bare(texts: Sequence[str], tokenizer: Any, **options: bool) -> Any:
    """The texts' own ids, among them those of special tokens that are written out in them."""
    options |= {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(list(texts), verbose=False, **options)


@functools.lru_cache(maxsize=1)
def _begin(tokenizer: Any) -> list[int]:
    """The special ids that the tokenizer puts in front of every text."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    places = (place for place in range(len(whole) - len(bare) + 1) if whole[place : place + len(bare)] == bare)
    return whole[: next(places, 0)]


def _doubled(ids: list[int], begin: list[int]) -> int:
    """1 where the text begins with the BOS that is put in front of it, else 0."""
    return int(bool(begin) and ids[:1] == begin[-1:])


def _closed(ids: list[int], before: int, tokenizer: Any) -> list[int]:
    """The ids, which begin with `before` that are not the text's own, ended by EOS."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[before:][-1:] == [eos] else [*ids, eos]


def _alike(one: Iterable[int], other: Iterable[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def cut_pair(ids: list[int], prompt_length: int, max_length: int, bos: int | None) -> tuple[list[int], int, list[str]]:
    """Truncation of a pair: at most `max_length` ids, how many are the prompt's, and what was lost.

    The prompt's beginning goes first, then the completion's end. BOS stays, or the prompt's last id: something to predict the
    completion from.
    """
    prompt, completion = ids[:prompt_length], ids[prompt_length:]
    kept = completion[: max_length - min(len(prompt), 1)]
    shown = keep_end(prompt, max_length - len(kept), bos)
    lost = []
    if len(shown) < len(prompt):
        lost.append(WHOLE_PROMPT if shown in ([], [bos]) else PROMPT_BEGIN)
    if len(kept) < len(completion):
        lost.append(COMPLETION_END)
    return shown + kept, len(shown), lost


def keep_end(ids: list[int], room: int, bos: int | None) -> list[int]:
    """Truncation: the last `room` ids, with the BOS id kept at the front where there was one."""
    if len(ids) <= room:
        return ids
    if ids[0] == bos and room > 0:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]
