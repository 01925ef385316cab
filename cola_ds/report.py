"""`cola-ds report`: runs side by side, as tables, as CSV and as pictures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cola_ds.config import RunConfig
from cola_ds.errors import UserError
from cola_ds.figures import draw_figures, draw_losses
from cola_ds.learnt import read_learnt, run_config
from cola_ds.report_files import check_csv, check_picture, csv_bytes, write_file
from cola_ds.tables import (
    Cell,
    Group,
    Outcome,
    budget,
    comparison_table,
    markdown,
    notes,
    one_line,
    read_cell,
    read_groups,
    read_outcome,
    score_table,
)  # fmt: skip

_COLUMNS = ("run", "method", "links", "steps", "held-out loss", "perplexity", "seconds", "peak memory (GiB)")

# The numbers of COLA's paper (arXiv 2401.04151). Columns: a method, a chain's length, or its LoRA ranks.
_PAPER = {
    "opt-1.3b": """lora cola-2 cola-3
        wsc 56.53±7.67 59.81±4.10 60.19±3.77
        squad 83.23±1.42 83.28±1.35 83.55±0.80
        multirc 68.94±3.06 69.44±1.55 70.63±2.12
        cb 75.35±4.84 76.78±6.38 76.42±4.97
        copa 75.8±2.40 76.8±1.83 76.8±1.60
        rte 72.49±2.39 72.63±1.46 74.15±1.36""",
    "llama-2-7b": """zero-shot icl full lora cola
        wsc 36.53 62.50 62.30 57.30 59.80
        rte 62.09 72.56 86.35 85.70 86.21
        copa 79.00 91.00 86.40 84.59 85.60
        squad 55.84 86.81 91.19 90.66 90.76""",
    "ranks": """lora (8,8) (8,6) (8,4) (8,2)
        cb 75.35 76.78 76.43;3.60e11 75.35;7.20e11 76.07;1.08e12
        wsc 56.53 59.81 58.26;4.28e10 57.30;8.56e10 57.30;1.28e11
        wic 63.47 63.51 63.85;5.21e11 64.04;1.04e12 63.19;1.56e12""",
    "sgd": """lora cola
        wsc 52.31 55.0
        cb 69.29 70.71
        wic 58.97 60.40
        copa 76.60 77.40
        squad 82.19 82.63""",
    "adagrad": """lora cola
        wsc 56.73 61.92
        cb 69.29 73.21
        wic 63.42 64.23
        copa 76.60 76.60
        squad 83.09 83.24""",
    "low-data": """lora cola
        sst2 89.80 90.00
        wsc 61.60 63.20
        cb 72.76 73.21
        wic 58.80 60.40
        boolq 61.60 64.19
        multirc 59.00 60.60
        rte 59.20 63.40
        squad 78.99 79.63
        drop 27.99 29.01
        copa 75.60 76.19
        record 70.00 70.20""",
}
PAPER_TABLES = tuple(_PAPER)


def report(paths: Sequence[str], plot: str | None, csv_file: str | None, paper: str | None, figures: str | None) -> str:
    """Markdown tables of runs, by their folders, a sweep's, or any folder above them. Raises UserError.

    `plot`: a PNG of loss curves; `csv_file`: a line a run; `paper`: the table of the paper whose numbers stand beside ours;
    `figures`: a folder for pictures of training loss, and of the score against chain length and LoRA rank.
    """
    if paper is not None and paper not in _PAPER:
        raise UserError(f"--paper {paper}: known are {', '.join(_PAPER)}")
    if csv_file is not None:  # before anything is read: what is asked for cannot be
        check_csv(Path(csv_file))
    if plot:
        check_picture("--plot", Path(plot))
    cells, plain, unfinished = _find(paths)
    tasks = [cell for cell in cells if not any(o.result and not o.is_task for o in cell.all)]
    if csv_file:
        every = [*cells, *(read_cell(_alone(name, outcome)) for name, outcome in plain.items())]
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
    return "\n\n".join([*parts, *notes(cells), *map(one_line, unfinished)])


def _task_tables(cells: Sequence[Cell], paper: str | None) -> list[str]:
    numbers = _paper_numbers(cells, paper) if paper else {}
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


def _paper_numbers(cells: Sequence[Cell], paper: str) -> dict[tuple[str, str], str]:
    """The paper's numbers for those of our cells that are like its own, by task and name."""
    columns, *rows = (line.split() for line in _PAPER[paper].splitlines())
    numbers = {(row[0], column): text for row in rows for column, text in zip(columns, row[1:], strict=True)}
    found = {}
    for cell in cells:
        if cell.config is None:
            continue
        task = next((outcome.result.get("task") for outcome in cell.finished), None) or cell.group.task
        for column in _paper_columns(cell.config, paper):
            if text := numbers.get((task, column)):
                found[cell.group.task, cell.group.name] = text.replace("±", " ±").replace(";", "; ")
    return found


def _paper_columns(config: RunConfig, paper: str) -> list[str]:
    """What that table of the paper calls this method; nothing if it has none of it."""
    if not config.trains_lora:
        return [config.method]
    optimizer = paper if paper in ("sgd", "adagrad") else "adamw"
    if config.optim.name != optimizer or (paper == "low-data" and config.data.num_train != 100):
        return []
    ranks = config.lora_ranks
    if len(ranks) == 1:
        return ["lora"] if ranks == [8] else []
    # Where the table says cola, the paper does not say how many links.
    return [f"({','.join(map(str, ranks))})", *(["cola", f"cola-{len(ranks)}"] if set(ranks) == {8} else [])]


# -- finding runs ------------------------------------------------------------------------------------------------------


