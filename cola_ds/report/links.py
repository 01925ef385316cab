"""What the links of runs have learnt, as a table: of runs with chain.diagnostics or data.watch."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_ds.errors import UserError, counted, some_of
from cola_ds.report.tables import Table
from cola_ds.run.marker import Marker

_Rows = Sequence[Mapping[str, Any]]
COLUMNS = (
    "run", "link", "to step", "rank", "norm", "rounding error", "effective rank", "of the sum", "rows overlap", "columns overlap",
    "held-out", "watched", "intruders",
)  # fmt: skip
LEGEND = (
    "Links, at their knots; a run without links at its end. Effective ranks, and the share of a link's row and column space that"
    " lies in those of the sum before it: means over layers. Watched: loss on data.watch, and its change since the start."
    " Intruders: in how many layers."
)


def looked_at(runs: Mapping[str, Path]) -> dict[str, Path]:
    """Those of some runs, by name, whose links or whose data.watch were looked at."""
    files = ("links.jsonl", "watch.jsonl")
    return {name: run for name, run in runs.items() if any((run / file).is_file() for file in files)}


def links_table(runs: Mapping[str, Path], skip_damaged: bool = False) -> Table | None:
    """A row a link of each of the runs; None where there is none. Raises UserError for a row that is damaged, unless such rows
    are to be left out."""
    if not runs:
        return None
    from cola_ds.run.folder import RunDir  # and with it torch, which takes longer than a report that has no such runs

    found: list[list[str]] = []
    for name, run in runs.items():
        folder = RunDir(run)
        evaluations, watched, knots = (
            folder.rows(file, skip_damaged) for file in ("evals.jsonl", "watch.jsonl", "knots.jsonl")
        )
        found += [[name, *row] for row in link_rows(evaluations, watched, knots)]
    return Table(COLUMNS, found) if found else None


def earlier_note(runs: Mapping[str, Path]) -> str:
    """What to say of runs that went on from others' links, which `cola-ds export --upto` counts first; empty where none did."""
    before: dict[str, int] = {}
    for name, run in runs.items():
        with contextlib.suppress(UserError):
            marker = Marker.read(run)
            before[name] = len(marker.facts["earlier"]) if marker else 0
    each = [f"{name} has {counted(links, 'link')} before its own" for name, links in before.items() if links]
    return f"A run's own links: {some_of(each)}, which cola-ds export --upto counts, too." if each else ""


def link_rows(evals: _Rows, watch: _Rows, knots: _Rows) -> list[list[str]]:
    """A run's links, by the rows of its evals.jsonl, watch.jsonl and knots.jsonl: texts by COLUMNS but the first."""
    evaluations = {row["step"]: row for row in evals if row.get("split") != "test"}
    watched = {row["step"]: row.get("loss") for row in of_last_set(watch)}
    found = []
    if not knots:  # method full has no links, nor has an evaluation alone
        for step in [step for step in watched if step] or list(watched):
            seen = _watched(watched[step], watched.get(0) if step else None)
            found.append(["-", str(step), *["-"] * 7, _held_out(evaluations.get(step, {})), seen, "-"])
    for knot in knots:
        step, intruders = knot["step"], knot.get("intruders")
        found.append(
            [
                str(knot["link"]), str(step), str(knot["lora_rank"]), f"{knot['delta_norm']:.4g}",
                _number(knot.get("rounding_error"), ".2%"), _number(knot.get("effective_rank"), ".2f"),
                _number(knot.get("sum_effective_rank"), ".2f"), _number(knot.get("row_overlap"), ".3f"),
                _number(knot.get("column_overlap"), ".3f"), _held_out(evaluations.get(step, {})),
                _watched(watched.get(step), watched.get(0)),
                "-" if intruders is None else f"{intruders} ({knot.get('intruder_layers', '?')})",
            ]
        )  # fmt: skip
    return found


def of_last_set(watch: _Rows) -> _Rows:
    """Rows of watch.jsonl without those of a data.watch that was exchanged for another. (Old rows do not say whose they are.)"""
    return [row for row in watch if row.get("data") in (None, watch[-1].get("data"))]


def means(lists: Iterable[Sequence[float | None]]) -> list[float]:
    """The mean of each place over the lists that have a number there; NaN where none has."""
    places = [[value for value in values if value is not None] for values in itertools.zip_longest(*lists)]
    return [_mean(values) for values in places]


def _mean(values: Sequence[float]) -> float:
    try:
        return statistics.fmean(values) if values else math.nan
    except OverflowError:  # of a damaged file
        return math.nan


def overlaps(by_link: Mapping[int, list[float]]) -> list[list[float]]:
    """A square of links by earlier links, both from 1: NaN where there is no earlier one, and for links that nobody looked at
    (chain.diagnostics may be switched on under way)."""
    size = max(by_link)
    rows = [by_link.get(link, [])[:size] for link in range(1, size + 1)]
    return [[*row, *[math.nan] * (size - len(row))] for row in rows]


def _held_out(row: Mapping[str, Any]) -> str:
    """A loss, or a task's score on dev, in points."""
    if row.get("loss") is not None:
        return _number(row["loss"], ".4f")
    return f"{100 * row['score']:.2f}" if "score" in row else "-"


def _watched(loss: float | None, at_start: float | None) -> str:
    change = f" ({loss - at_start:+.4f})" if loss is not None and at_start is not None else ""
    return _number(loss, ".4f") + change


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
