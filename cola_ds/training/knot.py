"""A knot: the link is tied and, unless it is the last, the next one begins. Collective, as is all here."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cola_ds.data.batch import Batch, PackedBatch
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import evaluating, rebuild_engine, restart_optimizer
from cola_ds.errors import TrainingFailedError
from cola_ds.evaluation.loss import loss_sum
from cola_ds.lora.layers import lora_layers, start_link
from cola_ds.lora.tie import link_is_finite, overlap, restart_link, tie_link
from cola_ds.run.folder import RunDir
from cola_ds.training.optim import make_optimizer
from cola_ds.training.state import Chain, step_examples


def pass_knot(chain: Chain) -> None:
    """Tie the link and, unless it is the last, start the next."""
    state = chain.state
    watchdog.heartbeat(f"knot of link {state.link}")
    batch = last_batch(chain)
    loss_before = batch_loss(chain, batch)
    knot = tie_knot(chain)
    losses = {"loss_before": loss_before, "loss_after": batch_loss(chain, batch)}
    rebuild_s = extend_chain(chain) if state.link < chain.links else None
    chain.logger.knot({**knot, **losses, "rebuild_s": rebuild_s})


def last_batch(chain: Chain) -> Batch | PackedBatch:
    """The first micro batch of the last step, on this process's device: where examples ran out, the later ones count nothing."""
    return step_examples(chain, chain.state.step - 1).micro_batches[0].to(accelerator.device())


def tie_knot(chain: Chain) -> dict[str, Any]:
    """Merge the link into the base weights, W <- W + scaling * B A, and save it. Returns the knot's figures.

    B is zero afterwards, so the outputs are what they were and a second tie would add nothing. The optimizer's masters still
    hold the old link: extend_chain, or the end of the run, must follow before any other step. Parameters must be in their
    shards, as `evaluating` leaves them.
    """
    state, config, folder = chain.state, chain.config, chain.folder
    begin = time.perf_counter()
    if not link_is_finite(chain.engine.module):
        raise TrainingFailedError(
            f"link {state.link} is not finite at step {state.step}; it was neither tied nor saved"
        )
    tied = tie_link(
        chain.engine.module, state.remainders, local=config.chain.tie == "local", exact=config.chain.merge == "exact",
        last=state.link == chain.links, keep_tensors=folder is not None,
    )  # fmt: skip
    if not math.isfinite(tied.delta_square + tied.remainder_square):
        raise TrainingFailedError(
            f"a weight is not finite once link {state.link} is added to it (step {state.step}); the link was not saved"
        )
    if folder:
        shared = chain.logger.figure("rounding_error", lambda: _shared_with_earlier(chain, folder, tied.tensors))
        if shared is None or state.change_square < 0:
            state.change_square = -1.0
        else:
            state.change_square += tied.delta_square + 2 * shared
        try:
            digest = folder.write_link(config, state.link, list(lora_layers(chain.engine.module)), tied.tensors)
            state.link_hashes.append(digest)
        except OSError as error:
            raise TrainingFailedError(
                f"link {state.link} cannot be written: {error.strerror} ({folder.link_path(state.link).parent}); once it can, "
                "the same command goes on from the last checkpoint"
            ) from None
    return {
        "link": state.link,
        "step": state.step,
        "lora_rank": config.lora_ranks[state.link - 1],
        "delta_norm": tied.delta_square**0.5,
        "rounding_error": (tied.remainder_square / state.change_square) ** 0.5 if state.change_square > 0 else math.nan,
        "tie_s": time.perf_counter() - begin,
        "bytes_moved": tied.bytes_moved,
        "peak_memory_bytes": int(collectives.all_reduce_max_of_one(accelerator.peak_memory_bytes())),
    }


def _shared_with_earlier(chain: Chain, folder: RunDir, tensors: dict[str, Tensor]) -> float:
    """Inner product of the link that was just tied and the sum of those before it, which are read again from the folder."""
    config, link = chain.config, chain.state.link
    scalings = [config.lora.alpha / r for r in config.lora_ranks[:link]]
    shared = overlap(tensors, map(folder.read_link, range(1, link)), scalings)
    if not math.isfinite(shared):
        raise ValueError("a link before it is not finite where it lies")
    return shared


def extend_chain(chain: Chain) -> float:
    """Start the next link: fresh A and B, and an optimizer that knows nothing of the old ones. Returns seconds.

    In place where the LoRA rank stays: a rebuilt engine starts alike, but takes 0.4 of a step (tests/bench/knots.py), moves A and
    B twice, and its first step takes longer by as much again.
    """
    begin = time.perf_counter()
    config, model, link = chain.config, chain.engine.module, chain.state.link + 1
    lora_rank = config.lora_ranks[link - 1]
    if lora_rank == config.lora_ranks[link - 2]:
        restart_link(model, link, config.run.seed)
        restart_optimizer(chain.engine)
    else:
        start_link(model, link, lora_rank, config.lora.alpha, config.run.seed, accelerator.device())
        chain.engine = rebuild_engine(chain.engine, chain.engine_config, partial(make_optimizer, config.optim))
        chain.engine.train()
    return time.perf_counter() - begin


def batch_loss(chain: Chain, batch: Batch | PackedBatch) -> float:
    """Mean loss on one example of each process, without dropout: enough to see a knot go wrong, at a fraction of a step."""
    batch = batch.first()
    with evaluating(chain.engine):
        loss, counted = loss_sum(chain.engine, batch), batch.counted()
    total, count = collectives.all_reduce_sum(torch.stack([loss, counted.to(loss.dtype)])).tolist()
    return total / max(count, 1)
