"""What a page shows of a run, read from its folder whatever state that is in. Neither torch nor a whole file in memory is needed.

Nothing here raises for what a folder holds: a row that is damaged is left out and counted, a file that cannot be read is named.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cola_ds.config.keys import flat_keys
from cola_ds.errors import inline
from cola_ds.run import lock
from cola_ds.run.rows import read_row
from cola_ds.sweep.outcomes import Outcome

COLUMNS = (
    "step", "loss", "lr", "grad_norm", "tokens_per_s", "tflops", "memory_bytes", "step_s", "data_wait_s",
)  # fmt: skip
"""Of metrics.jsonl, those that are drawn."""
_LARGEST, _LEAST = 1e300, 1e-250  # the difference of two such numbers is finite, and what lies between them no denormal
_MOST_ROWS = 20_000  # of a file that has few: evaluations, knots, layers of links
_LAST_EVENTS = 100
_ENVIRONMENT_BYTES = 2**20


@dataclass
class View:
    """A run, as its folder says it is."""

    name: str
    outcome: Outcome
    state: str
    """running, or the state of its outcome."""
    config: dict[str, Any]
    """By section.key; empty where it cannot be read."""
    environment: dict[str, Any]
    """environment.json, by key."""
    metrics: dict[str, array[float]]
    """Each of COLUMNS, a number for each row; NaN where it has none."""
    evals: list[dict[str, Any]]
    knots: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    """links.jsonl."""
    watch: list[dict[str, Any]]
    event_counts: Counter[str]
    skipped_steps: int
    """How many steps were left out as not finite, as events.jsonl says."""
    events: list[dict[str, Any]]
    """The last of events.jsonl, without checkpoints."""
    damaged: list[str] = field(default_factory=list)
    """What could not be read, a line each."""

    @property
    def knots_within(self) -> list[dict[str, Any]]:
        """Those at which another link follows: a finished run's last is its end."""
        return self.knots[:-1] if self.outcome.result else self.knots

    @property
    def restarts(self) -> int:
        return self.event_counts["resumed"]

    @property
    def last_step(self) -> int:
        return max((int(step) for step in self.metrics["step"][-1:]), default=self.outcome.result.get("steps") or 0)


def read_view(name: str, outcome: Outcome) -> View:
    """Read a run's folder."""
    folder = outcome.folder
    damaged: list[str] = []
    events = _Events()
    for row in _rows(folder / "events.jsonl", damaged):
        if row is not None:
            events.take(row)
    config = outcome.config
    if outcome.unreadable:
        damaged.append(outcome.unreadable)
    return View(
        name=name,
        outcome=outcome,
        state="running" if lock.holder(folder) else outcome.state,
        config=flat_keys(config.model_dump(mode="json")) if config else {},
        environment=_environment(folder / "environment.json", damaged),
        metrics=_metrics(folder / "metrics.jsonl", damaged),
        evals=_few(folder / "evals.jsonl", damaged),
        knots=_few(folder / "knots.jsonl", damaged),
        layers=_few(folder / "links.jsonl", damaged),
        watch=_few(folder / "watch.jsonl", damaged),
        event_counts=events.counts,
        skipped_steps=len(events.skipped),
        events=list(events.last),
        damaged=[inline(line) for line in damaged],
    )


def number_of(value: Any) -> float:
    """A number of a row; NaN where that is none, or too large to draw."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST < value < _LARGEST:
        return math.nan
    return float(value) if abs(value) > _LEAST else 0.0


class _Events:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.skipped: set[int] = set()
        self.last: deque[dict[str, Any]] = deque(maxlen=_LAST_EVENTS)

    def take(self, row: dict[str, Any]) -> None:
        self.counts[row["event"]] += 1
        if row["event"] == "skipped" and row.get("step") is not None:
            self.skipped.add(row["step"])
        if row["event"] != "checkpoint":
            self.last.append(row)


def _metrics(path: Path, damaged: list[str]) -> dict[str, array[float]]:
    columns = {key: array("d") for key in COLUMNS}
    follows = False  # a row
    for row in _rows(path, damaged, gaps=True):
        if row is not None:
            for key, column in columns.items():
                column.append(number_of(row.get(key)))
        elif follows:  # several that are damaged leave one gap
            for key, column in columns.items():
                column.append(column[-1] if key == "step" else math.nan)
        follows = row is not None
    return columns


def _few(path: Path, damaged: list[str]) -> list[dict[str, Any]]:
    """All rows, of a file that has no row for each step; the last, where somebody has made it have more."""
    return list(deque((row for row in _rows(path, damaged) if row is not None), maxlen=_MOST_ROWS))


def _rows(path: Path, damaged: list[str], gaps: bool = False) -> Iterator[dict[str, Any] | None]:
    """The rows of a .jsonl file, one at a time; None for a damaged one, if asked for `gaps`. What a run that goes on has not
    finished writing is no row."""
    count, first = 0, ""
    try:
        if not path.is_file():
            return
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = read_row(path.name, line)
                except (ValueError, RecursionError) as error:
                    count, first = count + 1, first or f"the first is row {number} ({error})"
                    if gaps:
                        yield None
                    continue
                yield row
    except OSError as error:
        damaged.append(f"{path.name}: {error.strerror}")
    if count:
        damaged.append(f"{path.name}: {count} damaged rows are left out; {first}")


def _environment(path: Path, damaged: list[str]) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_ENVIRONMENT_BYTES))
        return flat_keys(found) if isinstance(found, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        damaged.append(f"{path.name}: {error}")
        return {}
