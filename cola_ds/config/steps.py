"""The plan of a run's steps: what follows from its config, the training examples and the processes."""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass
from typing import Any

from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What follows from the config, the number of training examples and of processes."""

    examples: int
    """Training examples in one epoch."""
    steps_per_epoch: int
    total_steps: int
    knots: tuple[int, ...]
    """The step after which each link ends, one per link; the last is total_steps."""
    micro_steps: int
    """Forward/backward passes per step and process (gradient accumulation)."""

    def link_steps(self, link: int) -> int:
        """Steps in a link, counted from 1."""
        return self.knots[link - 1] - (self.knots[link - 2] if link > 1 else 0)

    def ending_at(self, step: int) -> StepPlan:
        """The same, but over after `step`."""
        knots = (*(knot for knot in self.knots if knot < step), step)
        return dataclasses.replace(self, total_steps=step, knots=knots)

    def link_of(self, step: int) -> int:
        """The link that a step (counted from 1) belongs to; 1 before any step."""
        return bisect.bisect_left(self.knots, step) + 1


def resolve(config: RunConfig, examples: int, world_size: int) -> StepPlan:
    """Derive steps, knots and gradient accumulation.

    Raises UserError when the global batch does not divide over micro batches and processes, a knot lies outside the run, or a
    warm-up outlasts its link.
    """
    optim = config.optim
    per_micro_step = optim.micro_batch_size * world_size
    if optim.global_batch_size % per_micro_step:
        raise UserError(
            f"optim.global_batch_size {optim.global_batch_size} does not divide into micro batches of {optim.micro_batch_size} "
            f"on {world_size} processes; use a multiple of {per_micro_step}, or another optim.micro_batch_size"
        )
    steps_per_epoch = -(-examples // optim.global_batch_size)
    total_steps = optim.max_steps or (optim.epochs or 1) * steps_per_epoch
    knots = place_knots(config.chain.knots, config.chain.length, total_steps, steps_per_epoch)
    step_plan = StepPlan(
        examples=examples, steps_per_epoch=steps_per_epoch, total_steps=total_steps, knots=knots,
        micro_steps=optim.global_batch_size // per_micro_step,
    )  # fmt: skip
    shortest = min(step_plan.link_steps(link) for link in range(1, config.chain.length + 1))
    if optim.warmup_steps >= shortest:
        raise UserError(f"optim.warmup_steps {optim.warmup_steps} never ends: the shortest link has {shortest} steps")
    return step_plan


def place_knots(knots: Any, length: int, total_steps: int, steps_per_epoch: int) -> tuple[int, ...]:
    """The step after which each of `length` links ends; the last is `total_steps`.

    `knots` is "even" (links differ by at most one step, the earlier ones longer), {"epochs": [...]} or {"steps": [...]}
    with the length - 1 knots before the end of the run. Raises UserError for a knot at or past the end.
    """
    if knots == "even":
        if total_steps < length:
            raise UserError(
                f"chain.length {length} needs at least one step per link, but the run has {total_steps} steps"
            )
        short, longer = divmod(total_steps, length)
        return tuple(link * short + min(link, longer) for link in range(1, length + 1))
    (unit, at), *_ = knots.items()
    inner = [k * steps_per_epoch if unit == "epochs" else k for k in at]
    if inner and inner[-1] >= total_steps:
        where = f"epoch {at[-1]} (step {inner[-1]})" if unit == "epochs" else f"step {at[-1]}"
        raise UserError(f"chain.knots: {where} is at or past the end of the run, which has {total_steps} steps")
    return (*inner, total_steps)
