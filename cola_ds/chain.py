"""Chain of LoRA: algorithm 1 of COLA (arXiv 2401.04151) on a DeepSpeed engine.

    for each link:
        tune_lora       update A and B only, until the link's knot
        tie_knot        W <- W + scaling * B A
        extend_chain    fresh A and B, and a fresh optimizer around them

One link is LoRA. Without adapters (method full) the same loop trains every weight, and there is nothing to tie.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cola_ds import processes, signals, watch, zero
from cola_ds.checkpoint import CheckpointFolder
from cola_ds.config import RunConfig, Timetable
from cola_ds.data.batching import Batch, Batcher, StepExamples
from cola_ds.data.packing import PackedBatch
from cola_ds.errors import StoppedError, TrainingFailedError
from cola_ds.evaluate import HeldOut, TaskScore, held_out_loss, loss_sum
from cola_ds.journal import Journal
from cola_ds.lora import lora_layers, start_link
from cola_ds.optim import learning_rate, make_optimizer
from cola_ds.rundir import RunFolder
from cola_ds.tie import link_is_finite, overlap, restart_link, tie_link


@dataclass
class ChainState:
    """All that changes while a chain runs, besides the engine. Steps are optimizer updates, those left out included."""

    link: int = 1
    """The one that is being tuned; length + 1 when the last is tied."""
    step: int = 0
    step_in_link: int = 0
    examples_seen: int = 0
    link_tokens: list[int] = field(default_factory=lambda: [0])
    """Tokens that each link was trained on so far."""
    skipped_steps: int = 0
    """Updates that were left out because the loss or a gradient was not finite."""
    skipped_in_link: int = 0
    skipped_in_a_row: int = 0
    evaluated_step: int = 0
    """The step after which the last evaluation was."""
    best_step: int = 0
    best: float = math.inf
    """The lowest held-out loss or, of a task, the highest dev score with its sign turned; and the step it was found after."""
    no_better: int = 0
    """Evaluations since then."""
    ended_step: int | None = None
    """Where eval.patience has ended the run."""
    change_square: float = 0.0
    """Squared norm of all links' sum: of the change of the base weights that was wanted; below 0 where not known. On process 0
    alone."""
    link_hashes: list[str] = field(default_factory=list)
    """SHA-256 of each tied link's file. On process 0 alone."""
    remainders: dict[str, Tensor] = field(default_factory=dict)
    """By target layer in bf16 or fp16, on the host: what rounding has kept out of the weights that this process ties, fp32."""


@dataclass
class Chain:
    """A chain on its way: the engine, what it learns from, and how far it is."""

    config: RunConfig
    base: str
    """The base model's fingerprint."""
    timetable: Timetable
    engine: zero.Engine
    engine_config: dict[str, Any]
    world_size: int
    train: Batcher
    held_out: Batcher | None
    score: Callable[[zero.Engine, str, Callable[[], bool]], TaskScore | None] | None
    """Of a task: scores its "dev" or "test" split (collective); None when it was stopped."""
    journal: Journal
    folder: RunFolder | None
    """Takes the tied links; None on every process but 0."""
    state: ChainState = field(default_factory=ChainState)
    save: Callable[[Chain], str | None] = lambda chain: None
    """Writes a checkpoint (collective), and returns what was wrong if it could not."""

    @property
    def links(self) -> int:
        """Its length: chain.length, unless eval.patience has ended it before."""
        return len(self.timetable.knots)


def run_chain(chain: Chain) -> None:
    """Tune, tie, extend, until the last link is tied. Collective, as is all below.

    A chain that was restored from a checkpoint goes on wherever its state says that it is. Raises StoppedError when a signal
    asked for it, TrainingFailedError when losses, gradients or adapters are not finite.
    """
    chain.journal.restart_clock()
    evaluate_if_due(chain)
    while chain.state.link <= chain.links:
        tune_lora(chain)
        if chain.config.trains_lora:
            pass_knot(chain)
        chain.state.link += 1
        chain.state.step_in_link = chain.state.skipped_in_link = 0
        chain.state.link_tokens.append(0)
        evaluate_if_due(chain)  # of the merged weights: what an export holds


