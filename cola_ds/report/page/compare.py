"""What a page says of several runs: their table, what their configs differ in, and a sweep's means with intervals."""

from __future__ import annotations

import json
import math
import statistics
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cola_ds.report.cells import Cell
from cola_ds.report.page.chart import MOST_CURVES, Curve, Interval, shown
from cola_ds.report.page.figures import Figure, draw_intervals, draw_lines, unit_of
from cola_ds.report.page.read import View, number_of
from cola_ds.report.statistics import confidence_interval
from cola_ds.report.tables import Table
from cola_ds.run.scores import show_dev
from cola_ds.sweep.outcomes import Outcome

RUN_COLUMNS = (
    "run", "state", "method", "links", "steps", "training loss", "held-out", "test", "tokens/s", "waiting", "seconds",
    "peak memory (GiB)", "restarts", "skipped steps",
)  # fmt: skip
_KEYS_ABOVE = 6  # runs: with more of them each run is a row of the table of differences, and no column
_MOST_INTERVALS = 40  # in a figure


def run_row(view: View) -> list[str]:
    """A run's row, by RUN_COLUMNS: as far as it has come."""
    result, scores = view.outcome.result, view.outcome.result.get("scores", {})
    seconds, waited = sum(_finite(view.metrics["step_s"])), sum(_finite(view.metrics["data_wait_s"]))
    return [
        view.name,
        view.state,
        str(view.config.get("method", "-")),
        _links(view),
        str(view.last_step),
        _last(view.metrics["loss"]),
        _held_out(view),
        _points(scores.get("test")),
        _number(statistics.median(speeds) if (speeds := _finite(view.metrics["tokens_per_s"])) else None, ",.0f"),
        _number(waited / seconds if seconds > 0 else None, ".1%"),
        _number(result.get("wall_time_s"), ",.0f"),
        _number(_peak(view), ".2f"),
        str(view.restarts),
        str(view.skipped_steps),
    ]


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _number(value: Any, form: str) -> str:
    number = number_of(value)
    return "-" if math.isnan(number) else f"{number:{form}}"


def _last(values: array[float]) -> str:
    return _number(values[-1], ".4f") if len(values) else "-"


def _links(view: View) -> str:
    tied = f"{len(view.knots)}"
    length = view.config.get("chain.length")
    if view.config.get("method") not in ("cola", "lora") or view.outcome.result:
        return tied if view.knots else "-"
    return f"{tied} of {length}"


def _held_out(view: View) -> str:
    """The last held-out loss, or score on dev."""
    rows = [row for row in view.evals if row.get("split") != "test" and (row.get("loss") is not None or "score" in row)]
    if not rows:
        return _number(view.outcome.result.get("scores", {}).get("loss"), ".4f")
    last = rows[-1]
    return _number(last["loss"], ".4f") if last.get("loss") is not None else _points(last["score"])


def _points(score: Any) -> str:
    """A task's score, in points, as the tables of reports have it."""
    return _number(100 * number_of(score), ".2f")


def _peak(view: View) -> float | None:
    found = [*_finite(view.metrics["memory_bytes"]), number_of(view.outcome.result.get("peak_memory_bytes"))]
    return max(_finite(found), default=0) / 2**30 or None


@dataclass(frozen=True)
class Differences:
    """The configs and environments of runs: what all have in common, and what not."""

    common: Table
    differing: Table | None


def differences(views: Sequence[View]) -> Differences:
    """By key; environment.json's begin with `environment.`. The folders of runs are left out: they always differ."""
    facts = [
        {
            **{key: value for key, value in view.config.items() if key != "run.dir"},
            **{f"environment.{key}": value for key, value in view.environment.items()},
        }
        for view in views
    ]
    keys = list(dict.fromkeys(key for each in facts for key in each))
    texts = {key: [_text(each[key]) if key in each else "-" for each in facts] for key in keys}
    same = {key: len(set(texts[key])) == 1 for key in keys}
    differing = [key for key in keys if not same[key]]
    common = Table(["key", "value"], [[key, texts[key][0]] for key in keys if same[key]])
    if not differing:
        return Differences(common, None)
    names = [view.name for view in views]
    if len(views) <= _KEYS_ABOVE:
        return Differences(common, Table(["key", *names], [[key, *texts[key]] for key in differing]))
    rows = [[name, *(texts[key][at] for key in differing)] for at, name in enumerate(names)]
    return Differences(common, Table(["run", *differing], rows))


