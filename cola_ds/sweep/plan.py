"""Sweep plan: a sweep's YAML, and the runs that follow from it, each with its config and its folder."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cola_ds.config.keys import names_file
from cola_ds.config.loading import apply_override, check_config, explain_some, keys_of
from cola_ds.config.parsing import parse_yaml, read_text
from cola_ds.config.schema import SECTIONS, RunConfig, is_task_file
from cola_ds.errors import UserError, cut, quoted, some_of
from cola_ds.run.atomic import file_name
from cola_ds.sweep.groups import Group
from cola_ds.sweep.outcomes import Outcome

PAPER_GRIDS = {
    "adamw": [1e-3, 8e-4, 5e-4, 1e-4, 5e-5],
    "sgd": [2e-3, 5e-3, 1e-2, 2e-2, 5e-2],
    "adagrad": [1e-3, 8e-4, 5e-4, 1e-4, 5e-5],
}
"""The learning rates that COLA's paper searches, by optimizer."""
_METHODS = get_args(RunConfig.model_fields["method"].annotation)
_NOT_TRAINED = ("zero-shot", "icl")
_MOST_RUNS = 10_000  # of a sweep: more than anyone waits for
_MOST_VALUES = 1000  # of a key of the grid
_LONGEST_NAME = 200  # bytes of a folder's name: file systems take 255
OWN_KEYS = {"run.dir": "dir", "run.seed": "seeds"}
"""Keys of a run that a sweep sets by itself, and what it takes them from."""
Overrides = dict[str, Any]


def _tasks(value: Any) -> Any:
    if value and (
        isinstance(value, dict) or (isinstance(value, list) and all(isinstance(t, str) and t for t in value))
    ):
        return value
    raise ValueError("must be a list of tasks, or names with what differs for each")


def _values(value: Any) -> Any:
    if value == "paper":
        return value
    if isinstance(value, list) and len(value) > _MOST_VALUES:
        raise ValueError(f"has {len(value):,} values, more than {_MOST_VALUES:,}")
    if not isinstance(value, list) or not value or any(a == b for a, b in itertools.combinations(value, 2)):
        raise ValueError("must be a list of different values, or paper")
    return value


def _methods(value: Any) -> Any:
    for name, overrides in value.items() if isinstance(value, dict) else ():
        if isinstance(overrides, dict) and "grid" in overrides:
            if not isinstance(overrides["grid"], dict):
                raise ValueError(f"{name}.grid must be keys with lists of values")
            for key, values in overrides["grid"].items():
                if not isinstance(key, str):
                    raise ValueError(f"{name}.grid has a key that is no text: {key!r}")
                try:
                    _values(values)
                except ValueError as error:
                    raise ValueError(f"{name}.grid.{key} {error}") from None
    return value


def _seeds(value: Any) -> Any:
    if value is None or value == "all":
        return value
    numbers = isinstance(value, list) and all(type(seed) is int and 0 <= seed < 2**31 for seed in value)
    if not value or not numbers or len(set(value)) < len(value):
        raise ValueError("must be a list of different whole numbers from 0")
    return value


def _launcher(value: Any) -> Any:
    if isinstance(value, str):
        command_words(value)
    return value


def command_words(text: str) -> list[str]:
    """The words of a command as a shell takes them apart. Raises ValueError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"is no command: {str(error).lower()}") from None
    if not words:
        raise ValueError("is no command: it is empty")
    return words


class Sweep(BaseModel):
    """The schema of a sweep's YAML. Paths in it are relative to the working directory."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    base: str = Field(min_length=1)
    """The YAML of a run: what all runs have in common."""
    dir: str = Field(min_length=1)
    """The sweep's folder; its runs lie below it."""
    tasks: Annotated[list[str] | dict[str, Overrides | None], BeforeValidator(_tasks)]
    """Values of data.task, or by name what differs from the base; data.task is the name unless that says otherwise."""
    methods: Annotated[dict[str, Overrides | None], BeforeValidator(_methods), Field(min_length=1)]
    """By name, what differs from the base; a name that is a method is the method, unless that says otherwise. `grid` among it is
    what is searched there instead, key by key."""
    grid: dict[str, Annotated[list[Any] | Literal["paper"], BeforeValidator(_values)]] = {}
    """By key, the values to search; a key that a task or a method sets is not searched there."""
    seeds: Annotated[list[int], BeforeValidator(_seeds)]
    """Values of run.seed that each task and method is run with."""
    search_seeds: Annotated[list[int] | Literal["all"] | None, BeforeValidator(_seeds)] = None
    """What the grid is searched with; null: the first of the seeds."""
    launcher: Annotated[str | None, Field(min_length=1), BeforeValidator(_launcher)] = None
    """A command that runs a run's YAML, such as ./launch/local.sh {run} 2; {run} stands for that file."""

    def task_overrides(self) -> dict[str, Overrides]:
        """By name of each task, what differs from the base."""
        if isinstance(self.tasks, list):
            return {_task_name(task): {"data.task": task} for task in self.tasks}
        given = {name: overrides or {} for name, overrides in self.tasks.items()}
        # A name is the task, unless that says otherwise.
        return {n: o if {"data.task", "data.train"} & o.keys() else {"data.task": n, **o} for n, o in given.items()}


