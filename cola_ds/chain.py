"""Chain of LoRA: algorithm 1 of COLA (arXiv 2401.04151) on a DeepSpeed engine.

    for each link:
        tune_lora       update A and B only, until the link's knot
        tie_knot        W <- W + scaling * B A
        extend_chain    fresh A and B, and a fresh optimizer around them

One link is LoRA. Without adapters (method full) the same loop trains every weight, and there is nothing to tie.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cola_ds import zero
from cola_ds.config import RunConfig, Timetable
from cola_ds.data.batching import Batch, Batcher, StepExamples
from cola_ds.errors import TrainingFailedError
from cola_ds.evaluate import HeldOut, held_out_loss, loss_sum
from cola_ds.journal import Journal
from cola_ds.lora import lora_layers, start_link
from cola_ds.optim import learning_rate, make_optimizer
from cola_ds.rundir import RunFolder
from cola_ds.tie import overlap, restart_link, tie_link


@dataclass
class ChainState:
    """All that changes while a chain runs, besides the engine. Steps are finished optimizer updates."""

    link: int = 1
    step: int = 0
    step_in_link: int = 0
    examples_seen: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    """Updates that the engine left out because gradients overflowed (fp16, bf16)."""
    remainders: dict[str, Tensor] = field(default_factory=dict)
    """By target layer in bf16 or fp16, on the host: what rounding has kept out of the weights that this process ties, fp32."""
    change_square: float = 0.0
    """Squared norm of all links' sum: of the change of the base weights that was wanted. On process 0 alone."""


@dataclass
class Chain:
    """A chain on its way: the engine, what it learns from, and how far it is."""

    config: RunConfig
    timetable: Timetable
    engine: zero.Engine
    engine_config: dict[str, Any]
    world_size: int
    train: Batcher
    held_out: Batcher | None
    journal: Journal
    folder: RunFolder | None
    """Takes the tied links; None on every process but 0."""
    state: ChainState = field(default_factory=ChainState)


def run_chain(chain: Chain) -> None:
    """Tune, tie, extend, until the last link is tied. Collective, as is all below."""
    length, state = chain.config.chain.length, chain.state
    chain.journal.restart_clock()
    while state.step < chain.timetable.total_steps:
        batch = tune_lora(chain)
        if chain.config.trains_lora:
            loss_before = batch_loss(chain, batch)
            knot = tie_knot(chain)
            losses = {"loss_before": loss_before, "loss_after": batch_loss(chain, batch)}
            rebuild_s = extend_chain(chain) if state.link < length else None
            chain.journal.knot({**knot, **losses, "rebuild_s": rebuild_s})
        if evaluation_is_due(chain, at_knot=True):  # of the merged weights: what an export holds
            evaluate(chain)
        if state.link < length:
            state.link, state.step_in_link = state.link + 1, 0


def tune_lora(chain: Chain) -> Batch:
    """Train the current link up to its knot. Returns a micro batch of its last step.

    Raises TrainingFailedError when the engine had to leave out every update.
    """
    state, timetable, optim = chain.state, chain.timetable, chain.config.optim
    knot, skipped_before = timetable.knots[state.link - 1], state.skipped_steps
    while state.step < knot:
        examples = chain.train.step(state.step, chain.config.run.seed, optim.global_batch_size, optim.micro_batch_size)
        lr = learning_rate(optim, timetable, state.link, state.step_in_link)
        loss, batch = train_step(chain.engine, examples, lr, chain.world_size)
        state.step += 1
        state.step_in_link += 1
        state.examples_seen += examples.examples
        state.tokens_seen += examples.tokens
        state.skipped_steps += not chain.engine.was_step_applied()
        chain.journal.step(
            position(chain), loss, examples, now=state.step == knot,
            lr=lr, grad_norm=chain.engine.get_global_grad_norm(), skipped_steps=state.skipped_steps,
        )  # fmt: skip
        if state.step < knot and evaluation_is_due(chain, at_knot=False):
            evaluate(chain)
    if state.skipped_steps - skipped_before == timetable.link_steps(state.link):
        raise TrainingFailedError(
            f"no update of link {state.link} could be applied: no gradient was finite; lower optim.lr"
        )
    return batch


