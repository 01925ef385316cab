"""Plots of `cola-ds report`: loss curves by step, and scores by chain length and LoRA rank."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_ds.config.switches import switches
from cola_ds.errors import UserError, inline
from cola_ds.report.cells import Cell, budget
from cola_ds.report.files import PNG_TEXT, check_picture, write_file
from cola_ds.report.links import means, overlaps
from cola_ds.run.atomic import file_name
from cola_ds.run.folder import RunDir

_NAMED = 12  # curves: the legend of more would hide them


def _pyplot(option: str) -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"{option} needs matplotlib: pip install 'cola_ds[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, option: str, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png", metadata=PNG_TEXT)
    pyplot.close(figure)
    check_picture(option, path)
    write_file(option, path, content.getvalue())


def _finish(axes: Any, legend: Mapping[str, Any] | None = None, **labels: str) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.3)
    if 0 < len(axes.get_legend_handles_labels()[0]) <= _NAMED:
        axes.legend(**legend or {})


def draw_losses(runs: Mapping[str, Path], path: Path) -> None:
    """Plot loss curves as a PNG: training and held-out loss of the named runs by step, with a dashed line at each knot. Raises
    UserError without matplotlib."""
    pyplot = _pyplot("--plot")
    figure, (train, held_out) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, run in runs.items():
        folder = RunDir(run)
        metrics = folder.rows("metrics.jsonl")
        evaluations = [row for row in folder.rows("evals.jsonl") if row.get("loss") is not None]
        knots = [row["step"] for row in folder.rows("knots.jsonl")][:-1]  # the last is the end of the run
        if not metrics:  # no training: a level to compare with
            if evaluations:
                held_out.axhline(evaluations[-1]["loss"], label=_label(name), color="gray", linestyle=":")
            continue
        (line,) = train.plot([r["step"] for r in metrics], _smoothed([_loss(r) for r in metrics]), label=_label(name))
        color = line.get_color()
        steps, losses = [r["step"] for r in evaluations], [r["loss"] for r in evaluations]
        held_out.plot(steps, losses, "o-", label=_label(name), color=color)
        for axes in (train, held_out):
            for knot in knots:
                axes.axvline(knot, color=color, linestyle="--", linewidth=0.8)
    for axes, what in ((train, "training loss (mean of 5 rows)"), (held_out, "held-out loss")):
        _finish(axes, title=f"{what}; dashed: knots", xlabel="step", ylabel="loss (nats per token)")
    _save(pyplot, figure, "--plot", path)


def draw_lengths(lengths: Mapping[str, Any], path: Path) -> None:
    """Plot the tokens of each split's examples, an array of ints, as histograms in a PNG. Raises UserError without matplotlib."""
    pyplot = _pyplot("--plot")
    figure, all_axes = pyplot.subplots(
        1, len(lengths), figsize=(5.5 * len(lengths), 4.2), layout="constrained", squeeze=False
    )
    for axes, (split, of_each) in zip(all_axes[0], lengths.items(), strict=True):
        axes.hist(of_each, bins=50)
        _finish(axes, title=f"{split}: {len(of_each):,} examples", xlabel="tokens", ylabel="examples")
    _save(pyplot, figure, "--plot", path)


def _loss(row: Mapping[str, Any]) -> float:
    return math.nan if row.get("loss") is None else row["loss"]


def _label(name: str) -> str:
    """A name as a legend shows it: matplotlib takes $ for mathematics, and leaves out what begins with _."""
    return " " * name.startswith("_") + inline(name, 100).replace("$", r"\$")


