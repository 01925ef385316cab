"""What the links of runs have learnt, as a table: of runs with chain.diagnostics or data.watch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_ds.report.tables import markdown

if TYPE_CHECKING:
    from cola_ds.run.folder import RunDir

_COLUMNS = (
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


def links_table(runs: Mapping[str, Path]) -> str | None:
    """A row a link of each of the runs; None where there is none. Raises UserError for a row that is damaged."""
    if not runs:
        return None
    from cola_ds.run.folder import RunDir  # and with it torch, which takes longer than a report that has no such runs

    rows = [row for name, run in runs.items() for row in _rows(name, RunDir(run))]
    return markdown(_COLUMNS, rows) if rows else None


def _rows(name: str, folder: RunDir) -> list[list[str]]:
    evaluations = {row["step"]: row for row in folder.rows("evals.jsonl") if row.get("split") != "test"}
    watched = {row["step"]: row.get("loss") for row in folder.rows("watch.jsonl")}
    found, knots = [], folder.rows("knots.jsonl")
    if not knots:  # method full has no links, nor has an evaluation alone
        for step in [step for step in watched if step] or list(watched):
            seen = _watched(watched[step], watched.get(0) if step else None)
            found.append([name, "-", str(step), *["-"] * 7, _held_out(evaluations.get(step, {})), seen, "-"])
    for knot in knots:
        step, intruders = knot["step"], knot.get("intruders")
        found.append(
            [
                name, str(knot["link"]), str(step), str(knot["lora_rank"]), f"{knot['delta_norm']:.4g}",
                _number(knot.get("rounding_error"), ".2%"), _number(knot.get("effective_rank"), ".2f"),
                _number(knot.get("sum_effective_rank"), ".2f"), _number(knot.get("row_overlap"), ".3f"),
                _number(knot.get("column_overlap"), ".3f"), _held_out(evaluations.get(step, {})),
                _watched(watched.get(step), watched.get(0)),
                "-" if intruders is None else f"{intruders} ({knot.get('intruder_layers', '?')})",
            ]
        )  # fmt: skip
    return found


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
