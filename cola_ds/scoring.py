"""What a (sharded) model makes of a task: the score of each candidate, the loss over them, and greedy answers.

Shapes as in data/packing.py; V is the vocabulary. What runs over the examples of all processes is collective.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_ds import processes, watch, zero
from cola_ds.data.batching import IGNORED, PADDING
from cola_ds.data.packing import PackedBatch, pack, packed_length
from cola_ds.data.tasks import Encoded
from cola_ds.errors import UserError

Result = TypeVar("Result")


# -- candidates --------------------------------------------------------------------------------------------------------


def candidate_scores(model: nn.Module, batch: PackedBatch) -> Tensor:  # -> (B, C), fp32
    """The mean log-probability (nats) of the ids of each candidate's answer; -inf where there is no such candidate.

    `model` is the engine, or the causal LM itself. Logits are computed at the labelled positions only, where the
    architecture offers that.
    """
    logits = _logits(model, batch)  # (B, K, V)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    # Not a scatter: on a GPU the order of its sum, and so the last bit, would change from run to run.
    others = batch.segments[:, :, None] != torch.arange(batch.counts.shape[1], device=losses.device)  # (B, K, C)
    sums = -losses.view_as(batch.labels)[:, :, None].masked_fill(others, 0.0).sum(dim=1)  # (B, C)
    return torch.where(batch.counts > 0, sums / batch.counts.clamp(min=1), -math.inf)


def classification_loss(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Sum over the examples of the cross-entropy (nats) of the right candidate among the scores; 0 if there are none. -> ()"""
    return F.cross_entropy(candidate_scores(model, batch), batch.correct, ignore_index=-1, reduction="sum")


def _logits(model: nn.Module, batch: PackedBatch) -> Tensor:  # -> (B, K, V)
    inner: Any = getattr(model, "module", model)
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask(inner.dtype),
        "use_cache": False,
    }
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        return model(**inputs, logits_to_keep=batch.positions).logits
    return model(**inputs).logits[:, batch.positions]


def score_candidates(
    engine: zero.Engine, examples: Sequence[Encoded], batch_size: int, stop: Callable[[], bool]
) -> dict[int, list[float]] | None:
    """The scores of this process's share of the examples, by their places in `examples`. Collective.

    Each example is one process's; None if `stop`, asked before each batch, says so.
    """

    def score(indices: list[int]) -> list[list[float]]:
        batch = pack([examples[i] for i in indices])
        scores = candidate_scores(engine, batch.to(processes.device())).tolist()
        return [row[: len(examples[i].candidate_ids)] for i, row in zip(indices, scores, strict=False)]

    return _evaluate(engine, [packed_length(example) for example in examples], batch_size, stop, score)


# -- greedy answers ----------------------------------------------------------------------------------------------------


def generate_answers(
    engine: zero.Engine,
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

    return _evaluate(engine, lengths, batch_size, stop, answer)


def generate_ids(
    engine: zero.Engine, prompts: list[list[int]], stop_ids: list[int], max_new_tokens: int
) -> list[list[int] | None]:
    """The most likely ids after each prompt, up to the first of `stop_ids` and with it; None where a logit was NaN. Collective:
    each process has its own prompts, or none; inside `zero.evaluating`.
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
    lost = torch.zeros(len(rows), dtype=torch.bool, device=processes.device())

    def note_nan(ids: Tensor, logits: Tensor) -> Tensor:
        lost.logical_or_(logits.isnan().any(dim=-1))
        return logits

    with _plain_generation(engine.module):
        found = engine.module.generate(
            input_ids=input_ids.to(processes.device()),
            attention_mask=attention_mask.to(processes.device()),
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
    beats = model.register_forward_pre_hook(lambda *_: watch.beat("generation"))
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


# -- examples over processes -------------------------------------------------------------------------------------------


def _evaluate(
    engine: zero.Engine,
    lengths: list[int],
    batch_size: int,
    stop: Callable[[], bool],
    work: Callable[[list[int]], list[Result]],
) -> dict[int, Result] | None:
    """What `work` makes of this process's examples, by index; every process calls it as often, if need be without any."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)  # of like length together: less padding, less waiting
    width = batch_size * engine.world_size
    found: dict[int, Result] = {}
    with zero.evaluating(engine):
        for start in range(0, len(order), width):
            if stop():
                return None
            watch.beat("evaluation")
            mine = order[start : start + width][engine.global_rank :: engine.world_size]
            found.update(zip(mine, work(mine), strict=True))
    return found


def total(numbers: Iterable[float]) -> float:
    """The sum of one number an example over the examples of all processes, in fp64. Collective."""
    mine = torch.tensor(math.fsum(numbers), dtype=torch.float64, device=processes.device())
    return float(processes.sum_over_processes(mine).item())
