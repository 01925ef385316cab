"""The groups of a sweep, the runs of a task with a method each, and sweep.json, which tells a report of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cola_ds.errors import UserError
from cola_ds.run.rows import CheckedJson, Count, read_json
from cola_ds.sweep.outcomes import Outcome, read_outcome


@dataclass(frozen=True, kw_only=True)
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


class _SavedGroup(CheckedJson):
    task: str
    name: str
    points: Annotated[list[str], Field(min_length=1)]
    seeds: list[Count]
    search_seeds: list[Count]
    paths: list[tuple[str, Count, str]]


class _SavedSweep(CheckedJson):
    groups: list[_SavedGroup]


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
        saved = read_json(_SavedSweep, path.read_bytes()).groups
        for group in saved:
            _check_paths(group)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not what cola-ds sweep writes ({error}); without it the same sweep writes it anew"
        ) from None
    return [
        Group(
            task=group.task,
            name=group.name,
            paths={(point, seed): folder / place for point, seed, place in group.paths},
            points=tuple(group.points),
            seeds=tuple(group.seeds),
            search_seeds=tuple(group.search_seeds),
        )
        for group in saved
    ]


def _check_paths(group: _SavedGroup) -> None:
    """Raise ValueError, in a few words, unless every run has a path, below the sweep's folder."""
    places = {(point, seed) for point, seed, _ in group.paths}
    if lacking := {(p, s) for p in group.points for s in {*group.seeds, *group.search_seeds}} - places:
        raise ValueError(f"groups: no path for {min(lacking)}")
    for _, _, place in group.paths:
        if Path(place).is_absolute() or ".." in Path(place).parts or "\0" in place:
            raise ValueError(f"groups: {place[:80]!r} is not below the sweep's folder")
