"""Knots placed by the loss (chain.knots: {plateau: ...}), while a chain runs; the criterion itself is in config/plateau.py. All
processes decide alike: by one loss of all of them, and counters of ChainState."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cola_ds.config.plateau import PlateauConfig, is_flat, threshold
from cola_ds.distributed import collectives
from cola_ds.run.scores import show_dev
from cola_ds.training.state import Chain


def take_step_loss(chain: Chain, loss: Tensor, is_bad: bool) -> None:
    """Count a step that has just ended, and end its link there if it is time to. `loss` is this process's share, (); `is_bad`:
    that of some process is not finite. Collective where the training loss decides."""
    plateau, state = _deciding(chain), chain.state
    if plateau is None:
        return
    if plateau.loss == "train":
        if not is_bad:
            # A sum, so not in the maxima that a step reduces anyway: 1.5 ms at two processes on busy cores, less than a
            # thousandth of a step of SmolLM2-135M there.
            state.window_loss += float(collectives.all_reduce_sum(loss.clone()).item())
            state.window_steps += 1
        if state.step_in_link % plateau.window == 0:
            if state.window_steps:
                state.link_losses.append(state.window_loss / state.window_steps)
            state.window_loss, state.window_steps = 0.0, 0
            if is_flat(state.link_losses, plateau) and _may_end(chain):
                _end_link(chain)
                return
    # Where most_steps has placed the knot, it was in the plan all along.
    if state.step == chain.step_plan.knots[state.link - 1] < chain.step_plan.total_steps:
        _end_link(chain)


def evaluation_ends_link(chain: Chain, objective: float) -> bool:
    """Whether this evaluation of the link ends it here. Then the knot comes first, and an evaluation of the merged weights after
    it, as at every knot, whoever has placed it."""
    plateau = _by_evaluations(chain)
    if plateau is None or not math.isfinite(objective) or not _may_end(chain):
        return False
    if not is_flat([*chain.state.link_losses, objective], plateau):
        return False
    chain.state.link_losses.append(objective)
    _end_link(chain)
    return True


def take_evaluation(chain: Chain, objective: float) -> None:
    """Count an evaluation that has not ended the link."""
    if _by_evaluations(chain) is not None and math.isfinite(objective):
        chain.state.link_losses.append(objective)


def begin_losses(chain: Chain) -> None:
    """The next link has no losses yet."""
    state = chain.state
    state.link_losses, state.window_loss, state.window_steps = [], 0.0, 0


def why_ended(chain: Chain) -> dict[str, Any]:
    """What knots.jsonl says of the end of this link; nothing where the loss places no knots."""
    plateau, state = chain.config.chain.plateau, chain.state
    if plateau is None:
        return {}
    by = "end of run"
    if state.step in state.decided:
        by = "most_steps" if state.step_in_link == plateau.most_steps else "plateau"
    return {"ended_by": by, "losses": list(state.link_losses)}


def _deciding(chain: Chain) -> PlateauConfig | None:
    """What may end this link; None where nothing can: the last one ends with the run."""
    return None if chain.state.link >= chain.config.chain.length else chain.config.chain.plateau


def _by_evaluations(chain: Chain) -> PlateauConfig | None:
    """The same where this evaluation counts for it: the one behind a knot is of no step of its link."""
    plateau = _deciding(chain)
    return plateau if plateau and plateau.loss == "held_out" and chain.state.step_in_link else None


def _may_end(chain: Chain) -> bool:
    """Whether the link has the steps that it must have, and leaves as many for the next one."""
    state, least = chain.state, chain.step_plan.least_steps
    return state.step_in_link >= least and chain.step_plan.total_steps - state.step >= least


def _end_link(chain: Chain) -> None:
    """Place a knot here, and tell."""
    state, plateau = chain.state, chain.config.chain.plateau
    assert plateau is not None
    state.decided.append(state.step)
    chain.step_plan = chain.step_plan.deciding(chain.config.chain, state.decided)
    reason, losses = why_ended(chain)["ended_by"], state.link_losses
    best = min(losses[:-1], default=math.nan)  # before the last one
    better = threshold(best, plateau.min_improvement)
    chain.logger.event(
        "plateau", link=state.link, step=state.step, ended_by=reason, loss=plateau.loss, losses=losses, best=best,
        threshold=better,
    )  # fmt: skip
    why = f"it has the most_steps {plateau.most_steps} of chain.knots"
    if reason == "plateau":
        last = ", ".join(map(show_dev, losses[-plateau.patience :]))
        why = (
            f"{plateau.loss.replace('_', '-')} {last}; the last had to be better than {show_dev(better)} (chain.knots)"
        )
    chain.logger.say(f"link {state.link} ends at step {state.step}: {why}")
