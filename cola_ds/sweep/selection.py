"""Model selection: the best point of a group's grid, by its scores on held-out data. Neither torch nor pandas is needed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from cola_ds.errors import UserError, counted
from cola_ds.sweep.groups import Group
from cola_ds.sweep.outcomes import Outcome


@dataclass(frozen=True)
class Choice:
    """The grid point that a group's seeds are run at."""

    point: str | None
    """None where it is not known, or no point has a score."""
    objective: float | None
    """Its mean over the search seeds (run/scores.py)."""
    why: str
    """Why there is none."""


def choose(group: Group) -> Choice:
    """Select the best grid point by its mean objective over the search seeds, the first of equals; never by the test score.

    None before every search run has a score, or has diverged: what is chosen must not depend on what happened to fail.
    Raises UserError for a run without a dev score.
    """
    if len(group.points) == 1:
        return Choice(group.points[0], None, "")
    searched = {point: [group.outcome(point, seed) for seed in group.search_seeds] for point in group.points}
    states = [outcome.state for outcomes in searched.values() for outcome in outcomes]
    waiting = sum(state not in ("finished", "diverged") for state in states)
    if waiting:
        return Choice(
            None,
            None,
            f"{waiting} of {counted(len(states), 'run')} of its search {'has' if waiting == 1 else 'have'} not finished",
        )
    means = {
        point: statistics.mean(map(_objective_of, outcomes))
        for point, outcomes in searched.items()
        if all(outcome.state != "diverged" for outcome in outcomes)
    }
    if not means:
        return Choice(None, None, "every point of its grid diverged")
    best = min(means, key=means.__getitem__)
    return Choice(best, means[best], "")


def _objective_of(outcome: Outcome) -> float:
    if outcome.objective is None:
        raise UserError(f"{outcome.folder}: it has no score on held-out data, which a grid's best is chosen by")
    return outcome.objective
