"""Generation: greedy decoding of answers with a (sharded) model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cola_ds.data.batch import PADDING, Encoded
from cola_ds.distributed import accelerator, watchdog
from cola_ds.distributed.engine import Engine
from cola_ds.errors import UserError
from cola_ds.evaluation.shares import over_shares


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

    def answer(indices: list[int]) -> list[str | None]:
        found = generate_ids(engine, [examples[i].prompt_ids for i in indices], stop_ids, max_new_tokens)
        return [None if ids is None else decode(ids) for ids in found]

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.partition("\n")[0].strip()

    return over_shares(engine, lengths, batch_size, stop, answer)


def generate_ids(
    engine: Engine, prompts: list[list[int]], stop_ids: list[int], max_new_tokens: int
) -> list[list[int] | None]:
    """The most likely ids after each prompt, up to the first of `stop_ids` and with it; None where a logit was NaN. Collective:
    each process has its own prompts, or none; inside `evaluating`.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    rows = prompts or [[PADDING]]  # a process without prompts runs the forward passes of the others
    width = max(map(len, rows))
    input_ids = torch.tensor([[PADDING] * (width - len(ids)) + ids for ids in rows])  # (B, T)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    greedy = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens if prompts else 1,
        eos_token_id=stop_ids,
        pad_token_id=PADDING,
    )
    lost = torch.zeros(len(rows), dtype=torch.bool, device=accelerator.device())

    def note_nan(ids: Tensor, logits: Tensor) -> Tensor:
        lost.logical_or_(logits.isnan().any(dim=-1))
        return logits

    with _plain_generation(engine.module):
        found = engine.module.generate(
            input_ids=input_ids.to(accelerator.device()),
            attention_mask=attention_mask.to(accelerator.device()),
            generation_config=greedy,
            logits_processor=LogitsProcessorList([note_nan]),
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
