"""Generation: greedy decoding of answers with a (sharded) model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cola_ds.data.batch import PADDING, Encoded
from cola_ds.data.batcher import batches_by_length
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import Engine
from cola_ds.errors import UserError
from cola_ds.evaluation.shares import over_shares

FIRST_TOKENS = 8
"""An answer to a task's question is seldom longer. Where few of a batch go on, they go on later, in fewer and fuller batches."""
_ON_STATIC_SHAPES = ("eager", "sdpa")
"""Attention that takes a mask, and with it a cache with places that are still empty. Another would read it to its end."""


def generate_answers(
    engine: Engine,
    examples: Sequence[Encoded],
    tokenizer: Any,
    batch_size: int,
    stop: Callable[[], bool],
    max_new_tokens: int = 50,
) -> dict[int, str | None] | None:
    """Greedy answers to this process's share of the examples, up to a newline or EOS and stripped, by their places; None where
    the model's outputs are not finite. Collective.

    Each example is one process's; None if `stop`, asked before each batch, says so. Raises UserError for prompts that leave
    no room in the model's positions.
    """
    lengths = [len(example.prompt_ids) for example in examples]
    limit = getattr(engine.module.config.get_text_config(), "max_position_embeddings", None)
    if limit and max(lengths, default=0) + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {max(lengths)} ids and an answer of {max_new_tokens} are more than the model's {limit} positions; "
            "lower data.max_length"
        )
    stop_ids = end_ids(engine.module, tokenizer)

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.partition("\n")[0].strip()

    found = generate_over_shares(engine, [e.prompt_ids for e in examples], batch_size, stop, stop_ids, max_new_tokens)
    return None if found is None else {i: None if ids is None else decode(ids) for i, ids in found.items()}


def generate_over_shares(
    engine: Engine, prompts: list[list[int]], batch_size: int, stop: Callable[[], bool], stop_ids: list[int],
    max_new_tokens: int,
) -> dict[int, list[int] | None] | None:  # fmt: skip
    """The ids of this process's share of the answers, by their places; None if `stop` says so. Collective.

    A batch runs until its longest answer ends. So the few that are still not at an end after FIRST_TOKENS are left, gathered
    from all batches, and go on in a second round, whatever process began them.
    """
    lengths = [len(ids) + max_new_tokens for ids in prompts]  # the places that each takes in the cache
    several = len(list(batches_by_length(lengths, batch_size, engine.world_size))) > 1
    leave_after = FIRST_TOKENS if several and max_new_tokens > FIRST_TOKENS else None

    def begin(indices: list[int]) -> list[list[int] | None]:
        return generate_ids(engine, [prompts[i] for i in indices], stop_ids, max_new_tokens, leave_after)

    def go_on(places: list[int]) -> list[list[int] | None]:
        whole = [prompts[left[place]] + begun[left[place]] for place in places]
        rest = generate_ids(engine, whole, stop_ids, max_new_tokens - FIRST_TOKENS)
        return [ids and begun[left[place]] + ids for place, ids in zip(places, rest, strict=True)]

    found = over_shares(engine, lengths, batch_size, stop, begin)
    if found is None or leave_after is None:
        return found
    ends = set(stop_ids)
    mine = [[i, ids] for i, ids in found.items() if ids and len(ids) == leave_after and ids[-1] not in ends]
    begun: dict[int, list[int]] = {i: ids for pairs in collectives.all_gather_objects(mine) for i, ids in pairs}
    left = sorted(begun)
    rest = over_shares(engine, [lengths[i] for i in left], batch_size, stop, go_on)
    if rest is None:
        return None
    return {i: ids for i, ids in found.items() if i not in begun} | {left[place]: ids for place, ids in rest.items()}


def generate_ids(
    engine: Engine, prompts: list[list[int]], stop_ids: list[int], max_new_tokens: int, leave_after: int | None = None
) -> list[list[int] | None]:
    """The most likely ids after each prompt, up to the first of `stop_ids` and with it; None where a logit was NaN. Collective:
    each process has its own prompts, or none; inside `evaluating`.

    Where fewer than half of the answers go on after `leave_after` ids, they end there.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    rows = prompts or [[PADDING]]  # a process without prompts runs the forward passes of the others
    width = max(map(len, rows))
    input_ids = torch.tensor([[PADDING] * (width - len(ids)) + ids for ids in rows])  # (B, T)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    device = accelerator.device()
    attention = engine.module.config.get_text_config()._attn_implementation
    greedy = GenerationConfig(
        do_sample=False,
        use_cache=True,
        # Places for all new ids at once: no copy of the whole cache at every id, and shapes that stay.
        cache_implementation="static" if attention in _ON_STATIC_SHAPES else None,
        disable_compile=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=PADDING,
    )
    lost = torch.zeros(len(rows), dtype=torch.bool, device=device)
    ends = torch.tensor(stop_ids, dtype=torch.long, device=device)

    def note_nan(ids: Tensor, logits: Tensor) -> Tensor:
        lost.logical_or_(logits.isnan().any(dim=-1))
        return logits

    def leave(ids: Tensor, scores: Any, **_: Any) -> Tensor:  # -> (B,); the host waits for none of it
        if not prompts:
            return torch.ones_like(lost)
        if ids.shape[1] - width != leave_after:
            return torch.zeros_like(lost)
        going_on = ~torch.isin(ids[:, width:], ends).any(dim=1)
        return (2 * going_on.sum() < len(rows)).expand(len(rows))

    with _plain_generation(engine.module):
        found = engine.module.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=greedy,
            logits_processor=LogitsProcessorList([note_nan]),
            stopping_criteria=StoppingCriteriaList([leave]),
            # Under ZeRO-3 all run as many forward passes as the one that needs most: they gather together.
            synced_gpus=engine.world_size > 1,
        )
    answers = found[: len(prompts), width:].tolist()
    return [None if nan else _up_to_stop(row, set(stop_ids)) for row, nan in zip(answers, lost.tolist(), strict=False)]


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Without what the model's folder says of generation, such as sampling or a repetition penalty, inside the block."""
    from transformers import GenerationConfig

    said = model.generation_config
    # Many forward passes in one batch: the watch sees each of them, in the same order on every process.
    beats = model.register_forward_pre_hook(lambda *_: watchdog.heartbeat("generation"))
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = said
        # Transformers would make every later cache as long as the longest so far.
        model.__dict__.pop("_previous_max_cache_length", None)
        beats.remove()


def _up_to_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: EOS, as the tokenizer and the model name it, and all whose text holds a newline."""
    named = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    return sorted(eos | _newline_ids(tokenizer))


@functools.lru_cache(maxsize=1)
def _newline_ids(tokenizer: Any) -> frozenset[int]:
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    return frozenset(token for token, text in zip(ids, texts, strict=True) if "\n" in text)