@dataclass(frozen=True)
class Series:
    """The runs of one task with one method."""

    group: Group
    words: list[str]
    """What differs from the base, as section.key=value; so are the points of the grid."""
    points: dict[str, list[str]]
    configs: dict[str, RunConfig]


@dataclass(frozen=True)
class Run:
    """One run of the list that a sweep is."""

    index: int
    series: Series
    point: str | None
    """None: the one that is chosen, once it is known."""
    seed: int

    @property
    def purpose(self) -> str:
        """What it is for: the search of the grid, or the seeds at the point that is chosen."""
        return "seeds" if self.point is None else "search"

    def name(self, point: str | None) -> str:
        group = self.series.group
        return "/".join([group.task, group.name, *filter(None, ["?" if point is None else point]), f"seed={self.seed}"])

    def place(self, point: str) -> Path:
        return self.series.group.paths[point, self.seed]

    def is_done(self, point: str) -> bool:
        """Whether it has finished, and was of this config."""
        outcome = self.outcome(point)
        return outcome.state == "finished" and outcome.is_of(self.series.configs[point])

    def outcome(self, point: str) -> Outcome:
        return self.series.group.outcome(point, self.seed)


@dataclass(frozen=True)
class Plan:
    """A sweep that has been checked: its runs in order, the search first."""

    sweep: Sweep
    series: list[Series]
    runs: list[Run]
    common: list[str]
    """The command line's own overrides."""


def load_plan(path: str, common: list[str]) -> Plan:
    """Read and check a sweep and the config of every run in it. Raises UserError, in one line. Writes nothing."""
    sweep = _load_sweep(path)
    raw = read_yaml(sweep.base, "the base's YAML")
    for override in common:
        apply_override(raw, override)
    for names in (sweep.tasks, sweep.methods):
        if len({file_name(_task_name(name)) for name in names}) < len(names):
            raise UserError(f"{path}: two of {some_of(list(names))} have the same folder; name them otherwise")
    series = []
    for (task, of_task), (name, of_method) in itertools.product(sweep.task_overrides().items(), sweep.methods.items()):
        own = dict(of_method or {})
        grid = {**sweep.grid, **own.pop("grid", {})}
        here = {**of_task, **({"method": name} if name in _METHODS else {}), **own}
        _check_keys(path, here, [override.partition("=")[0] for override in common], grid)
        series.append(_make_series(sweep, raw, common, task, name, here, grid))
        if sum(len(one.points) * len(one.group.seeds) for one in series) > _MOST_RUNS:
            raise UserError(f"{path}: tasks, methods, grid and seeds make more than {_MOST_RUNS:,} runs; name fewer")
    runs: list[Run] = []
    for one in series:
        group = one.group
        seeds = group.search_seeds if len(group.points) > 1 else group.seeds
        runs += [Run(len(runs) + i, one, *at) for i, at in enumerate(itertools.product(group.points, seeds))]
    for one in series:
        if len(one.group.points) > 1:
            rest = [seed for seed in one.group.seeds if seed not in one.group.search_seeds]
            runs += [Run(len(runs) + i, one, None, seed) for i, seed in enumerate(rest)]
    return Plan(sweep, series, runs, common)


def _load_sweep(path: str) -> Sweep:
    raw = read_yaml(path, "the sweep's YAML")
    for key in sorted(map(str, raw.keys() - Sweep.model_fields.keys())):
        known = list(Sweep.model_fields)
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        raise UserError(
            f"{path}: unknown key {key}; {f'did you mean {nearest[0]}?' if nearest else 'known are ' + ', '.join(known)}"
        )
    try:
        sweep = Sweep.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {explain_some(error)}") from None
    grids = [sweep.grid, *((overrides or {}).get("grid", {}) for overrides in sweep.methods.values())]
    if "paper" in [values for grid in grids for key, values in grid.items() if key != "optim.lr"]:
        raise UserError(f"{path}: grid: paper stands for the paper's values of optim.lr, and of nothing else")
    return sweep


def read_yaml(path: str, what: str) -> dict[str, Any]:
    """A YAML file's keys. Raises UserError, which calls it `what`."""
    raw = parse_yaml(read_text(path, what), path)
    if not isinstance(raw, dict):
        raise UserError(f"{cut(path)} holds no keys")
    return raw


def _task_name(task: str) -> str:
    return Path(task).stem if is_task_file(task) else task


def _check_keys(path: str, here: Overrides, common: list[str], grid: dict[str, Any]) -> None:
    """Refuse keys that the sweep sets by itself, and overrides of the command line that it would set again."""
    for key in (*here, *grid, *common):
        if key in SECTIONS:  # it would replace all that the base says there
            raise UserError(
                f"{path}: {key} is a section: write its keys as {key}.{next(iter(keys_of([key])))}, with a dot"
            )
        if key in OWN_KEYS:
            raise UserError(f"{path}: {key} is set by the sweep: say {OWN_KEYS[key]} instead")
        if names_file(key) and key in grid:  # a point is named by its values
            raise UserError(f"{path}: grid: {key} is nothing to search: make each of its values a task or a method")
    for key in common:
        if key in here or key in grid:
            raise UserError(f"override {key}: the sweep's tasks, methods or grid set it; change it in {path}")