def tune_lora(chain: Chain) -> None:
    """Train the current link up to its knot."""
    state, optim = chain.state, chain.config.optim
    while state.step < chain.timetable.knots[state.link - 1]:
        watch.beat("examples", step=state.step + 1)
        examples = step_examples(chain, state.step)
        lr = learning_rate(optim, chain.timetable, state.link, state.step_in_link)
        loss = train_step(chain.engine, examples, lr, chain.world_size)
        stop, loss_is_bad = processes.largest_of_processes([signals.requested(), ~torch.isfinite(loss)])
        state.step += 1
        state.step_in_link += 1
        state.examples_seen += examples.examples
        state.link_tokens[-1] += examples.tokens
        take_note_of_skips(chain, examples, bool(loss_is_bad))
        chain.journal.step(
            position(chain), None if loss_is_bad else loss, examples, now=state.step in chain.timetable.knots,
            lr=lr, grad_norm=chain.engine.get_global_grad_norm(), skipped_steps=state.skipped_steps,
        )  # fmt: skip
        check_skips(chain)
        if stop:
            stop_here(chain, int(stop))
        if checkpoint_is_due(chain):
            save_checkpoint(chain)
        evaluate_if_due(chain)


def pass_knot(chain: Chain) -> None:
    """Tie the link and, unless it is the last, start the next."""
    state = chain.state
    watch.beat(f"knot of link {state.link}")
    batch = last_batch(chain)
    loss_before = batch_loss(chain, batch)
    knot = tie_knot(chain)
    losses = {"loss_before": loss_before, "loss_after": batch_loss(chain, batch)}
    rebuild_s = extend_chain(chain) if state.link < chain.links else None
    chain.journal.knot({**knot, **losses, "rebuild_s": rebuild_s})


def step_examples(chain: Chain, step: int) -> StepExamples:
    """This process's share of the examples of a step, counted from 0."""
    optim = chain.config.optim
    return chain.train.step(step, chain.config.run.seed, optim.global_batch_size, optim.micro_batch_size)


def last_batch(chain: Chain) -> Batch | PackedBatch:
    """The first micro batch of the last step, on this process's device: where examples ran out, the later ones count nothing."""
    return step_examples(chain, chain.state.step - 1).micro_batches[0].to(processes.device())


def train_step(engine: zero.Engine, examples: StepExamples, lr: float, world_size: int) -> Tensor:
    """One optimizer update. Returns this process's share of the step's loss, () on its device.

    The loss is the mean over the labelled tokens (the examples, where candidates are compared) of the whole global batch, so that
    neither accumulation nor the number of processes weighs them differently.
    """
    zero.set_learning_rate(engine, lr)
    share = torch.zeros((), device=processes.device())
    micro_batches = [batch.to(processes.device()) for batch in examples.micro_batches]
    for number, batch in enumerate(micro_batches, start=1):
        watch.beat(f"micro batch {number}")
        loss = loss_sum(engine, batch) / max(examples.loss_tokens, 1)
        share += loss.detach()
        # The engine divides by the micro steps, and averages over processes: undo both, the sum is the mean wanted.
        engine.backward(loss * (len(micro_batches) * world_size))
        engine.step()
    return share


