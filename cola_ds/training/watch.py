"""Forgetting: the loss on data.watch before the first step and after each knot. It decides nothing. Collective."""

from __future__ import annotations

from cola_ds.evaluation.evaluators import held_out_loss
from cola_ds.run.folder import RunDir
from cola_ds.training.save import can_stop_here, stop_here, stop_is_asked, stop_signal
from cola_ds.training.state import Chain, position


def watch_is_due(chain: Chain) -> bool:
    """Whether there is data.watch, and the chain is before its first step or behind a knot. Asked once at each: no checkpoint
    is written between a look and the next step, so that what goes on from one there has not looked yet."""
    state = chain.state
    behind_knot = state.step in chain.step_plan.knots and state.link > chain.step_plan.link_of(state.step)
    return chain.watched is not None and (state.step == 0 or behind_knot)


def watch_if_due(chain: Chain) -> None:
    """Find the loss on data.watch if it is time to, for watch.jsonl. Raises StoppedError when a signal asks for it, unless
    eval.patience has just ended the run, behind a knot without a checkpoint: then nothing could go on from here."""
    if not watch_is_due(chain):
        return
    assert chain.watched is not None
    chain.logger.stop_clock()
    asked = stop_is_asked if can_stop_here(chain) else lambda: False
    found = held_out_loss(chain.engine, chain.watched, chain.eval_batch_size, asked)
    if found is None:
        stop_here(chain, stop_signal())
        return
    chain.logger.watched({**position(chain), "data": _whose(chain)}, found)


def looked_at_start(chain: Chain, folder: RunDir) -> bool:
    """Whether there is no data.watch, or it has been looked at before the first step: it may be exchanged under way."""
    looks = folder.rows("watch.jsonl", skip_damaged=True)
    return chain.watched is None or any(row["step"] == 0 and row.get("data") == _whose(chain) for row in looks)


def _whose(chain: Chain) -> str | None:
    """What the rows of a data.watch are known by; None on every process but 0."""
    whose = chain.facts.identity.watch if chain.facts else None
    return whose and whose[:16]
