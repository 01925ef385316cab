"""Skipped steps: updates that were left out because a loss or a gradient was not finite."""

from __future__ import annotations

from cola_ds.data.batch import StepExamples
from cola_ds.errors import TrainingFailedError, counted
from cola_ds.training.state import Chain, position


def record_skipped_step(chain: Chain, examples: StepExamples, loss_is_bad: bool) -> None:
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
        chain.logger.say(
            f"step {state.step}: {what} not finite; its update is left out. Its examples (from 0, in data.train): "
            f"{', '.join(map(str, sorted(examples.indices)))}"
        )
    chain.logger.event("skipped", **position(chain), loss_is_finite=not loss_is_bad, examples=sorted(examples.indices))


def check_skips(chain: Chain) -> None:
    """Raise TrainingFailedError when too many updates in a row, or all of a link, were left out."""
    state, most = chain.state, chain.config.optim.max_skips_in_a_row
    if state.skipped_in_a_row > most:
        lost = counted(state.skipped_in_a_row, "update")
        raise TrainingFailedError(
            f"{lost} in a row left out up to step {state.step}, as no loss or gradient was finite "
            f"(optim.max_skips_in_a_row is {most}); lower optim.lr or look at the data"
        )
    if state.step == chain.step_plan.knots[state.link - 1] and state.skipped_in_link == chain.step_plan.link_steps(
        state.link
    ):
        raise TrainingFailedError(
            f"no update of link {state.link} could be applied: no gradient was finite; lower optim.lr"
        )
