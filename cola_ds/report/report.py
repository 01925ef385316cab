"""`cola-ds report`: runs side by side, as tables, as CSV and as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError, inline
from cola_ds.report.figures import draw_figures, draw_losses
from cola_ds.report.files import check_csv, check_picture, csv_bytes, write_file
from cola_ds.report.find import alone, find
from cola_ds.report.paper import PAPER, paper_numbers
from cola_ds.report.tables import budget, comparison_table, markdown, notes, score_table
from cola_ds.sweep.outcomes import Outcome
from cola_ds.sweep.selection import Cell, read_cell

_COLUMNS = ("run", "method", "links", "steps", "held-out loss", "perplexity", "seconds", "peak memory (GiB)")


def report(paths: Sequence[str], plot: str | None, csv_file: str | None, paper: str | None, figures: str | None) -> str:
    """Markdown tables of runs, by their folders, a sweep's, or any folder above them. Raises UserError.

    `plot`: a PNG of loss curves; `csv_file`: a line a run; `paper`: the table of the paper whose numbers stand beside ours;
    `figures`: a folder for pictures of training loss, and of the score against chain length and LoRA rank.
    """
    if paper is not None and paper not in PAPER:
        raise UserError(f"--paper {paper}: known are {', '.join(PAPER)}")
    if csv_file is not None:  # before anything is read: what is asked for cannot be
        check_csv(Path(csv_file))
    if plot:
        check_picture("--plot", Path(plot))
    cells, plain, unfinished = find(paths)
    tasks = [cell for cell in cells if not any(o.result and not o.is_task for o in cell.all)]
    if csv_file:
        every = [*cells, *(read_cell(alone(name, outcome)) for name, outcome in plain.items())]
        rows = csv_bytes(_csv_row(cell, outcome) for cell in every for outcome in cell.all)
        write_file("--csv", Path(csv_file), rows)
    plain |= {str(o.folder): o for cell in cells if cell not in tasks for o in cell.all if o.result}
    if plot:
        curves = {name: outcome.folder for name, outcome in plain.items()}
        draw_losses(curves | {str(o.folder): o.folder for cell in tasks for o in cell.finished}, Path(plot))
    if figures:
        draw_figures(cells, Path(figures))
    parts = [markdown(_COLUMNS, [_row(name, outcome.result) for name, outcome in plain.items()])] if plain else []
    if tasks:
        parts += _task_tables(tasks, paper)
    return "\n\n".join([*parts, *notes(cells), *map(inline, unfinished)])


def _task_tables(cells: Sequence[Cell], paper: str | None) -> list[str]:
    numbers = paper_numbers(cells, paper) if paper else {}
    parts = [score_table(cells, numbers)]
    legend = (
        "Mean ± sample standard deviation of the test score x 100 (seeds); bold: the best that have all their seeds."
    )
    parts.append(legend + (f" In brackets: the paper's own, {paper}." if numbers else ""))
    if flops := _flops_table(cells):
        parts += [
            flops,
            "Training FLOPs of a run x 10^12, the mean over its seeds: Hugging Face's estimate; DeepSpeed's count.",
        ]
    if compared := comparison_table(cells):
        parts += [
            compared,
            "Paired t-test over the seeds that both have; adjusted (Holm) for all comparisons of this table.",
        ]
    if stepped := _rank_table(cells):
        parts += [
            stepped,
            "Score; training FLOPs saved against the chain that keeps its rank, over all seeds (how many).",
        ]
    return parts


def _row(name: str, result: dict[str, Any]) -> list[str]:
    scores = result["scores"]
    return [
        name,
        result["method"],
        str(result["links"]),
        str(result["steps"]),
        _number(scores.get("loss"), 4),
        _number(scores.get("perplexity"), 2),
        _number(result["wall_time_s"], 0),
        _number(result["peak_memory_bytes"], 2, 2**30),
    ]


def _number(value: float | None, places: int, unit: float = 1.0) -> str:
    """In that unit; "-" where the run has none."""
    return "-" if value is None else f"{value / unit:.{places}f}"


def _flops_table(cells: Sequence[Cell]) -> str | None:
    """What a run of each task and method has taken to train; None where nothing was trained."""
    lines: dict[str, dict[str, str]] = {}
    for cell in cells:
        if cell.config and cell.config.trains and cell.finished:
            texts = [_mean_flops(cell, key) for key in ("training_flops", "profiled_flops")]
            lines.setdefault(cell.group.task, {})[cell.group.name] = "; ".join(texts)
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    rows = [[task, *(line.get(name, "-") for name in names)] for task, line in lines.items()]
    return markdown(["task", *names], rows) if rows else None


def _mean_flops(cell: Cell, key: str) -> str:
    """Over the seeds whose runs could count it."""
    counted = [outcome.result[key] for outcome in cell.finished if outcome.result[key] is not None]
    return f"{statistics.mean(counted) / 1e12:.4g}" if counted else "-"


def _rank_table(cells: Sequence[Cell]) -> str | None:
    """Chains whose LoRA rank changes, and those of as many links and the same budget that keep its first: score, and the training
    FLOPs saved against the latter, over the seeds that both have. None without such a pair.
    """
    chains = [(cell, c) for cell in cells if (c := cell.config) and c.trains_lora and cell.scores]
    stepped = {(cell.group.task, _family(c)) for cell, c in chains if len(set(c.lora_ranks)) > 1}
    whole = {(cell.group.task, _family(c)): cell for cell, c in chains if len(set(c.lora_ranks)) == 1}
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for cell, config in chains:
        if (place := (cell.group.task, _family(config))) not in stepped & whole.keys():
            continue
        text, base = f"{statistics.mean(cell.scores.values()):.2f}", whole[place]
        if base is not cell:
            flops, of_base = _flops_by_seed(cell), _flops_by_seed(base)
            saved = [of_base[seed] - flops[seed] for seed in of_base if seed in flops]
            text += f"; {sum(saved):.2e} ({len(saved)})" if saved else "; -"
        ranks = f"({', '.join(map(str, config.lora_ranks))})"
        lines.setdefault((cell.group.name, ranks), {})[cell.group.task] = text
    tasks = list(dict.fromkeys(task for line in lines.values() for task in line))
    rows = [[*names, *(line.get(task, "-") for task in tasks)] for names, line in lines.items()]
    return markdown(["method", "LoRA ranks", *tasks], rows) if rows else None


def _flops_by_seed(cell: Cell) -> dict[int, float]:
    found = {outcome.seed: outcome.result["training_flops"] for outcome in cell.finished}
    return {seed: flops for seed, flops in found.items() if flops is not None}


def _family(config: RunConfig) -> tuple[Any, ...]:
    return config.chain.length, config.lora_ranks[0], *budget(config)


def _csv_row(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"task": cell.group.task, "name": cell.group.name, "state": outcome.state}
    row |= {"chosen": "yes" if outcome in cell.chosen else "no", "seed": outcome.seed, "folder": str(outcome.folder)}
    if config := outcome.config:
        row |= {"method": config.method}
        row |= {"lr": config.optim.lr, "optimizer": config.optim.name} if config.trains else {}
        row |= {"lora_ranks": " ".join(map(str, config.lora_ranks)) if config.trains_lora else ""}
        row |= {"num_train": config.data.num_train if config.data.task else None}
    if result := outcome.result:
        row |= {"dev": outcome.dev, "test": outcome.test if outcome.is_task else None}
        row |= {"metric": result["scores"].get("metric", "loss"), "best_step": result["scores"].get("best_step")}
        row |= {"links": result["links"], "steps": result["steps"]}
        row |= {"flops": result["training_flops"], "profiled_flops": result["profiled_flops"]}
        row |= {"seconds": result["wall_time_s"]}
    return row
