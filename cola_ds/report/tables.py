"""Tables: runs, scores of tasks x methods, training FLOPs, paired comparisons; and how Markdown has them. Neither torch nor
pandas is needed."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cola_ds.config.schema import RunConfig
from cola_ds.config.switches import switches
from cola_ds.errors import counted, inline, some_of
from cola_ds.report.cells import Cell, budget
from cola_ds.report.statistics import holm, paired_t_test
from cola_ds.run.scores import show_dev
from cola_ds.sweep.groups import Group
from cola_ds.sweep.outcomes import Outcome

_SIGNIFICANT = 0.05
_RUN_COLUMNS = ("run", "method", "links", "steps", "held-out loss", "perplexity", "seconds", "peak memory (GiB)")
NOTE = 5000
"""Characters of a footnote: it may name several runs."""


class Table(NamedTuple):
    """A table of texts, which may be anybody's: whoever shows it takes care that none becomes markup."""

    columns: Sequence[str]
    rows: list[list[str]]


class Bold(str):
    """A cell that is shown bold: the best of its row; what follows it in the cell is not."""

    follows: str = ""


_MARKUP = re.compile(
    r"[\\`*|~$<]"
    r"|_(?![^\W_])|(?<![^\W_])_"  # within a word it is no emphasis: names of keys stay as they are
    r"|(?<=\])\("  # a link
    r"|&(?=#?\w)"  # an entity
    r"|(?<=:)/(?=/)|(?<=www)\.|(?<=\w)@(?=\w)",  # what becomes a link by itself: an address
    re.IGNORECASE,
)
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def plain(text: str, most: int = 1000) -> str:
    """A text of others as Markdown, in a line or a cell: it is read as it is written, and becomes no markup."""
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], "\\" + found[0]), inline(text, most))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = (
        [plain(name) for name in columns],
        ["---"] * len(columns),
        *([_cell(text) for text in row] for row in rows),
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return f"**{plain(text)}**{plain(text.follows)}" if isinstance(text, Bold) else plain(text)


def run_table(runs: Mapping[str, Outcome]) -> Table:
    """Finished runs without a task, a row each."""
    return Table(_RUN_COLUMNS, [_run_row(name, outcome.result) for name, outcome in runs.items()])


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


def score_table(cells: Sequence[Cell], paper: Mapping[tuple[str, str], str]) -> Table:
    """Score table, tasks x methods: mean and sample standard deviation of the test score, and the paper's own where there is one;
    of what is no task, of the held-out loss.

    `paper` is by task and name. The best of a task is bold, among those that have all their seeds.
    """
    tasks, names, by_place = _grid(cells)
    rows = []
    for task in tasks:
        here = {name: by_place[task, name] for name in names if (task, name) in by_place}
        whole = [cell for cell in here.values() if cell.values and len(cell.values) == len(cell.group.seeds)]
        shown = {cell.group.name: cell.show(statistics.mean(cell.values.values())) for cell in whole}
        best = min(shown.items(), key=lambda each: here[each[0]].objective_of(float(each[1])), default=("", ""))[1]
        texts: list[str] = []
        for name in names:
            text = _score(here[name]) if name in here else "-"
            published = f" [{paper[task, name]}]" if (task, name) in paper else ""
            if shown.get(name) == best and len(shown) > 1:
                best_text = Bold(text)
                best_text.follows = published
                texts.append(best_text)
            else:
                texts.append(text + published)
        metrics = {o.result["scores"].get("metric", "loss") for cell in here.values() for o in cell.finished}
        rows.append([task, ", ".join(sorted(metrics)) or "-", *texts])
    return Table(["task", "metric", *names], rows)


def _score(cell: Cell) -> str:
    values, expected = list(cell.values.values()), len(cell.group.seeds)
    if not values:
        return "-"
    deviation = f" ±{cell.show(statistics.stdev(values))}" if len(values) > 1 else ""
    seeds = f"({expected})" if len(values) == expected else f"({len(values)} of {expected} seeds)"
    return f"{cell.show(statistics.mean(values))}{deviation} {seeds}"


def comparison_table(cells: Sequence[Cell]) -> Table | None:
    """Paired comparisons: each chain against LoRA of the same budget and first rank, over the seeds that both have.

    None without such a pair.
    Nothing is called better or worse unless its p-value, adjusted for all comparisons of the table, is below 0.05.
    """
    rows: list[list[str]] = []
    objectives: list[float] = []
    p_values: list[float | None] = []
    for lora, chain in itertools.permutations(cells, 2):
        if lora.group.task != chain.group.task or not _comparable(lora, chain):
            continue
        mine, theirs = chain.values, lora.values
        differences = [mine[seed] - theirs[seed] for seed in theirs if seed in mine]
        if differences:
            p_values.append(paired_t_test(differences))
            mean = statistics.mean(differences)
            objectives.append(chain.objective_of(mean))
            compared = f"{chain.group.name} - {lora.group.name}"
            rows.append([lora.group.task, compared, str(len(differences)), chain.show(mean, "+")])
    # Differences that are all the same have no test, but are a comparison too. (A single seed is none.)
    same = sum(p is None and int(row[2]) > 1 for row, p in zip(rows, p_values, strict=True))
    tested = [p for p in p_values if p is not None]
    adjusted = iter(holm([*tested, *[1.0] * same]) if tested else [])
    for row, objective, p in zip(rows, objectives, p_values, strict=True):
        after = None if p is None else next(adjusted)
        significant = after is not None and after < _SIGNIFICANT
        verdict = ("better" if objective < 0 else "worse") if significant else "no significant difference"
        row += ["-" if p is None else f"{p:.3g}", "-" if after is None else f"{after:.3g}", verdict]
    columns = ("task", "compared", "seeds", "mean difference", "p", "adjusted p", "")
    return Table(columns, rows) if rows else None


def _comparable(lora: Cell, chain: Cell) -> bool:
    one, other = lora.config, chain.config
    if one is None or other is None or not (one.trains_lora and other.trains_lora):
        return False
    same = (one.lora_ranks[0], *budget(one)) == (other.lora_ranks[0], *budget(other))
    return same and one.chain.length == 1 and other.chain.length > 1


def flops_table(cells: Sequence[Cell]) -> Table | None:
    """Training FLOPs of a run of each task and method; None where nothing was trained."""
    lines: dict[str, dict[str, str]] = {}
    for cell in cells:
        if cell.config and cell.config.trains and cell.finished:
            texts = [_mean_flops(cell, key) for key in ("training_flops", "profiled_flops")]
            lines.setdefault(cell.group.task, {})[cell.group.name] = "; ".join(texts)
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    rows = [[task, *(line.get(name, "-") for name in names)] for task, line in lines.items()]
    return Table(["task", *names], rows) if rows else None


def _mean_flops(cell: Cell, key: str) -> str:
    """Over the seeds whose runs could count it."""
    counted = [outcome.result[key] for outcome in cell.finished if outcome.result[key] is not None]
    return f"{statistics.mean(counted) / 1e12:.4g}" if counted else "-"


def rank_table(cells: Sequence[Cell]) -> Table | None:
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
    return Table(["method", "LoRA ranks", *tasks], rows) if rows else None


def _flops_by_seed(cell: Cell) -> dict[int, float]:
    found = {outcome.seed: outcome.result["training_flops"] for outcome in cell.finished}
    return {seed: flops for seed, flops in found.items() if flops is not None}


def _family(config: RunConfig) -> tuple[Any, ...]:
    return config.chain.length, config.lora_ranks[0], *switches(config), *budget(config)


def footnotes(cells: Sequence[Cell]) -> list[str]:
    """Footnotes of the tables: what was chosen on dev, and which runs failed, stopped or are missing. Texts of anybody's."""
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
            lines.append(f"{word}, {counted(len(found), 'run')}: {some_of(found)}.")
    return lines


def _waiting(group: Group) -> str:
    count = sum(seed not in group.search_seeds for seed in group.seeds)
    return f"; {counted(count, 'seed')} {'waits' if count == 1 else 'wait'} for it" if count else ""