def tie_knot(chain: Chain) -> dict[str, Any]:
    """Merge the link into the base weights, W <- W + scaling * B A, and save it. Returns the knot's figures.

    B is zero afterwards, so the outputs are what they were and a second tie would add nothing. The optimizer's masters still
    hold the old link: extend_chain, or the end of the run, must follow before any other step. Parameters must be in their
    shards, as `zero.evaluating` leaves them.
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
        shared = chain.journal.figure("rounding_error", lambda: _shared_with_earlier(chain, folder, tied.tensors))
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
        "peak_memory_bytes": int(processes.max_over_processes(processes.peak_memory_bytes())),
    }


def _shared_with_earlier(chain: Chain, folder: RunFolder, tensors: dict[str, Tensor]) -> float:
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
        zero.restart_optimizer(chain.engine)
    else:
        start_link(model, link, lora_rank, config.lora.alpha, config.run.seed, processes.device())
        chain.engine = zero.rebuild_engine(chain.engine, chain.engine_config, partial(make_optimizer, config.optim))
        chain.engine.train()
    return time.perf_counter() - begin


def position(chain: Chain) -> dict[str, Any]:
    """Where the chain is, for a row: the link is that of the last step."""
    step = chain.state.step
    return {"step": step, "link": chain.timetable.link_of(step), "epoch": step / chain.timetable.steps_per_epoch}


# -- what is not finite ------------------------------------------------------------------------------------------------


def take_note_of_skips(chain: Chain, examples: StepExamples, loss_is_bad: bool) -> None:
    """Count and report the step that just ended if its update was left out. DeepSpeed leaves it out on all processes alike."""
    state = chain.state
    if chain.engine.was_step_applied():
        if loss_is_bad:
            raise TrainingFailedError(f"the loss of step {state.step} is not finite, but the engine applied its update")
        state.skipped_in_a_row = 0
        return
    state.skipped_steps += 1
    state.skipped_in_link += 1
    what = "a loss is" if loss_is_bad else "the loss is finite, a gradient is"
    if loss_is_bad or chain.config.model.dtype != "fp16":  # in fp16 the loss scale overflows as it is searched for
        state.skipped_in_a_row += 1
        chain.journal.say(
            f"step {state.step}: {what} not finite; its update is left out. Its examples (from 0, in data.train): "
            f"{', '.join(map(str, sorted(examples.indices)))}"
        )
    chain.journal.event("skipped", **position(chain), loss_is_finite=not loss_is_bad, examples=sorted(examples.indices))


def check_skips(chain: Chain) -> None:
    """Raise TrainingFailedError when too many updates in a row, or all of a link, were left out."""
    state, most = chain.state, chain.config.optim.max_skips_in_a_row
    if state.skipped_in_a_row > most:
        raise TrainingFailedError(
            f"{state.skipped_in_a_row} updates in a row were left out up to step {state.step}, as no loss or gradient was finite "
            f"(optim.max_skips_in_a_row is {most}); lower optim.lr or look at the data"
        )
    if state.step == chain.timetable.knots[state.link - 1] and state.skipped_in_link == chain.timetable.link_steps(
        state.link
    ):
        raise TrainingFailedError(
            f"no update of link {state.link} could be applied: no gradient was finite; lower optim.lr"
        )


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint_is_due(chain: Chain) -> bool:
    """Every so many steps, and before the last knot: what follows it, an evaluation say, may take long."""
    step, every = chain.state.step, chain.config.checkpoint.every_steps
    return step == chain.timetable.total_steps or (every is not None and step % every == 0)


def save_checkpoint(chain: Chain) -> bool:
    """Write a checkpoint; whether it was written. Raises TrainingFailedError when it could not be, if the config says so."""
    watch.beat("checkpoint")
    if not chain.config.trains_lora:
        watch.rest()  # a whole model takes as long as it takes
    wrong = chain.save(chain)
    chain.journal.restart_clock()
    if wrong is None:
        return True
    chain.journal.say(f"warning: no checkpoint at step {chain.state.step}: {wrong}")
    if chain.config.checkpoint.on_error == "stop":
        raise TrainingFailedError(f"no checkpoint could be written at step {chain.state.step}: {wrong}")
    return False


def stop_here(chain: Chain, signum: int) -> None:
    """Write a checkpoint and raise StoppedError."""
    name, step = signal.Signals(signum).name, chain.state.step
    if not chain.config.trains:
        raise StoppedError(f"stopped on {name}")
    if chain.state.link > chain.links:  # nothing is left to tie: the checkpoint before the last knot stands
        written = processes.from_process_0(
            chain.folder is not None and CheckpointFolder(chain.folder).at(step).exists()
        )
    else:
        written = save_checkpoint(chain)
    if not written:
        raise TrainingFailedError(f"stopped on {name} at step {step}, but no checkpoint could be written there")
    chain.journal.event("stopped", **position(chain), signal=name)
    raise StoppedError(f"stopped on {name} after step {step}, with a checkpoint")


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluation_is_due(chain: Chain) -> bool:
    """Whether `eval.every` wants an evaluation now. At a knot it comes after it; the end of the run always has one."""
    state, every = chain.state, chain.config.eval.every
    step = state.step
    if chain.held_out is None or step == 0 or state.evaluated_step == step:
        return False
    at_knot = step in chain.timetable.knots
    if at_knot and state.link == chain.timetable.link_of(step):
        return False
    if step == chain.timetable.total_steps:
        return True
    if every == "link":
        return at_knot
    if every == "end":
        return False
    return step % (chain.timetable.steps_per_epoch if every == "epoch" else int(every)) == 0


def evaluate_if_due(chain: Chain) -> None:
    """Evaluate if it is time to, keep a checkpoint of the best, and end the run that has become no better for too long."""
    if not evaluation_is_due(chain):
        return
    found, state, patience = evaluate(chain), chain.state, chain.config.eval.patience
    state.evaluated_step = state.step
    if found < state.best:
        state.best, state.best_step, state.no_better = found, state.step, 0
        # After the last knot there is nothing to save: the checkpoint before it gives the same outputs.
        if chain.config.checkpoint.best and state.link <= chain.links:
            save_checkpoint(chain)
        if chain.config.checkpoint.best and chain.folder:
            CheckpointFolder(chain.folder).mark_best(state.step)
        return
    state.no_better += 1
    if patience is not None and state.no_better >= patience and state.step < chain.timetable.total_steps:
        end_here(chain)


def end_here(chain: Chain) -> None:
    """Make the step that was evaluated the last: its link is tied, and none follows."""
    state = chain.state
    state.ended_step = state.step
    chain.timetable = chain.timetable.ending_at(state.step)
    chain.journal.say(f"ends at step {state.step}: no better than at step {state.best_step} (eval.patience)")
    chain.journal.event("ended early", **position(chain), best_step=state.best_step)
    if state.link <= chain.links:  # as before any last knot
        save_checkpoint(chain)


def evaluate(chain: Chain) -> float:
    """Held-out loss now or, of a task, its dev score with the sign turned; where that is the best so far, its test score too.
    All go into the journal. Raises StoppedError when a signal asks for it."""
    assert chain.held_out is not None
    stop = 0.0

    def stopped() -> bool:
        nonlocal stop
        (stop,) = processes.largest_of_processes([signals.requested()])
        return stop > 0

    found: list[HeldOut | TaskScore | None]
    if chain.score is None:
        batch_size = chain.config.eval.batch_size or chain.config.optim.micro_batch_size
        found = [held_out_loss(chain.engine, chain.held_out, batch_size, stopped)]
    else:
        found = [chain.score(chain.engine, "dev", stopped)]
        if found[0] is not None and found[0].value < chain.state.best:
            found.append(chain.score(chain.engine, "test", stopped))
    for each in found:
        if each is None:
            stop_here(chain, int(stop))
    for each in found:
        assert each is not None
        chain.journal.evaluation(position(chain), each)
    assert found[0] is not None
    return found[0].value


def batch_loss(chain: Chain, batch: Batch | PackedBatch) -> float:
    """Mean loss on one example of each process, without dropout: enough to see a knot go wrong, at a fraction of a step."""
    batch = batch.first()
    with zero.evaluating(chain.engine):
        loss, counted = loss_sum(chain.engine, batch), batch.counted()
    total, count = processes.sum_over_processes(torch.stack([loss, counted.to(loss.dtype)])).tolist()
    return total / max(count, 1)
