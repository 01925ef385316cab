"""Knots placed by the loss (chain.knots: {plateau: ...}): the keys, the criterion, and what is known of the knots beforehand.

The losses of a link are the means of its windows, which follow one another from its first step (loss: train), or what the
evaluations after its first step find (loss: held_out). One that is not below the lowest before it in its link, by min_improvement
of that, has not improved. `patience` of them in a row end the link, if it has least_steps and as many are left for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from cola_ds.config.fields import Count, Section
from cola_ds.errors import counted, cut


class PlateauConfig(Section):
    """chain.knots: {plateau: ...}. chain.length is the most links then."""

    loss: Literal["train", "held_out"] = "train"
    """train: the loss of the steps. held_out: what the evaluations of eval.every find: the held-out loss or, of a task, its dev
    score."""
    window: Count = 20
    """Steps of a window, whose mean training loss counts as one. Windows follow one another from a link's first step; a step
    whose loss is not finite counts in none. With train alone."""
    min_improvement: float = Field(default=0.01, ge=0, lt=1)
    """A window or evaluation has improved if it is below the lowest before it in its link by this share of that, or is the
    first."""
    patience: Count = 2
    """Windows or evaluations in a row without improvement after which the link ends."""
    least_steps: Count | None = None
    """Steps that a link has before the loss may end it, and that must be left for the next one; null: those of a window, or
    between two evaluations."""
    most_steps: Count | None = None
    """Steps after which a link ends whatever its loss, if least_steps are left for the next one; null: it goes on."""

    @model_validator(mode="after")
    def _agree(self) -> PlateauConfig:
        if self.loss == "held_out" and "window" in self.model_fields_set:
            raise ValueError("window is for loss train; with held_out, eval.every says how often it is looked at")
        if self.most_steps is None:
            return self
        least, name = self.least_steps or 1, "least_steps"
        if self.loss == "train" and self.window > least:
            least, name = self.window, "window"
        if self.most_steps < least:
            raise ValueError(f"most_steps {self.most_steps} is below {name} {least}")
        return self


def read_plateau(value: Any) -> PlateauConfig:
    """The keys of {plateau: ...}. Raises ValueError, in one line that names the key."""
    if isinstance(value, PlateauConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError("must give plateau its keys, like {plateau: {window: 20}}, or none: {plateau: {}}")
    try:
        return PlateauConfig.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = cut(".".join(map(str, first["loc"])), 80)
        if first["type"] == "extra_forbidden":
            raise ValueError(f"plateau has no key {key}: known are {', '.join(PlateauConfig.model_fields)}") from None
        said = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise ValueError(f"plateau.{key} {said}" if key else f"plateau: {said}") from None


def threshold(best: float, min_improvement: float) -> float:
    """What a loss (an objective: a task's score is its negative) must be below to have improved."""
    return best - min_improvement * abs(best)


def is_flat(losses: Sequence[float], plateau: PlateauConfig) -> bool:
    """Whether the last `patience` of a link's losses, all finite, have not improved."""
    best, without = math.inf, 0
    for loss in losses:
        improved = best == math.inf or loss < threshold(best, plateau.min_improvement)
        without = 0 if improved else without + 1
        best = min(best, loss)
    return without >= plateau.patience


def least_steps(plateau: PlateauConfig, eval_every: str | int, epoch_steps: Callable[[], int]) -> int:
    """Steps that a link has at least; `epoch_steps` says those of an epoch."""
    if plateau.least_steps is not None:
        return plateau.least_steps
    if plateau.loss == "train":
        return plateau.window
    between = int(eval_every) if isinstance(eval_every, int) else epoch_steps()
    return min(between, plateau.most_steps or between)


def known_knots(
    decided: Sequence[int], plateau: PlateauConfig, least: int, length: int, total_steps: int
) -> tuple[int, ...]:
    """The knots of a run as far as they are known: those that are decided, those to come at the latest, and the run's end."""
    knots = list(decided[: length - 1])
    while plateau.most_steps is not None and len(knots) < length - 1:
        latest = (knots[-1] if knots else 0) + plateau.most_steps
        if latest > total_steps - least:  # too few would be left
            break
        knots.append(latest)
    return (*knots, total_steps)


def longest_links(plateau: PlateauConfig, least: int, length: int, total_steps: int, between: int = 1) -> list[int]:
    """The most steps of each link that can begin, of `length` at most. One with which the run ends may have some more than
    most_steps: too few were left for another. `between`: the fewest steps between two evaluations."""
    every = plateau.window if plateau.loss == "train" else between
    if plateau.loss == "train" or (plateau.most_steps or every) % every == 0:
        # Links begin where windows or evaluations do: the end of the first of these at which one may be over.
        shortest = math.ceil(max(least, (1 + plateau.patience) * every) / every) * every
    else:  # a link that most_steps has begun has its first evaluation sooner
        shortest = max(least, plateau.patience * every + 1)
    shortest = min(shortest, plateau.most_steps or shortest)
    found: list[int] = []
    for begin in range(0, total_steps, shortest):
        if len(found) == length or (begin and begin > total_steps - least):
            break
        is_last = len(found) == length - 1
        found.append(min(total_steps - begin, total_steps if is_last else plateau.most_steps or total_steps))
    return found


def describe(plateau: PlateauConfig, least: int, is_scored: bool) -> str:
    """The criterion, for people."""
    what = f"the mean training loss of {counted(plateau.window, 'step')}"
    if plateau.loss == "held_out":
        what = "the dev score" if is_scored else "the held-out loss"
    times = "once" if plateau.patience == 1 else f"{plateau.patience} times in a row"
    share = f"by {100 * plateau.min_improvement:g}% of its best" if plateau.min_improvement else "at all"
    most = "" if plateau.most_steps is None else f", at most {plateau.most_steps}"
    least_of_all = counted(least, "step")
    return f"a link ends where {what} has {times} not improved {share}; at least {least_of_all}{most}; the last ends with the run"


def replay_words(decided: Sequence[int], by_link: Mapping[str, Any]) -> list[str]:
    """The overrides with which a run whose knots the loss has placed is run again, bit for bit, without looking at its loss.
    `by_link`: the values of the keys that may have one per link."""
    knots = f"{{steps: [{', '.join(map(str, decided))}]}}" if decided else "even"
    words = [f"chain.length={len(decided) + 1}", f"chain.knots={knots}"]
    if not decided:  # a single link has no knot at which something could be kept
        words.append("chain.optimizer_at_knot=reset")
    for key, values in by_link.items():
        if isinstance(values, list):
            words.append(f"{key}=[{', '.join(map(str, values[: len(decided) + 1]))}]")
    return words
