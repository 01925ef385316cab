"""Run discovery: the runs below folders, and groups of those that differ by their seed alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError, inline
from cola_ds.report.cells import Cell, read_cell
from cola_ds.run.learnt import read_learnt, run_config
from cola_ds.sweep.groups import Group, read_groups
from cola_ds.sweep.outcomes import Outcome, read_outcome


@dataclass(frozen=True)
class Found:
    """What lies below the folders of a report."""

    cells: list[Cell]
    """Of tasks and sweeps."""
    plain: dict[str, Outcome]
    """Finished runs without a task, by the names to show them under."""
    unfinished: list[str]
    """What to say of those that have not finished, or cannot be read."""
    loose: dict[str, Outcome]
    """All runs that are of no sweep, whatever their state, by the names to show them under."""


def find_runs(paths: Sequence[str], any_state: bool = False) -> Found:
    """Find the runs and sweeps of these folders, and of all below them. Raises UserError, also where a run is all there is and it
    has not finished or is damaged, unless `any_state`."""
    by_sweep, loose = _scan(paths, any_state)
    configs: dict[str, RunConfig] = {}
    damaged: list[str] = []
    for name, run in loose.items():
        try:
            configs[name] = run_config(run)
        except UserError as error:
            damaged.append(f"Unreadable: {run}: {error}")
    if damaged and not configs and not by_sweep and not any_state:
        raise UserError(inline(damaged[0].partition(": ")[2]))
    outcomes = {name: read_outcome(loose[name], config.run.seed) for name, config in configs.items()}
    if len(loose) == len(outcomes) == 1 and not by_sweep and not any_state:  # nothing beside it to show
        (outcome,) = outcomes.values()
        if outcome.damaged:
            raise UserError(outcome.why)
    tasks = {name: _task_of(outcome, configs[name]) for name, outcome in outcomes.items()}
    groups = _group([(task, configs[name], outcomes[name].folder) for name, task in tasks.items() if task])
    groups = [*_told_apart(by_sweep, {group.task for group in groups}), *groups]
    plain = {name: outcome for name, outcome in outcomes.items() if not tasks[name]}
    unfinished = [
        f"Failed: {outcome.folder}: {outcome.why}" if outcome.why else f"Not finished: {outcome.folder}"
        for outcome in plain.values()
        if not outcome.result
    ]
    finished = {name: outcome for name, outcome in plain.items() if outcome.result}
    every = {name: outcomes.get(name) or read_outcome(run, 0) for name, run in loose.items()}
    return Found([read_cell(group) for group in groups], finished, [*unfinished, *damaged], every)


def _scan(paths: Sequence[str], any_state: bool) -> tuple[dict[Path, list[Group]], dict[str, Path]]:
    """The groups of every sweep, by its folder; and the folders of all other runs, by the names to show them under."""
    by_sweep: dict[Path, list[Group]] = {}
    loose: dict[str, Path] = {}
    for path in map(Path, paths):
        if (path / "run.yaml").is_file() or (path / "result.json").is_file():
            if not (path / "result.json").is_file() and not any_state:
                read_learnt(path)  # says so
            name = path.name or path.resolve().name
            loose[name if name not in loose else str(path)] = path
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
    return by_sweep, loose


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
        Group(
            task=task,
            name=name,
            paths={("", seed): seeds.get(seed, Path(f"{task}/{name}/seed={seed}")) for seed in every},
            points=("",),
            seeds=every,
            search_seeds=every,
        )
        for (task, name), seeds in groups.items()
    ]


def _method_name(config: RunConfig) -> str:
    return f"cola-{config.chain.length}" if config.method == "cola" else config.method


def _facts(config: RunConfig) -> dict[str, str]:
    """What tells runs of a task and a method apart, besides their seeds."""
    sections = config.model_dump(exclude={"run", "checkpoint", "deepspeed", "method"}, mode="json")
    flat = {f"{section}.{key}": str(value) for section, values in sections.items() for key, value in values.items()}
    return {key: text for key, text in flat.items() if key not in ("data.task", "data.dir", "chain.length")}
