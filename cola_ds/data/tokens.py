"""Texts to token ids. A text is tokenised as a whole, a prompt together with what follows it, since its ids are not always those
of its parts; and the tokenizer's BOS and EOS are there once, where the text has them itself too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

# What examples lose to a maximum length, as it is reported
PROMPT_BEGIN = "the beginning of their prompt"
WHOLE_PROMPT = "their whole prompt"
COMPLETION_END = "the end of their completion"
ANSWER_BEGIN = "their whole prompt and the beginning of their answer"


def ids_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The ids of each text, with the BOS that the tokenizer adds, unless the text begins with its own, and without the EOS that
    it adds."""
    return [ids[_own(ids, tokenizer)] for ids in _tokenized(texts, tokenizer).input_ids]


def closed_ids_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """As `ids_of`, with an EOS at the end, unless that is how the text ends."""
    return [_closed(ids, tokenizer) for ids in ids_of(texts, tokenizer)]


def pairs_of(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[tuple[list[int], int]]:
    """The closed ids of each prompt with its completion, and how many of them are the prompt's.

    An id that has a letter of the completion is the completion's, also where it has some of the prompt as well: what is to be
    learnt is learnt whole. Without a tokenizer that says which letters an id has, the prompt's ids are those with which the
    prompt alone begins too.
    """
    texts = [prompt + completion for prompt, completion in pairs]
    if not getattr(tokenizer, "is_fast", False):
        alone = ids_of([prompt for prompt, _ in pairs], tokenizer)
        whole = ids_of(texts, tokenizer)
        return [(_closed(ids, tokenizer), _alike(prompt, ids)) for prompt, ids in zip(alone, whole, strict=True)]
    found = _tokenized(texts, tokenizer, return_offsets_mapping=True)
    made = []
    for (prompt, _), ids, spans in zip(pairs, found.input_ids, found.offset_mapping, strict=True):
        own = _own(ids, tokenizer)
        begin = next((place for place, (_, end) in enumerate(spans[own]) if end > len(prompt)), len(spans[own]))
        made.append((_closed(ids[own], tokenizer), begin))
    return made


def _tokenized(texts: Sequence[str], tokenizer: Any, **options: bool) -> Any:
    return tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)


def _own(ids: list[int], tokenizer: Any) -> slice:
    """What of a tokenized text stays: all but a second BOS, and the EOS that is added to every text."""
    head, tail = _added(tokenizer)
    doubled = head and head[-1] == tokenizer.bos_token_id and ids[len(head) : len(head) + 1] == head[-1:]
    ends = tail and tail == [tokenizer.eos_token_id]
    return slice(len(head) if doubled else 0, len(ids) - 1 if ends else len(ids))


@functools.lru_cache(maxsize=1)
def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special ids that the tokenizer puts before and after every text."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for before in range(len(whole) - len(bare) + 1):
        if whole[before : before + len(bare)] == bare:
            return whole[:before], whole[before + len(bare) :]
    return [], []


def _closed(ids: list[int], tokenizer: Any) -> list[int]:
    eos, head = tokenizer.eos_token_id, _added(tokenizer)[0]
    own = ids[1:] if head and ids[:1] == head[-1:] else ids  # BOS may be the same token
    return ids if eos is None or own[-1:] == [eos] else [*ids, eos]


def _alike(one: Iterable[int], other: Iterable[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


# Too long


def cut_pair(ids: list[int], prompt_length: int, max_length: int, bos: int | None) -> tuple[list[int], int, list[str]]:
    """At most `max_length` ids, how many are the prompt's, and what was lost: the prompt's beginning first, then the completion's
    end. BOS stays, or the prompt's last id: something to predict the completion from."""
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
    """The last `room` ids, with the BOS id kept at the front where there was one."""
    if len(ids) <= room:
        return ids
    if ids[0] == bos and room > 0:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]
