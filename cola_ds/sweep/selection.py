"""Selection: the runs of a task with a method, and the best point of their grid by dev. Neither torch nor pandas is needed."""

from __future__ import annotations

import json
import statistics
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError
from cola_ds.run.rows import read_sweep
from cola_ds.sweep.outcomes import Outcome, read_outcome


@dataclass(frozen=True)
class Group:
    """The runs of a task with a method: every seed at one point of the grid, the search seeds at all of them."""

    task: str
    name: str
    """The method's name in the sweep."""
    paths: Mapping[tuple[str, int], Path]
    """Run folders, by grid point and seed."""
    points: tuple[str, ...]
    """The grid, in order, by the names of its folders; one where nothing is searched."""
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]

    def outcome(self, point: str, seed: int) -> Outcome:
        return read_outcome(self.paths[point, seed], seed)


def write_groups(folder: Path, groups: Sequence[Group]) -> None:
    """Write a sweep's sweep.json: from it a report knows which runs there should be. Raises UserError."""
    plain = [
        {
            "task": group.task,
            "name": group.name,
            "points": group.points,
            "seeds": group.seeds,
            "search_seeds": group.search_seeds,
            "paths": [[point, seed, str(path.relative_to(folder))] for (point, seed), path in group.paths.items()],
        }
        for group in groups
    ]
    if (folder / "sweep.json").exists():
        read_groups(folder)  # else it is somebody else's
    scratch = folder / f"sweep.json.{uuid.uuid4().hex}"  # tasks of an array may be other machines' processes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"groups": plain}) + "\n", encoding="utf-8")
        scratch.replace(folder / "sweep.json")
    except OSError as error:
        raise UserError(f"the sweep's folder {folder} cannot be written: {error.strerror}") from None


def read_groups(folder: Path) -> list[Group]:
    """What `write_groups` wrote there, wherever the folder lies now. Raises UserError."""
    path = folder / "sweep.json"
    try:
        groups = read_sweep(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not what cola-ds sweep writes ({error}); without it the same sweep writes it anew"
        ) from None
    return [
        Group(
            group["task"],
            group["name"],
            {(point, seed): folder / place for point, seed, place in group["paths"]},
            tuple(group["points"]),
            tuple(group["seeds"]),
            tuple(group["search_seeds"]),
        )
        for group in groups
    ]


@dataclass(frozen=True)
class Choice:
    """The grid point that a group's seeds are run at."""

    point: str | None
    """None where it is not known, or no point has a score."""
    dev: float | None
    """Its mean dev score over the search seeds."""
    why: str
    """Why there is none."""


def choose(group: Group) -> Choice:
    """The best grid point by mean dev score over the search seeds, the first of equals; never by the test score.

    None before every search run has a score, or has diverged: what is chosen must not depend on what happened to fail.
    Raises UserError for a run without a dev score.
    """
    if len(group.points) == 1:
        return Choice(group.points[0], None, "")
    searched = {point: [group.outcome(point, seed) for seed in group.search_seeds] for point in group.points}
    states = [outcome.state for outcomes in searched.values() for outcome in outcomes]
    waiting = sum(state not in ("finished", "diverged") for state in states)
    if waiting:
        return Choice(None, None, f"{waiting} of {len(states)} runs of its search have not finished")
    best: Choice | None = None
    for point, outcomes in searched.items():
        if any(outcome.state == "diverged" for outcome in outcomes):
            continue
        scores = [_dev_score(outcome) for outcome in outcomes]
        mean = statistics.mean(scores)
        if best is None or best.dev is None or mean > best.dev:
            best = Choice(point, mean, "")
    return best or Choice(None, None, "every point of its grid diverged")


def _dev_score(outcome: Outcome) -> float:
    if outcome.dev is None:
        raise UserError(f"{outcome.folder}: it has no score on held-out data, which a grid's best is chosen by")
    return outcome.dev


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
    def config(self) -> RunConfig | None:
        return next((outcome.config for outcome in self.chosen if outcome.config), None)


def read_cell(group: Group) -> Cell:
    """Look at every run of a group."""
    choice = choose(group)
    chosen = [] if choice.point is None else [group.outcome(choice.point, seed) for seed in group.seeds]
    rest = [group.outcome(*at) for at in group.paths if at[0] != choice.point or at[1] not in group.seeds]
    others = [outcome for outcome in rest if outcome.seed in group.search_seeds or outcome.state != "missing"]
    return Cell(group, choice, chosen, others)


def show_dev(dev: float | None) -> str:
    """A dev score as people read it; without a task it is a loss."""
    return "-" if dev is None else f"{100 * dev:.2f}" if dev >= 0 else f"loss {-dev:.4f}"
