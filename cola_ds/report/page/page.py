"""A report as one page of HTML, without scripts and without anything from elsewhere: what runs are, were and came to."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cola_ds.errors import inline
from cola_ds.report.find import Found
from cola_ds.report.links import COLUMNS, LEGEND, earlier_note, link_rows
from cola_ds.report.page.chart import MOST_CURVES, shown
from cola_ds.report.page.compare import (
    RUN_COLUMNS,
    Intervals,
    MeanCurves,
    beside,
    differences,
    grid_table,
    run_row,
    sweep_intervals,
)
from cola_ds.report.page.figures import run_figures
from cola_ds.report.page.read import View, number_of, read_view
from cola_ds.report.tables import Bold, Table
from cola_ds.run.environment import version_of
from cola_ds.sweep.outcomes import Outcome

_MOST_RUNS = 200  # on a page
_FIGURES_OF_ALL = 24  # runs: of more each has its losses, scores and learning rate alone
_ROWS_OF_A_FIGURE, _ROWS_OF_ALL, _LEAST_ROWS = 400, 12_000, 40
_OPEN = 2  # runs: of more each is folded away
_MOST_KNOTS = 40  # in a figure of several runs
_MOST_CELL = 300  # characters
_MOST_TABLE = 400  # rows of a table that is no figure's


def make_page(paths: Sequence[str], found: Found, said: Sequence[Table | str]) -> str:
    """The page, but for its first line (files.page_bytes), of the runs that were found below `paths`; `said` is what the report
    prints. No more than one run's rows, and the losses of those drawn together, are in memory at a time."""
    named = _named(paths, found)
    runs = dict(list(named.items())[:_MOST_RUNS])
    most = max(_LEAST_ROWS, min(_ROWS_OF_A_FIGURE, _ROWS_OF_ALL // max(len(runs), 1)))
    means, views, of_runs, knots = MeanCurves(found.cells), [], [], set[float]()
    for at, (name, outcome) in enumerate(runs.items()):
        view = read_view(name, outcome)
        if len(runs) > MOST_CURVES:
            means.take(view)
        of_runs.append(_of_run(view, most, few=len(runs) > _FIGURES_OF_ALL))
        if at < MOST_CURVES:
            knots |= {number_of(knot["step"]) for knot in view.knots_within}
        else:
            view.metrics, view.evals = {}, []  # no figure has them together with others
        view.knots, view.layers, view.watch, view.events = [], [], [], []
        views.append(view)
    averaged = means.figures(most) if len(runs) > MOST_CURVES else []
    first = [] if averaged or len(runs) < 2 else views[:MOST_CURVES]
    return _render(
        runs=of_runs,
        runs_table=Table(RUN_COLUMNS, [run["row"] for run in of_runs]),
        beside=averaged or beside(first, len(views), most, sorted(knots) if len(knots) <= _MOST_KNOTS else []),
        intervals=[*_with_several(sweep_intervals(found.cells))],
        grid=grid_table(found.cells),
        differences=differences(views),
        said=said if len(runs) > 1 else [],
        left_out=len(named) - len(runs),
        few=len(runs) > _FIGURES_OF_ALL,
        most=most,
        opened=len(runs) <= _OPEN,
        legend=LEGEND,
        version=version_of("cola_ds"),
        now=datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds"),
    )


def _named(paths: Sequence[str], found: Found) -> dict[str, Outcome]:
    """All runs that have begun, once each, by the names to show: those of no sweep, then a sweep's, the chosen ones first."""
    runs = dict(found.loose)
    seen = {outcome.folder for outcome in runs.values()}
    chosen = [outcome for cell in found.cells for outcome in cell.chosen]
    for outcome in [*chosen, *(outcome for cell in found.cells for outcome in cell.others)]:
        if outcome.folder in seen or outcome.state == "missing":
            continue
        seen.add(outcome.folder)
        above = next((path for path in paths if Path(path) in outcome.folder.parents), None)
        name = str(outcome.folder.relative_to(above) if above else outcome.folder)
        runs[name if name not in runs else str(outcome.folder)] = outcome
    return runs


def _with_several(found: Sequence[Intervals]) -> list[Intervals]:
    """Those tasks that have more than one run: of a single one there is no interval, and nothing to compare."""
    return [
        each
        for each in found
        if len(each.table.rows) > 1 or not all(row[2].endswith(" of 1") for row in each.table.rows)
    ]


def _of_run(view: View, most: int, few: bool) -> dict[str, Any]:
    """What the template shows of a run."""
    links = link_rows(view.evals, view.watch, view.knots)
    return {
        "name": view.name,
        "folder": str(view.outcome.folder),
        "state": view.state,
        "why": view.outcome.why,
        "damaged": view.damaged,
        "row": run_row(view),
        "figures": run_figures(view, most, few),
        "links": Table(COLUMNS[1:], links) if links else None,
        "earlier": earlier_note({view.name: view.outcome.folder}),
        "evaluations": None if few else _evaluations(view),
        "knots": None if few else _costs(view),
        "counts": sorted(view.event_counts.items()),
        "events": [_event(row) for row in view.events[-10 if few else None :]],
    }


def _evaluations(view: View) -> Table | None:
    """Each evaluation, with the link that it is of."""
    has_links = view.config.get("method") in ("lora", "cola")
    rows = [
        [
            str(row["step"]), str(row.get("link", "-")) if has_links else "-", str(row.get("split") or "held-out"),
            _value(row.get("loss")), _value(row.get("perplexity")),
            f"{row['metric']} {_value(row.get('score'))}" if row.get("metric") else "-",
        ]
        for row in view.evals[-_MOST_TABLE:]
    ]  # fmt: skip
    return Table(("step", "link", "of", "loss", "perplexity", "score"), rows) if rows else None


def _costs(view: View) -> Table | None:
    """What each knot changed and cost."""
    keys = {
        "loss_before": "loss before", "loss_after": "loss after", "tie_s": "tied in (s)", "rebuild_s": "next begun in (s)",
        "bytes_moved": "bytes moved", "peak_memory_bytes": "peak memory (bytes)", "moments_zeroed": "moments zeroed",
        "ended_by": "ended by",
    }  # fmt: skip
    there = [key for key in keys if any(row.get(key) is not None for row in view.knots)]
    rows = [[str(row["link"]), str(row["step"]), *(_value(row.get(key)) for key in there)] for row in view.knots]
    return Table(("link", "step", *(keys[key] for key in there)), rows[-_MOST_TABLE:]) if rows and there else None


def _value(value: Any) -> str:
    number = number_of(value)
    return shown(number) if number == number else "-" if value is None else str(value)


def _event(row: dict[str, Any]) -> list[str]:
    facts = {key: value for key, value in row.items() if key not in ("time", "event", "step")}
    return [
        str(row.get("time", "")),
        row["event"],
        _value(row.get("step")),
        ", ".join(f"{key} {_value(value)}" for key, value in facts.items()),
    ]


def _render(**parts: Any) -> str:
    """The page. Whatever stands in a run's files is text in it: every value is escaped, but for the charts, which are made of
    escaped texts."""
    files = resources.files(__package__)
    css = files.joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = _text
    environment.tests["bold"] = lambda text: isinstance(text, Bold)
    environment.tests["table"] = lambda part: isinstance(part, Table)
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(css=Markup(css), css_hash=digest, **parts)


def _text(value: str, most: int = _MOST_CELL) -> str:
    """A text of anybody's: in one line, and nothing in it that turns the direction of what stands beside it."""
    return inline(value, most)