def _make_series(
    sweep: Sweep, raw: dict[str, Any], common: list[str], task: str, name: str, here: Overrides, grid: dict[str, Any]
) -> Series:  # fmt: skip
    words = [override_word(key, value) for key, value in here.items()]
    merged = dict(raw)
    for word in words:
        apply_override(merged, word)
    grid = {} if merged.get("method") in _NOT_TRAINED else {k: v for k, v in grid.items() if k not in here}
    try:
        grid_points = _points(grid, merged)
    except UserError as error:
        raise UserError(f"{task} / {name}: {error}") from None
    points = {_point_name(point): [override_word(*item) for item in point.items()] for point in grid_points}
    seeds = tuple(sweep.seeds)
    search = seeds if sweep.search_seeds == "all" else tuple(sweep.search_seeds or seeds[:1])
    folder = Path(sweep.dir) / _folder(file_name(task)) / _folder(file_name(name))
    paths = {(point, seed): folder / point / f"seed={seed}" for point in points for seed in {*seeds, *search}}
    if len(points) < len(grid_points):
        raise UserError(f"{task} / {name}: two points of the grid have the same name: {', '.join(points)}")
    search = search if len(points) > 1 else seeds
    group = Group(task=task, name=name, paths=paths, points=tuple(points), seeds=seeds, search_seeds=search)
    configs = {}
    for point, of_point in points.items():
        its_own = [override_word("run.seed", seeds[0]), override_word("run.dir", str(paths[point, seeds[0]]))]
        try:
            configs[point] = check_config(dict(raw), [*words, *of_point, *its_own], sweep.base)
        except UserError as error:
            raise UserError(f"{task} / {name}: {error}") from None
    if len(points) > 1 and not all(config.data.has_eval for config in configs.values()):
        raise UserError(
            f"{task} / {name}: nothing is held out by which the grid's best is chosen: name data.eval, or give data.eval_fraction"
        )
    return Series(group, [*common, *words], points, configs)


def _points(grid: dict[str, Any], merged: dict[str, Any]) -> list[Overrides]:
    """Every point of the grid, in the order in which it is written; one empty point where there is no grid."""
    optim = merged.get("optim")
    optimizer = optim.get("name", "adamw") if isinstance(optim, dict) else None
    if "paper" in grid.values() and "optim.name" in grid:
        raise UserError("grid.optim.lr paper goes by optim.name, which the grid varies: make each optimizer a method")
    if "paper" in grid.values() and merged.get("method") == "full":
        raise UserError(
            "grid.optim.lr paper is for LoRA and chains; full fine-tuning's rates depend on the model: give the method a grid of "
            "its own, like full: {grid: {optim.lr: [1.0e-6, 5.0e-6]}}"
        )
    paper = PAPER_GRIDS.get(str(optimizer), PAPER_GRIDS["adamw"])  # another name is refused with the run's config
    lists = [paper if values == "paper" else values for values in grid.values()]
    if math.prod(map(len, lists)) > _MOST_RUNS:
        raise UserError(f"grid has {math.prod(map(len, lists)):,} points; a sweep takes {_MOST_RUNS:,}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*lists)]


def override_word(key: str, value: Any) -> str:
    """A config override as the command line takes it: JSON is YAML, and a text that is its own YAML stays as it is."""
    if isinstance(value, str) and re.fullmatch(r"[\w./+=,-]+", value) and _is_its_own_yaml(value):
        return f"{key}={value}"
    return f"{key}={_text(value, quotes=True)}"


def _is_its_own_yaml(text: str) -> bool:
    try:
        return bool(parse_yaml(text, "it") == text)
    except UserError:  # such as a date that is none
        return False


def _point_name(point: Overrides) -> str:
    last = [key.rpartition(".")[2] for key in point]
    parts = (
        f"{name if last.count(name) == 1 else key}={file_name(_text(value))}"
        for name, (key, value) in zip(last, point.items(), strict=True)
    )
    return _folder(",".join(parts))


def _text(value: Any, quotes: bool = False) -> str:
    """A value as JSON; a text without its quotes, unless they are asked for."""
    if isinstance(value, str) and not quotes:
        return value
    try:
        return json.dumps(value, default=str, ensure_ascii=not quotes)
    except (TypeError, ValueError):  # keys that are dates, for one
        raise UserError(f"{quoted(value)} is no value of a run's config") from None


def _folder(name: str) -> str:
    """A folder's name. Raises UserError for one that no file system takes."""
    if len(name.encode()) > _LONGEST_NAME:
        raise UserError(f"{cut(name, 80)} is too long for a folder's name: say it in at most {_LONGEST_NAME} letters")
    return name
