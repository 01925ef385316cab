"""`cola-ds report`: runs side by side, as Markdown tables, as CSV, as plots and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_ds.errors import UserError
from cola_ds.report.cells import Cell, cell_of_run
from cola_ds.report.files import check_csv, check_page, check_picture, csv_bytes, page_bytes, write_file
from cola_ds.report.find import find_runs
from cola_ds.report.links import LEGEND, earlier_note, links_table, looked_at
from cola_ds.report.paper import PAPER_TABLES, left_out, published_scores
from cola_ds.report.tables import (
    NOTE,
    Table,
    comparison_table,
    flops_table,
    footnotes,
    markdown,
    plain,
    rank_table,
    run_table,
    score_table,
)
from cola_ds.run.scores import as_dev
from cola_ds.sweep.outcomes import Outcome


def report(
    paths: Sequence[str],
    plot: str | None = None,
    csv_file: str | None = None,
    paper: str | None = None,
    figures: str | None = None,
    html: str | None = None,
) -> str:
    """Markdown tables of runs, by their folders, a sweep's, or any folder above them. Raises UserError.

    `plot`: a PNG of loss curves; `csv_file`: a line a run; `paper`: the table of the paper whose numbers stand beside ours;
    `figures`: a folder for plots of training loss, of the score against chain length and LoRA rank, and of what links learnt;
    `html`: a page of all that is known of the runs. With it runs of any state are shown, and damaged rows are left out.
    """
    if paper is not None and paper not in PAPER_TABLES:
        raise UserError(f"--paper {paper}: known are {', '.join(PAPER_TABLES)}")
    if csv_file is not None:  # before anything is read: what is asked for cannot be
        check_csv(Path(csv_file))
    if plot:
        check_picture("--plot", Path(plot))
    if html is not None:
        check_page(Path(html))
    found = find_runs(paths, any_state=html is not None)
    cells, finished = found.cells, found.plain
    tasks = [cell for cell in cells if not any(o.result and not o.is_task for o in cell.all)]
    if csv_file:
        every = [*cells, *(cell_of_run(name, outcome) for name, outcome in finished.items())]
        rows = csv_bytes(_csv_row(cell, outcome) for cell in every for outcome in cell.all)
        write_file("--csv", Path(csv_file), rows)
    finished = finished | {str(o.folder): o for cell in cells if cell not in tasks for o in cell.all if o.result}
    of_tasks = {str(o.folder): o.folder for cell in tasks for o in cell.finished}
    runs = {name: outcome.folder for name, outcome in finished.items()} | of_tasks
    if plot:
        from cola_ds.report.figures import draw_losses  # it takes torch, a second that tables alone do not need

        draw_losses(runs, Path(plot))
    if figures:
        from cola_ds.report.figures import draw_figures, draw_links

        draw_figures(cells, Path(figures))
        draw_links(looked_at(runs), Path(figures))
    shown: list[Table | str] = [run_table(finished)] if finished else []
    if links := links_table(looked_at(runs), skip_damaged=html is not None):
        shown += [links, f"{LEGEND} {earlier_note(looked_at(runs))}".rstrip()]
    if cells:
        shown += _task_tables(cells, tasks, paper)
    shown += [*footnotes(cells), *found.unfinished]
    if html is not None:
        from cola_ds.report.page.page import make_page

        beside = shown[1:] if finished else shown  # the page's own table of runs says more
        write_file("--html", Path(html), page_bytes(make_page(paths, found, beside)))
    return "\n\n".join(plain(part, NOTE) if isinstance(part, str) else markdown(*part) for part in shown)


def _task_tables(cells: Sequence[Cell], tasks: Sequence[Cell], paper: str | None) -> list[Table | str]:
    """Every table of tasks x methods, each with the line below it that says how to read it."""
    numbers = published_scores(tasks, paper) if paper else {}
    parts: list[Table | str] = [score_table(cells, numbers)]
    what = "the test score x 100" if len(tasks) == len(cells) else "the test score x 100, or of the held-out loss"
    legend = f"Mean ± sample standard deviation of {what} (seeds); bold: the best that have all their seeds."
    parts.append(legend + (f" In brackets: the paper's own, {paper}." if numbers else ""))
    parts += left_out(tasks) if paper else []
    if flops := flops_table(cells):
        parts += [
            flops,
            "Training FLOPs of a run x 10^12, the mean over its seeds: Hugging Face's estimate; DeepSpeed's count.",
        ]
    if compared := comparison_table(cells):
        parts += [
            compared,
            "Paired t-test over the seeds that both have; adjusted (Holm) for all comparisons of this table.",
        ]
    if stepped := rank_table(cells):
        parts += [
            stepped,
            "Score; training FLOPs saved against the chain that keeps its rank, over all seeds (how many).",
        ]
    return parts


def _csv_row(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """A run's row, by the columns of files.CSV_COLUMNS that it has something for."""
    row: dict[str, Any] = {"task": cell.group.task, "name": cell.group.name, "state": outcome.state}
    row |= {"chosen": "yes" if outcome in cell.chosen else "no", "seed": outcome.seed, "folder": str(outcome.folder)}
    if config := outcome.config:
        row |= {"method": config.method}
        row |= {"lr": config.optim.lr, "optimizer": config.optim.name} if config.trains else {}
        row |= {"lora_ranks": " ".join(map(str, config.lora_ranks)) if config.trains_lora else ""}
        row |= {"num_train": config.data.num_train if config.data.task else None}
    if result := outcome.result:
        row |= {"dev": as_dev(outcome.objective), "test": outcome.test if outcome.is_task else None}
        row |= {"metric": result["scores"].get("metric", "loss"), "best_step": result["scores"].get("best_step")}
        row |= {"links": result["links"], "steps": result["steps"]}
        row |= {"flops": result["training_flops"], "profiled_flops": result["profiled_flops"]}
        row |= {"seconds": result["wall_time_s"]}
    return row
