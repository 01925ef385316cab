"""The plan of a run's steps: what follows from its config, the training examples and the processes."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cola_ds.config.plateau import known_knots, least_steps, longest_links
from cola_ds.config.schema import ChainConfig, RunConfig
from cola_ds.errors import UserError, counted


class Epochs:
    """Epochs as steps. Epochs and steps are counted from 0; the last step of an epoch may be short.

    Where epochs differ in their rows, each is counted once, when a step at or behind it is asked for.
    """

    def __init__(self, rows: int | Callable[[int], int], global_batch_size: int):
        """`rows`: how many an epoch has, or what says so of each; at least one."""
        self.are_even = isinstance(rows, int)
        self._rows = rows
        self._size = global_batch_size
        self._starts = [0]  # of the epochs that have been counted, and of the one after them

    def steps(self, epoch: int) -> int:
        """Steps of an epoch."""
        return self.start(epoch + 1) - self.start(epoch)

    def start(self, epoch: int) -> int:
        """The first step of an epoch: how many steps come before it."""
        if isinstance(self._rows, int):
            return epoch * -(-self._rows // self._size)
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] - (-self._rows(len(self._starts) - 1) // self._size))
        return self._starts[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the step's place in it."""
        if self.are_even:
            return divmod(step, self.start(1))
        while self._starts[-1] <= step:
            self.start(len(self._starts))
        epoch = bisect.bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def passed(self, step: int) -> float:
        """Epochs that have passed when `step` steps have."""
        if self.are_even:
            return step / self.start(1)
        epoch, index = self.locate(step)
        return epoch + index / self.steps(epoch)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What follows from the config, the rows of each epoch and the number of processes."""

    epochs: Epochs
    global_batch_size: int
    """Rows of a step, over all processes: examples, or packed rows."""
    total_steps: int
    knots: tuple[int, ...]
    """The step after which each link ends, one per link; the last is total_steps. Where the loss places them: those that are
    decided, and those to come at the latest."""
    micro_steps: int
    """Forward/backward passes per step and process (gradient accumulation)."""
    least_steps: int = 1
    """Steps of a link at least, where the loss places the knots."""

    def link_steps(self, link: int) -> int:
        """Steps in a link, counted from 1."""
        return self.knots[link - 1] - (self.knots[link - 2] if link > 1 else 0)

    def ending_at(self, step: int) -> StepPlan:
        """The same, but over after `step`."""
        knots = (*(knot for knot in self.knots if knot < step), step)
        return dataclasses.replace(self, total_steps=step, knots=knots)

    def deciding(self, chain: ChainConfig, decided: Sequence[int]) -> StepPlan:
        """The same where the loss has placed those knots; the config's own where it places none."""
        if chain.plateau is None:
            return self
        knots = known_knots(decided, chain.plateau, self.least_steps, chain.length, self.total_steps)
        return dataclasses.replace(self, knots=knots)

    def link_of(self, step: int) -> int:
        """The link that a step (counted from 1) belongs to; 1 before any step."""
        return bisect.bisect_left(self.knots, step) + 1


def with_longest_chain(config: RunConfig, least_steps: int, total_steps: int) -> RunConfig:
    """The config with as many links as there can be at most, for what must be there for all of them: where the loss places the
    knots, chain.length may be more than can begin."""
    chain, lora, plateau = config.chain, config.lora, config.chain.plateau
    if plateau is None or chain.length == 1:
        return config
    between = config.eval.every if isinstance(config.eval.every, int) else 1  # an epoch has one step at least
    most = len(longest_links(plateau, least_steps, chain.length, total_steps, between))

    def cut(by_link: Any) -> Any:
        return by_link[:most] if isinstance(by_link, list) else by_link

    chain = chain.model_copy(update={"length": most, "merge_weight": cut(chain.merge_weight)})
    lora = lora.model_copy(update={"rank": cut(lora.rank), "train": cut(lora.train)})
    return config.model_copy(update={"chain": chain, "lora": lora})


def rows_per_step(config: RunConfig) -> int:
    """Rows of a step, over all processes: optim.global_batch_size, or what optim.global_batch_tokens has room for.

    Raises UserError where that is no row.
    """
    optim = config.optim
    if optim.global_batch_tokens is None:
        return optim.global_batch_size
    rows = optim.global_batch_tokens // config.data.max_length
    if not rows:
        raise UserError(
            f"optim.global_batch_tokens {optim.global_batch_tokens} has no room for a row of data.max_length "
            f"{config.data.max_length}; use at least that many"
        )
    return rows


