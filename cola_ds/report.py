"""`cola-ds report`: runs side by side, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cola_ds.errors import UserError
from cola_ds.rundir import RunFolder

_COLUMNS = ("run", "method", "links", "steps", "held-out loss", "perplexity", "seconds", "peak memory (GiB)")


def report(runs: list[str], plot: str | None) -> str:
    """A Markdown table of finished runs; with `plot`, also a PNG of their loss curves. Raises UserError."""
    folders = [RunFolder(run) for run in runs]
    rows = [_row(folder.path.name, folder.result()) for folder in folders]
    if plot:
        _plot(folders, Path(plot))
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(name: str, result: dict[str, Any]) -> list[str]:
    scores = result["scores"]
    return [
        name,
        result["method"],
        str(result["links"]),
        str(result["steps"]),
        f"{scores['loss']:.4f}" if scores else "-",
        f"{scores['perplexity']:.2f}" if scores else "-",
        f"{result['wall_time_s']:.0f}",
        f"{result['peak_memory_bytes'] / 2**30:.2f}",
    ]


def _plot(folders: list[RunFolder], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'cola_ds[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (train, held_out) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for folder in folders:
        metrics, evaluations = folder.rows("metrics.jsonl"), folder.rows("evals.jsonl")
        knots = [row["step"] for row in folder.rows("knots.jsonl")][:-1]  # the last is the end of the run
        if not metrics:  # no training: a level to compare with
            held_out.axhline(evaluations[-1]["loss"], label=folder.path.name, color="gray", linestyle=":")
            continue
        (line,) = train.plot(
            [r["step"] for r in metrics], _smoothed([r["loss"] for r in metrics]), label=folder.path.name
        )
        held_out.plot(
            [r["step"] for r in evaluations],
            [r["loss"] for r in evaluations],
            "o-",
            label=folder.path.name,
            color=line.get_color(),
        )
        for axes in (train, held_out):
            for knot in knots:
                axes.axvline(knot, color=line.get_color(), linestyle="--", linewidth=0.8)
    for axes, title in (
        (train, "training loss (mean of 5 rows); dashed: knots"),
        (held_out, "held-out loss; dashed: knots"),
    ):
        axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smoothed(values: list[float], width: int = 5) -> list[float]:
    """Mean over the last `width` values."""
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
