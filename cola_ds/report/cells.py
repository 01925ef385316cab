"""Cells of a report: a task with a method each, its runs at the chosen point of the grid, and what they are compared by: test
scores, or held-out losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cola_ds.config.schema import RunConfig
from cola_ds.config.steps import rows_per_step
from cola_ds.run.scores import loss_objective, score_objective
from cola_ds.sweep.groups import Group
from cola_ds.sweep.outcomes import Outcome
from cola_ds.sweep.selection import Choice, choose


@dataclass(frozen=True)
class Cell:
    """A group with its choice, read once."""

    group: Group
    choice: Choice
    chosen: list[Outcome]
    """One for each seed, at the chosen point."""
    others: list[Outcome]
    """The rest of the search, and whatever else has been begun."""

    @property
    def all(self) -> list[Outcome]:
        return [*self.chosen, *self.others]

    @property
    def finished(self) -> list[Outcome]:
        return [outcome for outcome in self.chosen if outcome.state == "finished"]

    @property
    def scores(self) -> dict[int, float]:
        """Test scores by seed, in points."""
        return {outcome.seed: 100 * outcome.test for outcome in self.finished if outcome.is_task}

    @property
    def losses(self) -> dict[int, float]:
        """Held-out losses by seed, of runs without a task."""
        found = {outcome.seed: outcome.result["scores"].get("loss") for outcome in self.finished if not outcome.is_task}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    @property
    def values(self) -> dict[int, float]:
        """What methods are compared by, by seed: test scores in points, or held-out losses."""
        return self.scores or self.losses

    def objective_of(self, value: float) -> float:
        """Of one of these values, or a difference of two: to be minimized."""
        return score_objective(value) if self.scores else loss_objective(value)

    def show(self, value: float, sign: str = "") -> str:
        """One of these values, or a difference of two, as a cell of a table has it."""
        return format(value, f"{sign}.2f" if self.scores else f"{sign}.4f")

    @property
    def config(self) -> RunConfig | None:
        return next((outcome.config for outcome in self.chosen if outcome.config), None)


def read_cell(group: Group) -> Cell:
    """Look at every run of a group."""
    choice = choose(group)
    chosen = [] if choice.point is None else [group.outcome(choice.point, seed) for seed in group.seeds]
    rest = [group.outcome(*at) for at in group.paths if at[0] != choice.point or at[1] not in group.seeds]
    others = [outcome for outcome in rest if outcome.seed in group.search_seeds or outcome.state != "missing"]
    return Cell(group, choice, chosen, others)


def cell_of_run(name: str, outcome: Outcome) -> Cell:
    """A run without a task, as a cell of its own."""
    seeds = (outcome.seed,)
    paths = {("", outcome.seed): outcome.folder}
    return read_cell(Group(task="", name=name, paths=paths, points=("",), seeds=seeds, search_seeds=seeds))


def budget(config: RunConfig) -> tuple[Any, ...]:
    """What runs of a fair comparison have in common: base model with what has been trained onto it before, which of its layers
    train, examples, optimizer, how long it runs."""
    optim, data, targets = config.optim, config.data, config.lora.targets
    return (
        config.model.path, repr(config.model.links), repr(config.model.adapter),
        targets if isinstance(targets, str) else tuple(sorted(targets)), config.lora.bias,
        repr(data.train), data.num_train, optim.name, optim.epochs, optim.max_steps, rows_per_step(config),
    )  # fmt: skip
