"""Chain of LoRA: algorithm 1 of COLA (arXiv 2401.04151) on a DeepSpeed engine.

    for each link:
        tune_lora       update A and B only, until the link's knot
        tie_knot        W <- W + scaling * B A
        extend_chain    fresh A and B, and a fresh optimizer around them

One link is LoRA. Without adapters (method full) the same loop trains every weight, and there is nothing to tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cola_ds.data.ahead import Ahead
from cola_ds.data.batch import StepExamples
from cola_ds.distributed import accelerator, collectives, signals, watchdog
from cola_ds.distributed.engine import Engine, set_learning_rate
from cola_ds.evaluation.loss import loss_sum
from cola_ds.training.knot import pass_knot
from cola_ds.training.optim import learning_rate
from cola_ds.training.place_start import place_start
from cola_ds.training.plateau import begin_losses, take_step_loss
from cola_ds.training.save import checkpoint_is_due, save_checkpoint, stop_here
from cola_ds.training.skips import check_skips, record_skipped_step
from cola_ds.training.state import Chain, position, step_examples
from cola_ds.training.validation import evaluate_if_due
from cola_ds.training.watch import watch_if_due


def run_chain(chain: Chain) -> None:
    """Tune, tie, extend, until the last link is tied. Collective, as is all below.

    A chain that was restored from a checkpoint goes on wherever its state says that it is. Raises StoppedError when a signal
    asked for it, TrainingFailedError when losses, gradients or adapters are not finite.
    """
    if chain.config.trains_lora and not chain.restored:
        place_start(chain, 1)
    chain.logger.restart_clock()  # a start, as a knot, is no step's time
    evaluate_if_due(chain)  # one that was stopped in the evaluation at which it had arrived
    watch_if_due(chain)
    while chain.state.link <= chain.links:
        tune_lora(chain)
        if chain.config.trains_lora:
            pass_knot(chain)
        chain.state.link += 1
        chain.state.step_in_link = chain.state.skipped_in_link = 0
        chain.state.link_tokens.append(0)
        begin_losses(chain)
        evaluate_if_due(chain)  # of the merged weights: what an export holds
        watch_if_due(chain)


def tune_lora(chain: Chain) -> None:
    """Train the current link up to its knot."""
    state, optim = chain.state, chain.config.optim
    to_come = range(state.step, chain.step_plan.knots[state.link - 1])  # it may end earlier
    with Ahead(lambda step: step_examples(chain, step), to_come, accelerator.device()) as ahead:
        while state.step < chain.step_plan.knots[state.link - 1]:
            watchdog.heartbeat("examples", step=state.step + 1)
            examples, waited_s = ahead.take(state.step)
            lr = learning_rate(optim, chain.step_plan, state.link, state.step_in_link)
            loss = train_step(chain.engine, examples, lr, chain.world_size)
            # One answer for all: a signal or a bad loss of any process is one of the run, and the device is waited for once.
            stop, loss_is_bad = collectives.all_reduce_max([signals.requested(), ~torch.isfinite(loss)])
            state.step += 1
            state.step_in_link += 1
            state.examples_seen += examples.examples
            state.link_tokens[-1] += examples.tokens
            record_skipped_step(chain, examples, bool(loss_is_bad))
            take_step_loss(chain, loss, bool(loss_is_bad))  # the loss may place the knot here
            chain.logger.step(
                position(chain), None if loss_is_bad else loss, examples, waited_s,
                now=state.step in chain.step_plan.knots, lr=lr, grad_norm=chain.engine.get_global_grad_norm(),
                skipped_steps=state.skipped_steps,
            )  # fmt: skip
            check_skips(chain)  # after the row, which shows what it gives up over
            if stop:
                stop_here(chain, int(stop))
            if checkpoint_is_due(chain):
                save_checkpoint(chain)
            evaluate_if_due(chain)


def train_step(engine: Engine, examples: StepExamples, lr: float, world_size: int) -> Tensor:
    """One optimizer update. Returns this process's share of the step's loss, () on its device.

    The loss is the mean over the labelled tokens (the examples, where candidates are compared) of the whole global batch, so that
    neither accumulation nor the number of processes weighs them differently.
    """
    set_learning_rate(engine, lr)
    share = torch.zeros((), device=accelerator.device())
    micro_batches = [batch.to(accelerator.device()) for batch in examples.micro_batches]
    for number, batch in enumerate(micro_batches, start=1):
        watchdog.heartbeat(f"micro batch {number}")
        loss = loss_sum(engine, batch) / max(examples.loss_tokens, 1)
        share += loss.detach()
        # The engine divides by the micro steps, and averages over processes: undo both, the sum is the mean wanted.
        engine.backward(loss * (len(micro_batches) * world_size))
        engine.step()
    return share