def micro_steps_of(config: RunConfig, world_size: int) -> int:
    """Micro steps of a step: gradient accumulation. Raises UserError for a global batch that does not divide so."""
    size, per_micro_step = rows_per_step(config), config.optim.micro_batch_size * world_size
    if size % per_micro_step:
        raise UserError(_does_not_divide(config, size, world_size, per_micro_step))
    return size // per_micro_step


def resolve(config: RunConfig, rows: int | Callable[[int], int], world_size: int) -> StepPlan:
    """Derive steps, knots and gradient accumulation; `rows` are those of an epoch, or what says so of each, from 0.

    Raises UserError when the global batch does not divide over micro batches and processes, a knot lies outside the run, or a
    warm-up outlasts its link.
    """
    optim, size, micro_steps = config.optim, rows_per_step(config), micro_steps_of(config, world_size)
    epochs = Epochs(rows, size)
    total_steps = optim.max_steps or epochs.start(optim.epochs or 1)
    chain, least = config.chain, 1
    if chain.plateau is None:
        knots = place_knots(chain.knots, chain.length, total_steps, epochs)
    else:
        least = least_steps(chain.plateau, config.eval.every, lambda: epochs.steps(0))
        knots = known_knots((), chain.plateau, least, chain.length, total_steps)
    step_plan = StepPlan(
        epochs=epochs, global_batch_size=size, total_steps=total_steps, knots=knots, micro_steps=micro_steps, least_steps=least
    )  # fmt: skip
    shortest = min(step_plan.link_steps(link) for link in range(1, len(knots) + 1))
    remedy = ""
    if chain.plateau is not None and chain.length > 1:
        shortest, remedy = min(shortest, least), "; set fewer, or a greater chain.knots.plateau.least_steps"
    if optim.warmup_steps >= shortest:
        raise UserError(
            f"optim.warmup_steps {optim.warmup_steps} never ends: the shortest link has {shortest} steps{remedy}"
        )
    return step_plan


def _does_not_divide(config: RunConfig, size: int, world_size: int, per_micro_step: int) -> str:
    optim, width = config.optim, config.data.max_length
    into = f"into micro batches of {optim.micro_batch_size} on {counted(world_size, 'process', 'processes')}"
    if optim.global_batch_tokens is None:
        return (
            f"optim.global_batch_size {size} does not divide {into}; use a multiple of {per_micro_step}, or another "
            "optim.micro_batch_size"
        )
    below = size // per_micro_step * per_micro_step
    fitting = " or ".join(str(rows * width) for rows in (below, below + per_micro_step) if rows)
    return (
        f"optim.global_batch_tokens {optim.global_batch_tokens} has room for {size} rows of data.max_length {width}, which do "
        f"not divide {into}; use {fitting}, or another optim.micro_batch_size"
    )


def place_knots(knots: Any, length: int, total_steps: int, epochs: Epochs) -> tuple[int, ...]:
    """The step after which each of `length` links ends; the last is `total_steps`.

    `knots` is "even" (links differ by at most one step, the earlier ones longer), {"epochs": [...]} or {"steps": [...]}
    with the length - 1 knots before the end of the run. Raises UserError for a knot at or past the end.
    """
    if knots == "even":
        if total_steps < length:
            raise UserError(
                f"chain.length {length} needs at least one step per link, but the run has {counted(total_steps, 'step')}"
            )
        short, longer = divmod(total_steps, length)
        return tuple(link * short + min(link, longer) for link in range(1, length + 1))
    (unit, at), *_ = knots.items()
    # Uneven epochs are counted one by one. Each has a step: those far behind the end need not be counted to be refused.
    far = max(at) if epochs.are_even else total_steps
    inner = [epochs.start(min(k, far)) if unit == "epochs" else k for k in at]
    if inner and inner[-1] >= total_steps:
        where = f"epoch {at[-1]} (step {inner[-1]})" if unit == "epochs" else f"step {at[-1]}"
        raise UserError(f"chain.knots: {where} is at or past the end of the run, which has {total_steps} steps")
    return (*inner, total_steps)
