"""Encoding: a task's examples as token ids."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cola_ds.data.batch import Encoded
from cola_ds.data.tasks.catalog import Example, strip
from cola_ds.data.tokens import ANSWER_BEGIN, PROMPT_BEGIN, WHOLE_PROMPT, ids_of, keep_end
from cola_ds.errors import UserError


def encode(example: Example, tokenizer: Any, max_length: int = 2048, reserve: int = 0) -> Encoded:
    """Token ids of at most `max_length`, and of the prompt alone of at most `max_length - reserve`.

    Too long a text loses its beginning, but not the BOS id. Special tokens are the tokenizer's, and BOS is there once; but no EOS
    is added at the end.
    """
    if max_length - reserve < 2:
        raise UserError(f"maximum length {max_length} has no room for a prompt beside {reserve} new tokens")
    bos = tokenizer.bos_token_id
    prompt, *whole = ids_of(_texts(example), tokenizer)
    # The same number of ids from all: what remains of the prompt they still share, and it is computed once.
    excess = max(0, max(map(len, whole)) - max_length)
    kept = [keep_end(ids, max(len(ids) - excess, min(len(ids), 2)), bos) for ids in whole]
    kept_prompt = keep_end(prompt, max_length - reserve, bos)
    # By the difference of lengths: a tokenizer may merge the prompt's end with the answer's beginning.
    lengths = [max(1, min(len(w) - len(prompt), len(k) - 1)) for w, k in zip(whole, kept, strict=True)]
    lost = PROMPT_BEGIN if kept_prompt != prompt else ""
    if excess:
        shown = [ids[: len(ids) - count] for ids, count in zip(kept, lengths, strict=True)]
        if any(count < len(ids) - len(prompt) for ids, count in zip(whole, lengths, strict=True)):
            lost = ANSWER_BEGIN
        else:
            lost = WHOLE_PROMPT if [bos] in shown else PROMPT_BEGIN
    return Encoded(kept, lengths, kept_prompt, lost)


def _texts(example: Example) -> list[str]:
    """The prompt, and the prompt with each candidate or with the answer."""
    return [strip(example.prompt + end) for end in ("", *(example.candidates or (example.answer,)))]


def with_demonstrations(
    example: Example, demonstrations: Sequence[Example], tokenizer: Any, max_length: int = 2048, reserve: int = 0
) -> Example:
    """The example with solved ones in front of its prompt: the last of `demonstrations` that fit, whole.

    What must fit is the prompt with each candidate or with the answer or, where that is generated, the prompt and `reserve` new
    tokens.
    """
    shown = [(each.prompt + each.answer).strip() for each in demonstrations]

    def after(first: int) -> Example:
        return replace(example, prompt="\n\n".join([*shown[first:], example.prompt]))

    def fits(first: int) -> bool:
        prompt, *whole = _texts(after(first))
        return max(map(len, ids_of([prompt] if reserve else whole, tokenizer))) + reserve <= max_length

    return after(bisect.bisect_left(range(len(shown)), True, key=fits))