def _find(paths: Sequence[str]) -> tuple[list[Cell], dict[str, Outcome], list[str]]:
    """Cells of tasks and sweeps; runs without a task, by the names to show them under; and what to say of those that have not
    finished."""
    by_sweep: dict[Path, list[Group]] = {}
    loose: dict[str, Path] = {}
    for path in map(Path, paths):
        if (path / "run.yaml").is_file() or (path / "result.json").is_file():
            if not (path / "result.json").is_file():
                read_learnt(path)  # says so
            loose[path.name if path.name not in loose else str(path)] = path
            continue
        sweeps = [found.parent for found in sorted(path.rglob("sweep.json"))]
        if not sweeps and (above := next((p for p in path.absolute().parents if (p / "sweep.json").is_file()), None)):
            raise UserError(f"{path} is a part of the sweep in {above}: name that, or a run")
        for sweep in sweeps:
            by_sweep.setdefault(sweep.resolve(), read_groups(sweep))
        marks = sorted({found.parent for found in path.rglob("run.json")})
        runs = [run for run in marks if not any(sweep in run.parents for sweep in sweeps)]
        if not sweeps and not runs:
            raise UserError(f"{path} holds no run")
        for run in runs:
            name = str(run.relative_to(path))
            loose[name if loose.get(name, run) == run else str(run)] = run
    configs: dict[str, RunConfig] = {}
    damaged: list[str] = []
    for name, run in loose.items():
        try:
            configs[name] = run_config(run)
        except UserError as error:
            damaged.append(f"Unreadable: {run}: {error}")
    if damaged and not configs and not by_sweep:
        raise UserError(one_line(damaged[0].partition(": ")[2]))
    outcomes = {name: read_outcome(loose[name], config.run.seed) for name, config in configs.items()}
    if len(loose) == len(outcomes) == 1 and not by_sweep:  # nothing beside it to show
        (outcome,) = outcomes.values()
        if outcome.damaged:
            raise UserError(outcome.why)
    tasks = {name: _task_of(outcome, configs[name]) for name, outcome in outcomes.items()}
    groups = _group([(task, configs[name], outcomes[name].folder) for name, task in tasks.items() if task])
    groups = [*_told_apart(by_sweep, {group.task for group in groups}), *groups]
    plain = {name: outcome for name, outcome in outcomes.items() if not tasks[name]}
    cells = [read_cell(group) for group in groups]
    unfinished = [
        f"Failed: {outcome.folder}: {outcome.why}" if outcome.why else f"Not finished: {outcome.folder}"
        for outcome in plain.values()
        if not outcome.result
    ]
    return cells, {name: outcome for name, outcome in plain.items() if outcome.result}, [*unfinished, *damaged]


def _told_apart(by_sweep: Mapping[Path, list[Group]], elsewhere: set[str]) -> list[Group]:
    """The groups of all sweeps. A task of several of them is named by its sweep as well: its runs there are not those here."""
    tasks = {folder: {group.task for group in groups} for folder, groups in by_sweep.items()}
    seen = Counter([*elsewhere, *(task for of_sweep in tasks.values() for task in of_sweep)])
    folders = Counter(folder.name for folder in by_sweep)
    names = {folder: folder.name if folders[folder.name] == 1 else str(folder) for folder in by_sweep}
    return [
        replace(group, task=f"{group.task} ({names[folder]})") if seen[group.task] > 1 else group
        for folder, groups in by_sweep.items()
        for group in groups
    ]


def _task_of(outcome: Outcome, config: RunConfig) -> str | None:
    named = outcome.result.get("task") or config.data.task
    return Path(named).stem if named and named.endswith((".yaml", ".yml")) else named


def _group(runs: list[tuple[str, RunConfig, Path]]) -> list[Group]:
    """Runs that no sweep has made, as groups: those of a task that differ by their seeds alone. What else they differ by is part
    of the method's name."""
    values: dict[tuple[str, str, str], set[str]] = {}
    for task, config, _ in runs:
        for key, value in _facts(config).items():
            values.setdefault((task, _method_name(config), key), set()).add(value)
    varying = {(method, key) for (_, method, key), found in values.items() if len(found) > 1}
    groups: dict[tuple[str, str], dict[int, Path]] = {}
    for task, config, path in runs:
        method = _method_name(config)
        parts = [f"{key.rpartition('.')[2]}={text}" for key, text in _facts(config).items() if (method, key) in varying]
        seeds = groups.setdefault((task, " ".join([method, *parts])), {})
        if config.run.seed in seeds:
            raise UserError(f"{seeds[config.run.seed]} and {path} are the same run twice: name one of them")
        seeds[config.run.seed] = path
    every = tuple(sorted({config.run.seed for _, config, _ in runs}))
    return [
        Group(task, name, {("", s): seeds.get(s, Path(f"{task}/{name}/seed={s}")) for s in every}, ("",), every, every)
        for (task, name), seeds in groups.items()
    ]


def _alone(name: str, outcome: Outcome) -> Group:
    """A run without a task, as a group of itself."""
    return Group("", name, {("", outcome.seed): outcome.folder}, ("",), (outcome.seed,), (outcome.seed,))


def _method_name(config: RunConfig) -> str:
    return f"cola-{config.chain.length}" if config.method == "cola" else config.method


def _facts(config: RunConfig) -> dict[str, str]:
    """What tells runs of a task and a method apart, besides their seeds."""
    sections = config.model_dump(exclude={"run", "checkpoint", "deepspeed", "method"}, mode="json")
    flat = {f"{section}.{key}": str(value) for section, values in sections.items() for key, value in values.items()}
    return {key: text for key, text in flat.items() if key not in ("data.task", "data.dir", "chain.length")}


# -- tables and pictures -----------------------------------------------------------------------------------------------


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