def _smoothed(values: list[float], width: int = 5) -> list[float]:
    """Mean over the last `width` values."""
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw_links(runs: Mapping[str, Path], folder: Path) -> None:
    """Plot what the links of each run have learnt, links-RUN.png: spectra of the links and of the sums so far, and overlaps of
    each link with those before it; means over layers. Runs without chain.diagnostics have none. Raises UserError without
    matplotlib."""
    pyplot = _pyplot("--figures")
    for name, run in runs.items():
        links: dict[int, list[dict[str, Any]]] = {}
        for row in RunDir(run).rows("links.jsonl"):
            links.setdefault(row["link"], []).append(row)
        if not links:
            continue
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
        for place, key, what in (
            (0, "singular_values", "of each link"),
            (1, "sum_singular_values", "of the sum so far"),
        ):
            for link, rows in links.items():
                values = means([row[key] for row in rows])
                axes[0, place].semilogy(range(1, len(values) + 1), values, "o-", markersize=3, label=f"link {link}")
            _finish(
                axes[0, place],
                title=f"{_label(name)}: singular values {what}",
                xlabel="number",
                ylabel="mean over layers",
            )
        for place, key, what in ((0, "row_overlaps", "row"), (1, "column_overlaps", "column")):
            shares = overlaps({link: means([row[key] for row in rows]) for link, rows in links.items()})
            size = len(shares)
            drawn = axes[1, place].imshow(shares, vmin=0, vmax=1, extent=(0.5, size + 0.5, size + 0.5, 0.5))
            axes[1, place].set(title=f"share of {what} spaces in those before", xlabel="earlier link", ylabel="link")
            figure.colorbar(drawn, ax=axes[1, place])
        _save(pyplot, figure, "--figures", folder / f"links-{file_name(name)}.png")


def draw_figures(cells: Sequence[Cell], folder: Path) -> None:
    """Plot a sweep. loss-TASK.png: training loss by method, the mean of its seeds. score-by-length.png, score-by-rank.png: test
    scores, where chains differ in that."""
    pyplot = _pyplot("--figures")
    for task in dict.fromkeys(cell.group.task for cell in cells):
        figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
        for cell in cells:
            curve = _mean_losses(cell) if cell.group.task == task else {}
            if curve:
                axes.plot(list(curve), _smoothed(list(curve.values())), label=_label(cell.group.name))
        _finish(axes, title=f"{_label(task)}: training loss", xlabel="step", ylabel="loss (mean of seeds and 5 rows)")
        _save(pyplot, figure, "--figures", folder / f"loss-{file_name(task)}.png")
    for by in ("length", "rank"):
        lines = _score_lines(cells, by)
        if not lines:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
        for line, points in lines.items():
            xs = sorted(points)
            spread = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
            axes.errorbar(xs, [statistics.mean(points[x]) for x in xs], spread, fmt="o-", capsize=3, label=_label(line))
        axes.set_xticks(sorted({x for points in lines.values() for x in points}))
        label = {"length": "chain length", "rank": "LoRA rank"}[by]
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # scores may lie anywhere
        _finish(axes, beside, title=f"test score by {label}", xlabel=label, ylabel="test score (mean ± deviation)")
        _save(pyplot, figure, "--figures", folder / f"score-by-{by}.png")


def _score_lines(cells: Sequence[Cell], by: str) -> dict[str, dict[int, list[float]]]:
    """Scores by chain length or LoRA rank, in lines of what else is the same. Chains whose rank changes are left out."""
    lines: dict[str, dict[int, list[float]]] = {}
    names: dict[tuple[Any, ...], str] = {}
    for cell in cells:
        config = cell.config
        if config and config.trains_lora and len(set(config.lora_ranks)) == 1 and cell.scores:
            length, lora_rank = config.chain.length, config.lora_ranks[0]
            x, rest = (length, f"rank {lora_rank}") if by == "length" else (lora_rank, f"length {length}")
            line = f"{cell.group.task}, {rest}, {config.optim.name}"
            here = f"{line}, {cell.group.name}" if line in names.values() else line  # of another budget, or other links
            line = names.setdefault((line, *switches(config), *budget(config)), here)
            if x in lines.get(line, {}):  # another way to make the same
                line += f", {cell.group.name}"
            lines.setdefault(line, {})[x] = list(cell.scores.values())
    return {line: points for line, points in lines.items() if len(points) > 1}


def _mean_losses(cell: Cell) -> dict[int, float]:
    """Training loss by step, over the seeds that logged it."""
    losses: dict[int, list[float]] = {}
    for outcome in cell.finished:
        for row in RunDir(outcome.folder).rows("metrics.jsonl"):
            if row.get("loss") is not None:
                losses.setdefault(row["step"], []).append(row["loss"])
    return {step: statistics.mean(values) for step, values in sorted(losses.items())}
