"""Validation under way: when it is due, what the best is, and when eval.patience ends the run. Collective."""

from __future__ import annotations

from cola_ds.checkpoint.store import CheckpointFolder
from cola_ds.data.tasks.dataset import TaskData
from cola_ds.evaluation.evaluators import HeldOut, TaskScore, held_out_loss, task_score
from cola_ds.training.plateau import evaluation_ends_link, take_evaluation
from cola_ds.training.save import save_checkpoint, stop_here, stop_is_asked, stop_signal
from cola_ds.training.state import Chain, position


def evaluation_is_due(chain: Chain) -> bool:
    """Whether `eval.every` wants an evaluation now. At a knot it comes after it; the end of the run always has one."""
    state, every = chain.state, chain.config.eval.every
    step = state.step
    if chain.held_out is None or step == 0 or state.evaluated_step == step:
        return False
    at_knot = step in chain.step_plan.knots
    if at_knot and state.link == chain.step_plan.link_of(step):
        return False
    if step == chain.step_plan.total_steps:
        return True
    if every == "link":
        return at_knot
    if every == "end":
        return False
    if every == "epoch":
        return chain.step_plan.epochs.locate(step)[1] == 0
    return step % int(every) == 0


def evaluate_if_due(chain: Chain) -> None:
    """Evaluate if it is time to, keep a checkpoint of the best, and end the run that has become no better for too long."""
    if not evaluation_is_due(chain):
        return
    found, state, patience = evaluate(chain), chain.state, chain.config.eval.patience
    if found is None:
        return
    take_evaluation(chain, found)
    state.evaluated_step = state.step
    if found < state.best:
        state.best, state.best_step, state.no_better = found, state.step, 0
        # After the last knot there is nothing to save: the checkpoint before it, which the link is tied from again, leads to
        # these weights. (Its own outputs are others where chain.merge_weight is below 1.)
        if chain.config.checkpoint.best and state.link <= chain.links:
            save_checkpoint(chain)
        if chain.config.checkpoint.best and chain.folder:
            CheckpointFolder(chain.folder).mark_best(state.step)
        return
    state.no_better += 1
    if patience is not None and state.no_better >= patience and state.step < chain.step_plan.total_steps:
        end_here(chain)


def end_here(chain: Chain) -> None:
    """Make the step that was evaluated the last: its link is tied, and none follows."""
    state = chain.state
    state.ended_step = state.step
    chain.step_plan = chain.step_plan.ending_at(state.step)
    chain.logger.say(f"ends at step {state.step}: no better than at step {state.best_step} (eval.patience)")
    chain.logger.event("ended early", **position(chain), best_step=state.best_step)
    if state.link <= chain.links:  # as before any last knot
        save_checkpoint(chain)


def evaluate(chain: Chain) -> float | None:
    """The objective now (run/scores.py): of the held-out loss or, of a task, its dev score; where that is the best so far, its
    test score is found too. All go into the log. None, and nothing in the log, where it ends the link (chain.knots): then one
    after the knot counts. Raises StoppedError when a signal asks for it."""
    assert chain.held_out is not None
    chain.logger.stop_clock()
    found: list[HeldOut | TaskScore | None]
    if chain.is_scored:
        found = [_score(chain, "dev")]
    else:
        found = [held_out_loss(chain.engine, chain.held_out, chain.eval_batch_size, stop_is_asked)]
    if found[0] is not None and evaluation_ends_link(chain, found[0].objective):
        return None
    if chain.is_scored and found[0] is not None and found[0].objective < chain.state.best:
        found.append(_score(chain, "test"))
    for each in found:
        if each is None:
            stop_here(chain, stop_signal())
    for each in found:
        assert each is not None
        chain.logger.evaluation(position(chain), each)
    assert found[0] is not None
    return found[0].objective


def _score(chain: Chain, split: str) -> TaskScore | None:
    data = chain.test if split == "test" or chain.held_out is None else chain.held_out.data
    assert isinstance(data, TaskData)
    return task_score(chain.engine, data, split, chain.tokenizer, chain.eval_batch_size, stop_is_asked)
