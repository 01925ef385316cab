"""The study's two pictures."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any

from cola_ds.errors import UserError
from cola_ds.report.files import PNG_TEXT
from cola_ds.theory.chains import KINDS
from cola_ds.theory.study import SCALES, STEPS, ChainRow, GapRow, interval

_BATCHES = {"all": "true gradient", "fixed": "32 rows a step", "growing": "T rows a step"}


def pyplot() -> Any:
    """matplotlib, drawing into memory. Raises UserError without it."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figures need matplotlib: pip install 'cola_ds[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_gaps(plt: Any, rows: Sequence[GapRow]) -> bytes:
    """The mean gap by T beside its bound, of the two measured problems; and on the steep one in units of sqrt(M beta / T) D."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for ax, problem in zip(axes, ("least-squares", "robust-sensing"), strict=False):
        for color, (batch, label) in enumerate(_BATCHES.items()):
            mine = [row for row in rows if (row.problem, row.batch) == (problem, batch)]
            lengths = sorted({row.steps for row in mine})
            means = [interval([row.mean_gap for row in mine if row.steps == T]) for T in lengths]
            bounds = [statistics.fmean(row.corrected_bound for row in mine if row.steps == T) for T in lengths]
            ax.errorbar(
                lengths, [m for m, _, _ in means], [[m - low for m, low, _ in means], [high - m for m, _, high in means]],
                fmt="o-", capsize=3, color=f"C{color}", label=label,
            )  # fmt: skip
            ax.plot(lengths, bounds, ":", color=f"C{color}")
        _finish(ax, title=f"{problem}; dotted: corrected bound", xlabel="T", ylabel="mean Frank-Wolfe gap")
        ax.set_yscale("log")
    steep = [row for row in rows if row.problem == "steep"]
    lengths = [row.steps for row in steep]
    axes[2].plot(lengths, [row.mean_gap / row.unit for row in steep], "o-", label="mean gap")
    axes[2].plot(lengths, [row.mean_printed_gap / row.unit for row in steep], "s-", label="with the printed sign")
    axes[2].plot(
        lengths, [row.corrected_bound / row.unit for row in steep], ":", color="C0", label="corrected bound: 5/2"
    )
    axes[2].axhline(2, color="gray", linestyle="--", label="printed bound: 2")
    axes[2].set_yscale("log")
    _finish(axes[2], title="steep, where the printed bound fails", xlabel="T", ylabel="in units of D sqrt(M beta / T)")
    return _png(plt, figure)


def draw_chains(plt: Any, rows: Sequence[ChainRow]) -> bytes:
    """Loss by link at the step 1 / L and at one that all survive (the middle scale), and the last loss by step for each scale."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for ax, step in zip(axes, (1.0, STEPS[3]), strict=False):
        for color, kind in enumerate(KINDS):
            mine = [row for row in rows if (row.kind, row.scale, row.step) == (kind, SCALES[1], step)]
            for seed in sorted({row.seed for row in mine}):
                curve = [row for row in mine if row.seed == seed]
                label = kind if seed == mine[0].seed else None
                ax.plot(
                    [row.link for row in curve], [_shown(row.loss) for row in curve], color=f"C{color}", label=label
                )
        _finish(
            ax,
            title=f"step {_fraction(step)}, solution of scale {SCALES[1]:g}",
            xlabel="link",
            ylabel="loss, start = 1",
        )
        ax.set(xscale="linear", yscale="log", ylim=(1e-14, 1e4))
    for kind, marker in (("cola", "o-"), ("rac-lora", "s--")):
        for color, scale in enumerate(SCALES):
            last = max(row.link for row in rows)
            mine = [row for row in rows if (row.kind, row.scale, row.link) == (kind, scale, last)]
            worst = [_shown(max(row.loss for row in mine if row.step == step)) for step in STEPS]
            axes[2].plot(STEPS, worst, marker, color=f"C{color}", label=f"{kind}, scale {scale:g}")
    _finish(
        axes[2],
        title="worst seed after 100 links of 20 steps",
        xlabel="step, in units of 1 / L",
        ylabel="loss, start = 1",
    )
    axes[2].set(yscale="log", ylim=(1e-14, 1e4))
    return _png(plt, figure)


def _shown(loss: float) -> float:
    """A loss within the picture: what is outside runs along its edge."""
    return min(max(loss, 1e-14), 1e4)


def _fraction(step: float) -> str:
    return "1 / L" if step == 1 else f"1 / ({1 / step:g} L)"


def _finish(axes: Any, **labels: str) -> None:
    axes.set(xscale="log", **labels)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _png(plt: Any, figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format="png", metadata=PNG_TEXT)
    plt.close(figure)
    return content.getvalue()