def _text(value: Any) -> str:
    """A value as the YAML would have it in a line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def beside(first: Sequence[View], of_runs: int, most: int, knots: Sequence[float]) -> list[Figure]:
    """The first of so many runs in a figure each of losses, scores and learning rate, with the knots of all of them."""
    note = f"the first {len(first)} of {of_runs} runs" if len(first) < of_runs else ""
    curves: dict[str, list[Curve]] = {}
    for at, view in enumerate(first):
        for title, (xs, ys) in _courses(view).items():
            curves.setdefault(title, []).append(Curve(view.name, xs, ys, at, marked=not _by_step(title)))
    drawn = [draw_lines(title, each, most, knots=knots, note=note) for title, each in curves.items()]
    return [figure for figure in drawn if figure]


def _by_step(title: str) -> bool:
    """Whether each step has one of these."""
    return title.startswith(("Training loss", "Learning rate"))


def _courses(view: View) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """What runs are compared by: steps and values, by title."""
    losses = [row for row in view.evals if row.get("loss") is not None]
    on_dev = [row for row in view.evals if row.get("split") == "dev" and "score" in row]
    found: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for title, key in ((f"Training loss ({unit_of(view)})", "loss"), ("Learning rate", "lr")):
        found[title] = view.metrics["step"], view.metrics[key]
    for title, key, rows in ((f"Held-out loss ({unit_of(view)})", "loss", losses), ("Score on dev", "score", on_dev)):
        found[title] = [number_of(row["step"]) for row in rows], [number_of(row[key]) for row in rows]
    return found


@dataclass(frozen=True)
class Intervals:
    """The methods of a task, each with the mean of its seeds."""

    task: str
    table: Table
    svg: Markup | None


def sweep_intervals(cells: Sequence[Cell]) -> list[Intervals]:
    """Means over the seeds of every task and method at its chosen point, with 95% intervals."""
    found = []
    for task in dict.fromkeys(cell.group.task for cell in cells):
        rows, intervals, scored = [], [], False
        for cell in (cell for cell in cells if cell.group.task == task):
            values = list(cell.values.values())
            scored = scored or bool(cell.scores)
            row = [cell.group.name, cell.choice.point or "-", f"{len(values)} of {len(cell.group.seeds)}"]
            if not values:
                rows.append([*row, *["-"] * 4])
                continue
            mean = statistics.mean(values)
            within = confidence_interval(values)
            deviation = shown(statistics.stdev(values)) if within else "-"
            rows.append([*row, shown(mean), deviation, *map(shown, within or (math.nan, math.nan))])
            intervals.append(Interval(cell.group.name, mean, *(within or (mean, mean)), values))
        what = "test score x 100" if scored else "held-out loss"
        columns = ("method", "chosen on dev", "seeds", f"{what}, mean", "deviation", "95% from", "to")
        svg = draw_intervals(f"{task}: {what}", intervals[:_MOST_INTERVALS], what) if intervals else None
        found.append(Intervals(task, Table(columns, rows), svg))
    return found


def grid_table(cells: Sequence[Cell]) -> Table | None:
    """The mean objective on dev of each searched point of the grids, over the seeds that have one; None without a search."""
    searched = [cell for cell in cells if len(cell.group.points) > 1]
    rows = []
    for cell in searched:
        found = by_point(cell)
        for point in cell.group.points:
            means = [o.objective for o in found.get(point, []) if o.objective is not None]
            mean = show_dev(statistics.mean(means)) if means else "-"
            chosen = "chosen" if point == cell.choice.point else ""
            rows.append([cell.group.task, cell.group.name, point, f"{len(means)}", mean, chosen])
    return Table(("task", "method", "point", "runs", "dev, mean", ""), rows) if rows else None


def by_point(cell: Cell) -> Mapping[str, list[Outcome]]:
    """The search runs of a cell that are there, by their points."""
    place_of = {path: point for (point, seed), path in cell.group.paths.items() if seed in cell.group.search_seeds}
    found: dict[str, list[Outcome]] = {}
    for outcome in cell.all:
        if outcome.folder in place_of:
            found.setdefault(place_of[outcome.folder], []).append(outcome)
    return found


class MeanCurves:
    """Losses and scores by step, the means over the seeds of each cell, gathered a run at a time."""

    def __init__(self, cells: Sequence[Cell]):
        self._cells = cells
        self._cell_of = {outcome.folder: at for at, cell in enumerate(cells) for outcome in cell.chosen}
        self._sums: dict[tuple[int, str], dict[float, tuple[float, int]]] = {}

    def take(self, view: View) -> None:
        """Count a run in, whose rows need not be kept after that."""
        at = self._cell_of.get(view.outcome.folder)
        if at is None or not view.outcome.result:
            return
        for title, (steps, values) in _courses(view).items():
            if title == "Learning rate":  # of which there is no mean
                continue
            sums = self._sums.setdefault((at, title), {})
            for step, value in zip(steps, values, strict=True):
                if not math.isnan(value):
                    total, count = sums.get(step, (0.0, 0))
                    sums[step] = (total + value, count + 1)

    def figures(self, most: int) -> list[Figure]:
        """Those of each task."""
        found = []
        titles = list(dict.fromkeys(title for _, title in self._sums))
        for task in dict.fromkeys(cell.group.task for cell in self._cells):
            for title in titles:
                at = [
                    at for at, cell in enumerate(self._cells) if cell.group.task == task and self._sums.get((at, title))
                ]
                curves = [self._mean(number, title, color) for color, number in enumerate(at[:MOST_CURVES])]
                note = "the mean of the seeds" + (f"; the first {MOST_CURVES} methods" if len(at) > MOST_CURVES else "")
                found.append(draw_lines(f"{task}: {title[0].lower()}{title[1:]}", curves, most, note=note))
        return [figure for figure in found if figure]

    def _mean(self, at: int, title: str, color: int) -> Curve:
        sums = self._sums[at, title]
        steps = sorted(sums)
        means = [sums[step][0] / sums[step][1] for step in steps]
        return Curve(self._cells[at].group.name, steps, means, color, marked=not _by_step(title))
