"""What training has cost in floating-point operations: estimated as the paper does, and counted by DeepSpeed's flops profiler."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence

import torch

from cola_ds.data.batch import AnyBatch
from cola_ds.data.text import TokenizedData
from cola_ds.distributed.profiler import forward_flops
from cola_ds.errors import first_line
from cola_ds.lora.layers import inject, start_link
from cola_ds.training.prepared import Prepared, count_adapters

_COUNT_WITHIN_S = 60.0
_EXAMPLES_ALONE = 16  # each takes a forward pass of its own


def training_flops(prepared: Prepared, link_tokens: list[int]) -> int:
    """Of training each link on so many tokens: 6 for each token and each parameter of the model, adapters included, without the
    tables of embeddings.

    That is the estimate of Hugging Face's trainer, and the one in the paper: its table of rank step-down follows from it. Padding
    is left out, and the prompt that an example's candidates share counts once, as it is computed.
    """
    if not prepared.config.trains:
        return 0
    model = prepared.skeleton.num_parameters(exclude_embeddings=True)
    total = 0
    for link, tokens in enumerate(link_tokens, start=1):
        adapters = count_adapters(prepared, link) if tokens and prepared.config.trains_lora else 0
        total += 6 * tokens * (model + adapters)
    return total


def profiled_flops(prepared: Prepared, link_tokens: list[int], joined: bool = False) -> int:
    """Of training each link on so many tokens, as DeepSpeed's profiler counts one forward pass with that link's adapters: every
    matrix product, attention, the output head and padding included. Where examples are `joined` (varlen) there is none.

    The pass is that of the first micro batch, on the meta device: nothing is computed. A backward pass counts as two, though the
    gradients of frozen weights are not computed. So it does where lora.train freezes A or B, too: 0.8% of a step at LoRA rank 16
    on all linear layers of SmolLM2-135M, 0.1% of Llama-3-8B's.

    Raises RuntimeError for a model whose forward pass cannot be counted: one that looks at values, which the meta device has none
    of, or that takes more than a minute.
    """
    if not prepared.config.trains:
        return 0
    return _within(_COUNT_WITHIN_S, lambda: _profiled_flops(prepared, link_tokens, joined))


def _within(limit_s: float, count: Callable[[], int]) -> int:
    """What `count` returns. RuntimeError for whatever goes wrong in it: it runs a model's own code. A thread that takes too long
    is left behind, and goes with the process."""
    found: list[int | BaseException] = []

    def work() -> None:
        try:
            found.append(count())
        except BaseException as error:  # also an exit: it is not this program's
            found.append(error)

    thread = threading.Thread(target=work, name="flops", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not found:
        raise RuntimeError(f"the forward pass on the meta device did not end within {limit_s:g} s")
    if isinstance(found[0], BaseException):
        raise RuntimeError(f"the forward pass on the meta device: {first_line(found[0])}") from found[0]
    return found[0]


def _first_micro_batch(prepared: Prepared, joined: bool) -> tuple[Sequence[AnyBatch], int]:
    """What its forward passes take, and their tokens: rows, packed or padded, in one; with varlen each example by itself."""
    size, data = prepared.config.optim.micro_batch_size, prepared.train
    if prepared.order.capacity is not None and isinstance(data, TokenizedData):
        rows = prepared.order.rows(prepared.config.run.seed, 0).between(0, size)
    else:
        rows = [[index] for index in range(min(size, len(data)))]
    indices = [index for row in rows for index in row]
    batches: Sequence[AnyBatch]
    if joined:
        indices = indices[:_EXAMPLES_ALONE]
        batches = [data.collate([index]) for index in indices]
    elif prepared.order.capacity is not None and isinstance(data, TokenizedData):
        batches = [data.collate_packed(rows)]
    else:
        batches = [data.collate(indices)]
    return batches, sum(int(data.lengths[index]) for index in indices)


def _profiled_flops(prepared: Prepared, link_tokens: list[int], joined: bool) -> int:
    batches, forward_tokens = _first_micro_batch(prepared, joined)
    total, model = 0.0, copy.deepcopy(prepared.skeleton)
    config = prepared.config
    if config.trains_lora:
        inject(model, prepared.targets, dropout=0.0, train_bias=False)
    for link, tokens in enumerate(link_tokens, start=1):
        if tokens:
            if config.trains_lora:
                # What a link starts at stands beside it: products of twice its rank.
                start_link(
                    model,
                    link,
                    config.lora_ranks[link - 1],
                    1.0,
                    0,
                    torch.device("meta"),
                    started=config.starts_elsewhere,
                )
            forward = sum(forward_flops(model, batch.input_ids, batch.positions) for batch in batches)
            total += 3 * forward * tokens / forward_tokens
    return round(total)