def train_step(engine: zero.Engine, examples: StepExamples, lr: float, world_size: int) -> tuple[Tensor, Batch]:
    """One optimizer update. Returns this process's share of the step's loss, () on its device, and a micro batch of it.

    The loss is the mean over the labelled tokens of the whole global batch, so that neither accumulation nor the number of
    processes weighs tokens differently.
    """
    zero.set_learning_rate(engine, lr)
    share = torch.zeros((), device=zero.device())
    micro_batches = [batch.to(zero.device()) for batch in examples.micro_batches]
    for batch in micro_batches:
        loss = loss_sum(engine, batch) / max(examples.loss_tokens, 1)
        share += loss.detach()
        # The engine divides by the micro steps, and averages over processes: undo both, the sum is the mean wanted.
        engine.backward(loss * (len(micro_batches) * world_size))
        engine.step()
    return share, micro_batches[0]  # the first: where examples ran out, the later ones count nothing


def tie_knot(chain: Chain) -> dict[str, Any]:
    """Merge the link into the base weights, W <- W + scaling * B A, and save it. Returns the knot's figures.

    B is zero afterwards, so the outputs are what they were and a second tie would add nothing. The optimizer's masters still
    hold the old link: extend_chain, or the end of the run, must follow before any other step. Parameters must be in their
    shards, as `zero.evaluating` leaves them.
    """
    state, config, folder = chain.state, chain.config, chain.folder
    begin = time.perf_counter()
    tied = tie_link(
        chain.engine.module, state.remainders, local=config.chain.tie == "local", exact=config.chain.merge == "exact",
        last=state.link == config.chain.length, keep_tensors=folder is not None,
    )  # fmt: skip
    if not math.isfinite(tied.delta_square + tied.remainder_square):
        raise TrainingFailedError(
            f"link {state.link}, or a weight that it was added to, is not finite (step {state.step}); it was not saved"
        )
    if folder:
        earlier = map(folder.read_link, range(1, state.link))
        state.change_square += tied.delta_square + 2 * overlap(
            tied.tensors, earlier, [config.lora.alpha / r for r in config.lora_ranks[: state.link]]
        )
        folder.write_link(config, state.link, list(lora_layers(chain.engine.module)), tied.tensors)
    return {
        "link": state.link,
        "step": state.step,
        "lora_rank": config.lora_ranks[state.link - 1],
        "delta_norm": tied.delta_square**0.5,
        "rounding_error": (tied.remainder_square / state.change_square) ** 0.5 if state.change_square > 0 else math.nan,
        "tie_s": time.perf_counter() - begin,
        "bytes_moved": tied.bytes_moved,
        "peak_memory_bytes": int(zero.max_over_processes(zero.peak_memory_bytes())),
    }


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
        zero.restart_optimizer(chain.engine)
    else:
        start_link(model, link, lora_rank, config.lora.alpha, config.run.seed, zero.device())
        chain.engine = zero.rebuild_engine(chain.engine, chain.engine_config, partial(make_optimizer, config.optim))
        chain.engine.train()
    return time.perf_counter() - begin


def position(chain: Chain) -> dict[str, Any]:
    """Where the chain is, for a row."""
    state = chain.state
    return {"step": state.step, "link": state.link, "epoch": state.step / chain.timetable.steps_per_epoch}


def evaluation_is_due(chain: Chain, at_knot: bool) -> bool:
    """Whether `eval.every` wants an evaluation after this step; the end of the run always does."""
    if chain.held_out is None:
        return False
    step, every = chain.state.step, chain.config.eval.every
    if step == chain.timetable.total_steps:
        return True
    if every == "link":
        return at_knot
    if every == "end":
        return False
    return step % (chain.timetable.steps_per_epoch if every == "epoch" else int(every)) == 0


def evaluate(chain: Chain) -> HeldOut:
    """Held-out loss now; it goes into the journal too."""
    assert chain.held_out is not None
    found = held_out_loss(
        chain.engine, chain.held_out, chain.config.eval.batch_size or chain.config.optim.micro_batch_size
    )
    chain.journal.evaluation(position(chain), found)
    return found


def batch_loss(chain: Chain, batch: Batch) -> float:
    """Mean loss on one example of each process, without dropout: enough to see a knot go wrong, at a fraction of a step."""
    batch = batch.first()
    with zero.evaluating(chain.engine):
        loss, tokens = loss_sum(chain.engine, batch), (batch.labels >= 0).sum()
    total, count = zero.sum_over_processes(torch.stack([loss, tokens.to(loss.dtype)])).tolist()
    return total / max(count, 1)
