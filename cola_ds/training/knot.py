"""A knot: the link is tied and, unless it is the last, the next one begins. Collective, as is all here."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from cola_ds.data.batch import AnyBatch
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import evaluating, rebuild_engine, restart_optimizer
from cola_ds.distributed.moments import prune_moments
from cola_ds.distributed.nodes import check_alike
from cola_ds.errors import TrainingFailedError
from cola_ds.evaluation.loss import loss_sum
from cola_ds.lora.layers import frozen_factors, lora_layers, set_scaling
from cola_ds.lora.starts import begin_link
from cola_ds.lora.targets import any_transposed
from cola_ds.lora.tie import TiedLink, link_is_finite, restart_link, tie_link
from cola_ds.training.diagnostics import diagnose
from cola_ds.training.optim import optimizer_of
from cola_ds.training.place_start import place_start
from cola_ds.training.plateau import why_ended
from cola_ds.training.state import Chain, step_examples


def pass_knot(chain: Chain) -> None:
    """Tie the link and, unless it is the last, start the next."""
    state = chain.state
    watchdog.heartbeat(f"knot of link {state.link}")
    chain.logger.stop_clock()
    batch = last_batch(chain)
    loss_before = batch_loss(chain, batch)
    knot = tie_knot(chain)
    knot |= {"loss_before": loss_before, "loss_after": batch_loss(chain, batch)}
    if chain.config.chain.diagnostics:
        knot |= diagnose(chain)
    if state.link < chain.links:
        knot |= _prune(chain)
    rebuild_s = extend_chain(chain) if state.link < chain.links else None
    chain.logger.knot({**knot, "rebuild_s": rebuild_s})


def last_batch(chain: Chain) -> AnyBatch:
    """The first micro batch of the last step, on this process's device: where examples ran out, the later ones count nothing."""
    return step_examples(chain, chain.state.step - 1).micro_batches[0].to(accelerator.device())


def tie_knot(chain: Chain) -> dict[str, Any]:
    """Merge the link into the base weights, W <- W + scaling * B A, and save it. Returns the knot's row.

    B is zero afterwards, so the outputs are what they were, unless chain.merge_weight has tied less of the link; a second tie
    would add nothing. The optimizer's masters still hold the old link: extend_chain, or the end of the run, must follow before
    any other step. Parameters must be in their shards, as `evaluating` leaves them.
    """
    begin = time.perf_counter()
    _check_link(chain)
    tied = _tie(chain)
    if chain.state.change_square >= 0:
        chain.state.change_square += tied.delta_square + 2 * tied.shared
    _write_link(chain, tied)
    return _row(chain, tied, begin)


def _check_link(chain: Chain) -> None:
    """Raise TrainingFailedError before anything is changed, where the link is not finite, or not the same on all nodes."""
    state = chain.state
    if not link_is_finite(chain.engine.module):
        raise TrainingFailedError(
            f"link {state.link} is not finite at step {state.step}; it was neither tied nor saved"
        )
    if chain.in_nodes:
        check_alike(chain.engine.module, frozen_factors(chain.engine.module).values(), state.step)


def _tie(chain: Chain) -> TiedLink:
    state, config, model = chain.state, chain.config.chain, chain.engine.module
    set_scaling(model, chain.config.tied_alpha(state.link) / chain.config.tied_rank(state.link))
    tied = tie_link(
        model, state.remainders, state.earlier, local=config.tie == "local", exact=config.merge == "exact",
        last=state.link == chain.links, keep_tensors=chain.folder is not None, looked_at=config.diagnostics,
    )  # fmt: skip
    if not math.isfinite(tied.delta_square + tied.remainder_square):
        raise TrainingFailedError(
            f"a weight is not finite once link {state.link} is added to it (step {state.step}); the link was not saved"
        )
    return tied


def _write_link(chain: Chain, tied: TiedLink) -> None:
    """Write the link's PEFT adapter; on process 0 alone."""
    state, folder = chain.state, chain.folder
    if folder is None:
        return
    model = chain.engine.module
    layers = list(lora_layers(model))
    try:
        digest = folder.write_link(chain.config, state.link, layers, tied.tensors, any_transposed(model, layers))
    except OSError as error:
        raise TrainingFailedError(
            f"link {state.link} cannot be written: {error.strerror} ({folder.link_path(state.link).parent}); once it can, "
            "the same command goes on from the last checkpoint"
        ) from None
    state.link_hashes.append(digest)


def _row(chain: Chain, tied: TiedLink, begin: float) -> dict[str, Any]:
    """What knots.jsonl says of the tie. Collective."""
    state = chain.state
    return {
        "link": state.link,
        "step": state.step,
        "lora_rank": chain.config.lora_ranks[state.link - 1],
        "delta_norm": tied.delta_square**0.5,
        "rounding_error": (tied.remainder_square / state.change_square) ** 0.5 if state.change_square > 0 else math.nan,
        "tie_s": time.perf_counter() - begin,
        "bytes_moved": tied.bytes_moved,
        "peak_memory_bytes": int(collectives.all_reduce_max([accelerator.peak_memory_bytes()])[0]),
        **why_ended(chain),
    }


def extend_chain(chain: Chain) -> float:
    """Start the next link: fresh A and B, and an optimizer that knows nothing of the old ones but what
    chain.optimizer_at_knot keeps. Returns seconds.

    In place where the LoRA rank, and what is trained, stay: a rebuilt engine starts alike, but takes 0.4 of a step
    (tests/bench/knots.py), moves A and B twice, and its first step takes longer by as much again.
    """
    begin = time.perf_counter()
    config, model, link = chain.config, chain.engine.module, chain.state.link + 1
    before, after = ((config.lora_ranks[each - 1], config.lora_trains[each - 1]) for each in (link - 1, link))
    in_place = before == after
    if in_place:
        restart_link(
            model, chain.drawn_before + link, config.alpha_of(link), config.run.seed, config.lora.init,
            config.lora_trains[link - 1],
        )  # fmt: skip
    else:
        begin_link(model, config, link, accelerator.device(), chain.drawn_before)
        chain.engine = rebuild_engine(chain.engine, chain.engine_config, optimizer_of(config.optim, model))
        chain.engine.train()
    moved = place_start(chain, link)
    if in_place or moved:
        restart_optimizer(chain.engine, keep_state=config.chain.optimizer_at_knot != "reset")
    return time.perf_counter() - begin


def _prune(chain: Chain) -> dict[str, Any]:
    """Prune the optimizer's moments where chain.optimizer_at_knot says so. Returns what the knot's row says of it."""
    at_knot = chain.config.chain.optimizer_at_knot
    if isinstance(at_knot, str):
        return {}
    return {"moments_zeroed": prune_moments(chain.engine, at_knot["prune"])}


def batch_loss(chain: Chain, batch: AnyBatch) -> float:
    """Mean loss on one row of each process, without dropout: enough to see a knot go wrong, at a fraction of a step."""
    batch = batch.first()
    with evaluating(chain.engine):
        loss, counted = loss_sum(chain.engine, batch), batch.counted()
    total, count = collectives.all_reduce_sum(torch.stack([loss, counted.to(loss.dtype)])).tolist()
    return total / max(count, 1)
