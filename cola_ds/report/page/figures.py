"""The figures of a page: of a run, of runs beside each other, and of a sweep; each with the table of what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from cola_ds.report.links import means, of_last_set
from cola_ds.report.page.chart import (
    MOST_CURVES,
    Curve,
    Interval,
    interval_chart,
    kept_places,
    line_chart,
    line_class,
    shown,
    square_chart,
)
from cola_ds.report.page.read import View, number_of

_GIB = 2**30
_MOST_LINKS = 64  # in a figure of links
_MOST_POINTS = 64  # of a spectrum
_LEAST_POINTS = 40  # of each curve, however many there are


@dataclass(frozen=True)
class Figure:
    """A chart with its words and its data."""

    title: str
    svg: Markup
    columns: Sequence[str]
    rows: list[list[str]]
    of_rows: int
    """How many there are in the run's folder; more than `rows` where a curve was thinned."""
    legend: list[tuple[str, str]]
    """Class of a curve, and its name; none for one curve alone."""
    note: str = ""


def draw_lines(
    title: str, curves: Iterable[Curve], most: int, x_name: str = "step", knots: Sequence[float] = (), note: str = ""
) -> Figure | None:
    """Curves in a figure whose table has about `most` rows, which they share; None where no curve has a value."""
    drawn = [curve for curve in curves if any(value == value for value in curve.ys)]
    if not drawn:
        return None
    at: set[float] = set()
    for curve in drawn:
        at |= {curve.xs[place] for place in kept_places(curve.ys, max(most // len(drawn), min(most, _LEAST_POINTS)))}
    of_rows = len({x for curve in drawn for x in curve.xs if x == x})
    thin = [_at(curve, at) for curve in drawn]
    values = [dict(zip(curve.xs, curve.ys, strict=True)) for curve in thin]
    rows = [[shown(x), *(shown(each.get(x, math.nan)) for each in values)] for x in sorted(at - {math.nan})]
    return Figure(
        title=title,
        svg=Markup(line_chart(_in_words(title, drawn), thin, x_name, knots)),
        columns=[x_name, *(curve.name for curve in drawn)],
        rows=rows,
        of_rows=of_rows,
        legend=[(line_class(c.color), c.name) for c in drawn] if len(drawn) > 1 else [],
        note=note,
    )


def _at(curve: Curve, at: set[float]) -> Curve:
    """The rows of a curve at those places of x."""
    places = [place for place, x in enumerate(curve.xs) if x in at]
    return replace(curve, xs=[curve.xs[place] for place in places], ys=[curve.ys[place] for place in places])


def _in_words(title: str, curves: Sequence[Curve]) -> str:
    """What a figure shows, for who cannot see it."""
    parts = []
    for curve in curves[:4]:
        values = [value for value in curve.ys if value == value]
        parts.append(f"{curve.name}: {len(values)} values, first {shown(values[0])}, last {shown(values[-1])}")
    return f"{title}. {'; '.join(parts)}"


def unit_of(view: View) -> str:
    """Of its losses. A task with candidates has one of them for each example."""
    return "nats" if view.config.get("data.task") else "nats per token"


def run_figures(view: View, most: int, few: bool) -> list[Figure]:
    """The figures of a run, with about `most` rows each; `few`: those of losses, scores and learning rate alone."""
    ends = [number_of(knot["step"]) for knot in view.knots_within]
    metrics, steps = view.metrics, view.metrics["step"]

    def of(title: str, *curves: Curve, note: str = "") -> Figure | None:
        return draw_lines(title, curves, most, knots=ends, note=note)

    def column(key: str, name: str, color: int = 0, unit: float = 1.0) -> Curve:
        values = metrics[key] if unit == 1 else [value / unit for value in metrics[key]]
        return Curve(name, steps, values, color)

    found = [of(f"Loss ({unit_of(view)})", column("loss", "training"), *_losses(view)), *_scores(view, of)]
    found.append(of("Learning rate", column("lr", "learning rate")))
    if not few:
        found += [
            of("Gradient norm", column("grad_norm", "gradient norm")),
            of("Tokens per second", column("tokens_per_s", "tokens per second")),
            of("Seconds of a step", column("step_s", "seconds of a step")),
            of("Waiting for examples (% of the time)", _waiting(view)),
            of("Memory (GiB)", column("memory_bytes", "peak so far, of the device that holds most", 0, _GIB)),
            of("TFLOP/s of a device", column("tflops", "TFLOP/s")),
            *_link_figures(view),
        ]
    return [figure for figure in found if figure]


def _waiting(view: View) -> Curve:
    steps, seconds, waited = (view.metrics[key] for key in ("step", "step_s", "data_wait_s"))
    shares = [100 * of_it / whole if whole > 0 else math.nan for whole, of_it in zip(seconds, waited, strict=True)]
    return Curve("waiting (%)", steps, shares)


def _losses(view: View) -> list[Curve]:
    held_out = [row for row in view.evals if row.get("loss") is not None]
    return [
        Curve(name, [number_of(r["step"]) for r in rows], [number_of(r.get("loss")) for r in rows], color, marked=True)
        for color, name, rows in ((1, "held-out", held_out), (2, "data.watch", of_last_set(view.watch)))
    ]


def _scores(view: View, of: Any) -> list[Figure | None]:
    """A task's scores, on dev and on test."""
    curves = []
    for color, split in enumerate(("dev", "test")):
        rows = [row for row in view.evals if row.get("split") == split and "score" in row]
        steps, scores = [number_of(row["step"]) for row in rows], [100 * number_of(row["score"]) for row in rows]
        curves.append(Curve(split, steps, scores, color, marked=True))
    metric = next((row["metric"] for row in view.evals if row.get("metric")), "score")
    return [of(f"Score x 100 ({metric})", *curves)]


def _link_figures(view: View) -> list[Figure | None]:
    """What is known of each link, at its knot: nothing of a single one that a table does not say better."""
    knots = view.knots[-_MOST_LINKS:]
    by_link = [number_of(knot["link"]) for knot in knots]

    def of(title: str, *names: tuple[str, str], unit: float = 1.0) -> Figure | None:
        curves = [
            Curve(name, by_link, [number_of(knot.get(key)) * unit for knot in knots], color, marked=True)
            for color, (name, key) in enumerate(names)
        ]
        return draw_lines(title, curves, _MOST_LINKS, x_name="link") if len(knots) > 1 else None

    rounded = any(number_of(knot.get("rounding_error")) > 0 for knot in knots)  # in fp32 nothing is
    return [
        of("Norm of each link", ("norm", "delta_norm")),
        of("Rounding error at each knot (%)", ("rounding error", "rounding_error"), unit=100.0) if rounded else None,
        of("Effective rank", ("of the link", "effective_rank"), ("of the sum so far", "sum_effective_rank")),
        of("Overlap with the sum before", ("row space", "row_overlap"), ("column space", "column_overlap")),
        *_spectra(view.layers),
    ]


def _spectra(layers: Sequence[Mapping[str, Any]]) -> list[Figure | None]:
    """Singular values and overlaps of links.jsonl, means over layers; of the last links, where there are many."""
    links: dict[int, list[Mapping[str, Any]]] = {}
    for row in layers:
        links.setdefault(row["link"], []).append(row)
    last = sorted(links)[-MOST_CURVES:]
    mean = "mean over layers" + (f", of the last {MOST_CURVES} links" if len(links) > MOST_CURVES else "")
    found: list[Figure | None] = []
    for key, what in (("singular_values", "of each link"), ("sum_singular_values", "of the sum so far")):
        curves = []
        for color, link in enumerate(last):
            values = [number_of(value) for value in means(row[key] for row in links[link])[:_MOST_POINTS]]
            curves.append(Curve(f"link {link}", list(range(1, len(values) + 1)), values, color))
        most = _MOST_POINTS * max(len(curves), 1)
        found.append(draw_lines(f"Singular values {what} ({mean})", curves, most, x_name="number"))
    for key, what in (("row_overlaps", "row"), ("column_overlaps", "column")):
        found.append(_overlaps({link: means(row[key] for row in rows) for link, rows in links.items()}, what))
    return found


def _overlaps(by_link: Mapping[int, list[float]], what: str) -> Figure | None:
    """Shares of each link's spaces in those of each earlier one: of the first links, where there are many."""
    size = min(max(by_link, default=0), _MOST_LINKS)
    square = [[number_of(share) for share in by_link.get(link, [])[:size]] for link in range(1, size + 1)]
    if size < 2 or not any(share == share for row in square for share in row):
        return None
    rows = [[str(link), *map(shown, row), *["-"] * (size - len(row))] for link, row in enumerate(square, 1)]
    title = f"Share of each link's {what} space in those before (mean over layers)"
    svg = Markup(square_chart(title, square))
    return Figure(title, svg, ["link", *(f"in {link}" for link in range(1, size + 1))], rows, len(rows), [])


def draw_intervals(title: str, intervals: Sequence[Interval], x_name: str) -> Markup:
    """Means with their intervals, a line each."""
    words = "; ".join(f"{each.name}: {shown(each.mean)}" for each in intervals[:12])
    return Markup(interval_chart(f"{title}. {words}", intervals, x_name))
