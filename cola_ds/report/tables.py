"""Tables of tasks x methods. Neither torch nor pandas is needed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cola_ds.config.schema import RunConfig
from cola_ds.errors import inline, some_of
from cola_ds.report.statistics import holm, paired_t_test
from cola_ds.sweep.selection import Cell, Group, show_dev

_SIGNIFICANT = 0.05
_NOTE = 5000  # characters: names of several runs


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join("| " + " | ".join(inline(text).replace("|", "\\|") for text in line) + " |" for line in lines)


def _grid(cells: Sequence[Cell]) -> tuple[list[str], list[str], dict[tuple[str, str], Cell]]:
    """Tasks and method names in order of their first appearance, and the cells by both."""
    by_place = {(cell.group.task, cell.group.name): cell for cell in cells}
    return (
        list(dict.fromkeys(task for task, _ in by_place)),
        list(dict.fromkeys(name for _, name in by_place)),
        by_place,
    )


def score_table(cells: Sequence[Cell], paper: Mapping[tuple[str, str], str]) -> str:
    """Tasks x methods: mean and sample standard deviation of the test score, and the paper's own number where there is one.

    `paper` is by task and name. The best of a task is bold, among those that have all their seeds.
    """
    tasks, names, by_place = _grid(cells)
    rows = []
    for task in tasks:
        here = {name: by_place[task, name] for name in names if (task, name) in by_place}
        whole = [name for name, cell in here.items() if cell.scores and len(cell.scores) == len(cell.group.seeds)]
        shown = {name: f"{statistics.mean(here[name].scores.values()):.2f}" for name in whole}
        best = max(shown.values(), key=float, default="")
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
    """Each chain against LoRA of the same budget and first rank, over the seeds that both have; None without such a pair.

    Nothing is called better or worse unless its p-value, adjusted for all comparisons of the table, is below 0.05.
    """
    rows: list[list[str]] = []
    p_values: list[float | None] = []
    for lora, chain in itertools.permutations(cells, 2):
        if lora.group.task != chain.group.task or not _comparable(lora, chain):
            continue
        seeds = [seed for seed in lora.scores if seed in chain.scores]
        differences = [chain.scores[seed] - lora.scores[seed] for seed in seeds]
        if differences:
            p_values.append(paired_t_test(differences))
            mean = statistics.mean(differences)
            rows.append([lora.group.task, f"{chain.group.name} - {lora.group.name}", str(len(seeds)), f"{mean:+.2f}"])
    adjusted = iter(holm([p for p in p_values if p is not None]))
    for row, p in zip(rows, p_values, strict=True):
        after = None if p is None else next(adjusted)
        significant = after is not None and after < _SIGNIFICANT
        verdict = ("better" if row[3].startswith("+") else "worse") if significant else "no significant difference"
        row += ["-" if p is None else f"{p:.3g}", "-" if after is None else f"{after:.3g}", verdict]
    columns = ("task", "compared", "seeds", "mean difference", "p", "adjusted p", "")
    return markdown(columns, rows) if rows else None


def _comparable(lora: Cell, chain: Cell) -> bool:
    one, other = lora.config, chain.config
    if one is None or other is None or not (one.trains_lora and other.trains_lora):
        return False
    same = (one.lora_ranks[0], *budget(one)) == (other.lora_ranks[0], *budget(other))
    return same and one.chain.length == 1 and other.chain.length > 1


def budget(config: RunConfig) -> tuple[Any, ...]:
    """What the runs of a fair comparison have in common: base model, examples, optimizer, and how long it runs."""
    optim = config.optim
    return (
        config.model.path, config.data.num_train, optim.name, optim.epochs, optim.max_steps, optim.global_batch_size,
    )  # fmt: skip


def notes(cells: Sequence[Cell]) -> list[str]:
    """What is to be said below the tables: what was chosen on dev, and which runs failed, stopped or are missing."""
    lines = []
    chosen = [
        f"{cell.group.task} / {cell.group.name}: {cell.choice.point} (dev {show_dev(cell.choice.dev)})"
        for cell in cells
        if cell.choice.dev is not None
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
