"""Markdown tables: runs, scores of tasks x methods, training FLOPs, paired comparisons. Neither torch nor pandas is needed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cola_ds.config.schema import RunConfig
from cola_ds.errors import inline, some_of
from cola_ds.report.cells import Cell, budget
from cola_ds.report.statistics import holm, paired_t_test
from cola_ds.run.scores import score_objective, show_dev
from cola_ds.sweep.groups import Group
from cola_ds.sweep.outcomes import Outcome

_SIGNIFICANT = 0.05
_RUN_COLUMNS = ("run", "method", "links", "steps", "held-out loss", "perplexity", "seconds", "peak memory (GiB)")
_NOTE = 5000  # characters: names of several runs


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join("| " + " | ".join(inline(text).replace("|", "\\|") for text in line) + " |" for line in lines)


def run_table(runs: Mapping[str, Outcome]) -> str:
    """Finished runs without a task, a row each."""
    return markdown(_RUN_COLUMNS, [_run_row(name, outcome.result) for name, outcome in runs.items()])


def _run_row(name: str, result: Mapping[str, Any]) -> list[str]:
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


def _grid(cells: Sequence[Cell]) -> tuple[list[str], list[str], dict[tuple[str, str], Cell]]:
    """Tasks and method names in order of their first appearance, and the cells by both."""
    by_place = {(cell.group.task, cell.group.name): cell for cell in cells}
    return (
        list(dict.fromkeys(task for task, _ in by_place)),
        list(dict.fromkeys(name for _, name in by_place)),
        by_place,
    )


def score_table(cells: Sequence[Cell], paper: Mapping[tuple[str, str], str]) -> str:
    """Score table, tasks x methods: mean and sample standard deviation of the test score, and the paper's own where there is one.

    `paper` is by task and name. The best of a task is bold, among those that have all their seeds.
    """
    tasks, names, by_place = _grid(cells)
    rows = []
    for task in tasks:
        here = {name: by_place[task, name] for name in names if (task, name) in by_place}
        whole = [name for name, cell in here.items() if cell.scores and len(cell.scores) == len(cell.group.seeds)]
        shown = {name: f"{statistics.mean(here[name].scores.values()):.2f}" for name in whole}
        best = min(shown.values(), key=lambda text: score_objective(float(text)), default="")
        texts = []
        for name in names:
            text = _score(here[name]) if name in here else "-"
            if shown.get(name) == best and len(shown) > 1:
                text = f"**{text}**"
            texts.append(text + (f" [{paper[task, name]}]" if (task, name) in paper else ""))
        metrics = {o.result["scores"].get("metric", "?") for cell in here.values() for o in cell.finished if o.is_task}
        rows.append([task, ", ".join(sorted(metrics)) or "-", *texts])
    return markdown(["task", "metric", *names], rows)


def _score(cell: Cell) -> str:
    scores, expected = list(cell.scores.values()), len(cell.group.seeds)
    if not scores:
        return "-"
    deviation = f" ±{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    seeds = f"({expected})" if len(scores) == expected else f"({len(scores)} of {expected} seeds)"
    return f"{statistics.mean(scores):.2f}{deviation} {seeds}"


def comparison_table(cells: Sequence[Cell]) -> str | None:
    """Paired comparisons: each chain against LoRA of the same budget and first rank, over the seeds that both have.

    None without such a pair.
    Nothing is called better or worse unless its p-value, adjusted for all comparisons of the table, is below 0.05.
    """
    rows: list[list[str]] = []
    means: list[float] = []
    p_values: list[float | None] = []
    for lora, chain in itertools.permutations(cells, 2):
        if lora.group.task != chain.group.task or not _comparable(lora, chain):
            continue
        seeds = [seed for seed in lora.scores if seed in chain.scores]
        differences = [chain.scores[seed] - lora.scores[seed] for seed in seeds]
        if differences:
            p_values.append(paired_t_test(differences))
            means.append(statistics.mean(differences))
            compared = f"{chain.group.name} - {lora.group.name}"
            rows.append([lora.group.task, compared, str(len(seeds)), f"{means[-1]:+.2f}"])
    adjusted = iter(holm([p for p in p_values if p is not None]))
    for row, mean, p in zip(rows, means, p_values, strict=True):
        after = None if p is None else next(adjusted)
        significant = after is not None and after < _SIGNIFICANT
        verdict = ("better" if score_objective(mean) < 0 else "worse") if significant else "no significant difference"
        row += ["-" if p is None else f"{p:.3g}", "-" if after is None else f"{after:.3g}", verdict]
    columns = ("task", "compared", "seeds", "mean difference", "p", "adjusted p", "")
    return markdown(columns, rows) if rows else None


def _comparable(lora: Cell, chain: Cell) -> bool:
    one, other = lora.config, chain.config
    if one is None or other is None or not (one.trains_lora and other.trains_lora):
        return False
    same = (one.lora_ranks[0], *budget(one)) == (other.lora_ranks[0], *budget(other))
    return same and one.chain.length == 1 and other.chain.length > 1


def flops_table(cells: Sequence[Cell]) -> str | None:
    """Training FLOPs of a run of each task and method; None where nothing was trained."""
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


def rank_table(cells: Sequence[Cell]) -> str | None:
    """LoRA ranks: chains whose rank changes, and those of as many links and the same budget that keep its first: score, and the
    training FLOPs saved against the latter, over the seeds that both have. None without such a pair.
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


def footnotes(cells: Sequence[Cell]) -> list[str]:
    """Footnotes of the tables: what was chosen on dev, and which runs failed, stopped or are missing."""
    lines = []
    chosen = [
        f"{cell.group.task} / {cell.group.name}: {cell.choice.point} (dev {show_dev(cell.choice.objective)})"
        for cell in cells
        if cell.choice.objective is not None
    ]
    if chosen:
        lines.append(f"Chosen on dev: {'; '.join(chosen)}.")
    open_still = [
        f"{c.group.task} / {c.group.name}: {c.choice.why}{_waiting(c.group)}" for c in cells if c.choice.point is None
    ]
    if open_still:
        lines.append(f"Nothing chosen: {'. '.join(open_still)}.")
    outcomes = [outcome for cell in cells for outcome in cell.all]
    lines += [f"Failed: {o.folder}: {o.why}" for o in outcomes if o.state in ("failed", "diverged")]
    lines += [f"Unreadable: {o.folder}: {o.unreadable}" for o in outcomes if o.unreadable]
    for state, word in (("stopped", "Not finished"), ("missing", "Missing")):
        found = [str(outcome.folder) for outcome in outcomes if outcome.state == state]
        if found:
            lines.append(f"{word}, {len(found)} runs: {some_of(found)}.")
    return [inline(line, _NOTE) for line in lines]


def _waiting(group: Group) -> str:
    count = sum(seed not in group.search_seeds for seed in group.seeds)
    return f"; {count} seeds wait for it" if count else ""
