"""What runs of tasks have scored: the best point of a grid, and tables of tasks x methods. Neither torch nor pandas is needed."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import math
import re
import statistics
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cola_ds.config import RunConfig, flat_keys, is_free
from cola_ds.data.files import find_files
from cola_ds.errors import UserError, some_of
from cola_ds.learnt import is_run, read_learnt, run_config
from cola_ds.rows import read_sweep

LOG_MARK = "cola-ds sweep: "
"""What a sweep's own lines in a run's log begin with: the command of each start, and the exit status that it ended with."""
_SIGNIFICANT = 0.05
_NOTE = 5000  # characters: names of several runs
_COMPARED_APART = ("deepspeed", "data.task", "model.path", "run.seed")


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run has come to, by its folder and the log beside it."""

    folder: Path
    seed: int
    state: str
    """finished, failed, diverged (failed because something was not finite), stopped (it can go on) or missing."""
    why: str = ""
    """Of a failed run: its status and what it said last."""
    result: dict[str, Any] = field(default_factory=dict)
    """Of a finished run: its result.json."""
    damaged: bool = False
    """What is there is not what the run left."""

    @property
    def is_task(self) -> bool:
        return self.result.get("scores", {}).get("test") is not None

    @property
    def test(self) -> float:
        """The task's metric on the test examples, 0 to 1."""
        return self.result["scores"]["test"]

    @property
    def dev(self) -> float | None:
        """What a grid point is chosen by, the higher the better: the dev score; without a task, the held-out loss's negative."""
        scores = self.result.get("scores", {})
        if self.is_task:
            return scores["dev"]
        return None if scores.get("loss") is None else -scores["loss"]

    def is_of(self, config: RunConfig) -> bool:
        """Whether it is a run of this config, apart from its seed, and began after the last change of the files that this names.
        Where it is not, `cola-ds train` knows what matters."""
        mine = self.config
        if mine is None or not _same_content(mine.deepspeed, config.deepspeed):
            return False
        if not _same_content(mine.data.task, config.data.task):
            return False
        models = [Path(c.model.path).resolve() if Path(c.model.path).is_dir() else c.model.path for c in (mine, config)]
        theirs = [
            {k: v for k, v in flat_keys(c.model_dump()).items() if not is_free(k) and k not in _COMPARED_APART}
            for c in (mine, config)
        ]
        if models[0] != models[1] or theirs[0] != theirs[1]:
            return False
        return all(path.stat().st_mtime <= self._began_s for path in _files_of(config))

    @property
    def _began_s(self) -> float:
        """The start of the last attempt that ended well, which has compared itself with the files that were there."""
        marks = _marks(self.folder.with_name(self.folder.name + ".log"))
        begun = [start for start, end in itertools.pairwise(marks) if end == "exit status 0"]
        with contextlib.suppress(ValueError, IndexError, OverflowError):  # a log that others have written to
            return datetime.datetime.fromisoformat(begun[-1].split()[0]).timestamp()
        return (self.folder / "environment.json").stat().st_mtime

    @property
    def config(self) -> RunConfig | None:
        """The run's config; None where the run never began, or its run.yaml cannot be read."""
        return self._read_config if isinstance(self._read_config, RunConfig) else None

    @property
    def unreadable(self) -> str:
        """Why run.yaml cannot be read: it is damaged, or of another version."""
        return self._read_config if isinstance(self._read_config, str) else ""

    @functools.cached_property
    def _read_config(self) -> RunConfig | str | None:
        try:
            return run_config(self.folder) if is_run(self.folder) else None
        except UserError as error:
            return str(error)


def _same_content(one: str | None, other: str | None) -> bool:
    """Whether these are the same names, or files that say the same."""
    try:
        return one == other or bool(one and other and Path(one).read_bytes() == Path(other).read_bytes())
    except OSError:
        return False


def _files_of(config: RunConfig) -> Iterator[Path]:
    """The local files that a run of this config is made from."""
    data, links = config.data, Path(config.model.links or "")
    for name in (config.deepspeed, data.task):
        if name and Path(name).is_file():
            yield Path(name)
    for name in data.local_names:
        with contextlib.suppress(UserError):  # what cannot be read is said by the run
            yield from find_files(name)
    yield from Path(config.model.path).glob("*.json")
    yield from Path(config.model.path).glob("*.safetensors")
    if data.dir and data.task:
        for folder in (Path(data.dir), Path(data.dir, Path(data.task).stem)):
            yield from folder.glob("*.jsonl")
    if config.model.links:
        yield links / "result.json"


def read_outcome(folder: Path, seed: int) -> Outcome:
    """How far the run of that folder is. A start that was refused later than it finished makes it a failed one: what is there is
    not what the sweep asks for."""
    status, said = _last_start(folder.with_name(folder.name + ".log"))
    if (folder / "result.json").is_file() and status in (None, 0, 75):
        try:
            result = read_learnt(folder).result
        except UserError as error:
            return Outcome(folder, seed, "failed", str(error), damaged=True)
        if result["scores"].get("loss", 0.0) is None:  # as JSON has it, which knows no NaN
            return Outcome(folder, seed, "diverged", "its held-out loss is not finite")
        return Outcome(folder, seed, "finished", result=result)
    if status in (None, 75):
        return Outcome(folder, seed, "stopped" if is_run(folder) else "missing")
    diverged = said.startswith("training failed: ") and "finite" in said
    return Outcome(folder, seed, "diverged" if diverged else "failed", one_line(f"status {status}: {said}", 400))


def _text_of(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    except OSError:
        return ""


def _marks(log: Path) -> list[str]:
    """A sweep's own lines in a run's log: when and how it was started, and how that ended, in turn."""
    text = _text_of(log)
    return re.findall(rf"^{LOG_MARK}(.*)$", text, re.MULTILINE)


def _last_start(log: Path) -> tuple[int | None, str]:
    """The exit status of the log's last start, None if it has not ended; and its last line of cola-ds's, or of anybody's."""
    lines = [line.rstrip() for line in _text_of(log).splitlines()]
    marks = [i for i, line in enumerate(lines) if line.startswith(LOG_MARK)]
    ended = re.fullmatch(rf"{LOG_MARK}exit status (\d{{1,3}})", lines[marks[-1]]) if marks else None
    if ended is None:
        return None, ""
    printed = lines[marks[-2] + 1 if len(marks) > 1 else 0 : marks[-1]]
    spoken = [re.search("cola-ds: (.*)", line) for line in printed]  # perhaps behind a progress bar
    said = [found[1] for found in spoken if found]
    failures = [line for line in said if line.startswith("training failed: ")]  # other processes may speak after it
    traces = [i for i, line in enumerate(printed) if line.endswith("Traceback (most recent call last):")]
    if traces and not failures and not any(spoken[traces[-1] :]):
        raised = (line for line in printed[traces[-1] + 1 :] if line and not line.startswith(" "))
        said = [next(raised, "a traceback that was cut off")]
    return int(ended[1]), (failures or said or [line for line in printed if line] or ["it said nothing"])[-1]


# -- one task with one method ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The runs of a task with a method: every seed at one point of the grid, the search seeds at all of them."""

    task: str
    name: str
    """The method's name in the sweep."""
    paths: Mapping[tuple[str, int], Path]
    """Run folders, by grid point and seed."""
    points: tuple[str, ...]
    """The grid, in order, by the names of its folders; one where nothing is searched."""
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]

    def outcome(self, point: str, seed: int) -> Outcome:
        return read_outcome(self.paths[point, seed], seed)


def write_groups(folder: Path, groups: Sequence[Group]) -> None:
    """Write a sweep's sweep.json: from it a report knows which runs there should be. Raises UserError."""
    plain = [
        {
            "task": group.task,
            "name": group.name,
            "points": group.points,
            "seeds": group.seeds,
            "search_seeds": group.search_seeds,
            "paths": [[point, seed, str(path.relative_to(folder))] for (point, seed), path in group.paths.items()],
        }
        for group in groups
    ]
    if (folder / "sweep.json").exists():
        read_groups(folder)  # else it is somebody else's
    scratch = folder / f"sweep.json.{uuid.uuid4().hex}"  # tasks of an array may be other machines' processes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"groups": plain}) + "\n", encoding="utf-8")
        scratch.replace(folder / "sweep.json")
    except OSError as error:
        raise UserError(f"the sweep's folder {folder} cannot be written: {error.strerror}") from None


def read_groups(folder: Path) -> list[Group]:
    """What `write_groups` wrote there, wherever the folder lies now. Raises UserError."""
    path = folder / "sweep.json"
    try:
        groups = read_sweep(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not what cola-ds sweep writes ({error}); without it the same sweep writes it anew"
        ) from None
    return [
        Group(
            group["task"],
            group["name"],
            {(point, seed): folder / place for point, seed, place in group["paths"]},
            tuple(group["points"]),
            tuple(group["seeds"]),
            tuple(group["search_seeds"]),
        )
        for group in groups
    ]


@dataclass(frozen=True)
class Choice:
    """The grid point that a group's seeds are run at."""

    point: str | None
    """None where it is not known, or no point has a score."""
    dev: float | None
    """Its mean dev score over the search seeds."""
    why: str
    """Why there is none."""


def choose(group: Group) -> Choice:
    """The best grid point by mean dev score over the search seeds, the first of equals; never by the test score.

    None before every search run has a score, or has diverged: what is chosen must not depend on what happened to fail.
    Raises UserError for a run without a dev score.
    """
    if len(group.points) == 1:
        return Choice(group.points[0], None, "")
    searched = {point: [group.outcome(point, seed) for seed in group.search_seeds] for point in group.points}
    states = [outcome.state for outcomes in searched.values() for outcome in outcomes]
    waiting = sum(state not in ("finished", "diverged") for state in states)
    if waiting:
        return Choice(None, None, f"{waiting} of {len(states)} runs of its search have not finished")
    best: Choice | None = None
    for point, outcomes in searched.items():
        if any(outcome.state == "diverged" for outcome in outcomes):
            continue
        scores = [_dev_score(outcome) for outcome in outcomes]
        mean = statistics.mean(scores)
        if best is None or best.dev is None or mean > best.dev:
            best = Choice(point, mean, "")
    return best or Choice(None, None, "every point of its grid diverged")


def _dev_score(outcome: Outcome) -> float:
    if outcome.dev is None:
        raise UserError(f"{outcome.folder}: it has no score on held-out data, which a grid's best is chosen by")
    return outcome.dev


@dataclass(frozen=True)
class Cell:
    """A group with its choice, read once."""

    group: Group
    choice: Choice
    chosen: list[Outcome]
    """One for each seed, at the chosen point."""
    others: list[Outcome]
    """The rest of the search, and whatever else has been begun."""

    @property
    def all(self) -> list[Outcome]:
        return [*self.chosen, *self.others]

    @property
    def finished(self) -> list[Outcome]:
        return [outcome for outcome in self.chosen if outcome.state == "finished"]

    @property
    def scores(self) -> dict[int, float]:
        """Test scores by seed, in points."""
        return {outcome.seed: 100 * outcome.test for outcome in self.finished if outcome.is_task}

    @property
    def config(self) -> RunConfig | None:
        return next((outcome.config for outcome in self.chosen if outcome.config), None)


def read_cell(group: Group) -> Cell:
    """Look at every run of a group."""
    choice = choose(group)
    chosen = [] if choice.point is None else [group.outcome(choice.point, seed) for seed in group.seeds]
    rest = [group.outcome(*at) for at in group.paths if at[0] != choice.point or at[1] not in group.seeds]
    others = [outcome for outcome in rest if outcome.seed in group.search_seeds or outcome.state != "missing"]
    return Cell(group, choice, chosen, others)


# -- statistics --------------------------------------------------------------------------------------------------------


def paired_t_test(differences: Sequence[float]) -> float | None:
    """The two-sided p-value that paired differences have mean 0; None for fewer than two, or where all are the same."""
    n = len(differences)
    deviation = statistics.stdev(differences) if n > 1 else 0.0
    if deviation < 1e-9:
        return None
    return _two_sided_p(statistics.mean(differences) / (deviation / math.sqrt(n)), n - 1)


def _two_sided_p(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's t distribution, for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    cos_squared = math.cos(angle) ** 2
    term, total = 1.0, 0.0
    for k in range(2 + df % 2, df + 1, 2):  # df even: 1, 1/2 cos^2, 1*3/(2*4) cos^4 ...; odd: 1, 2/3 cos^2 ...
        total += term
        term *= (k - 1) / k * cos_squared
    inside = math.sin(angle) * total
    if df % 2:
        inside = 2 / math.pi * (angle + math.cos(angle) * inside)
    return max(0.0, 1 - inside)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that the chance of any false one among them stays what it says (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# -- tables ------------------------------------------------------------------------------------------------------------


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join("| " + " | ".join(one_line(text).replace("|", "\\|") for text in line) + " |" for line in lines)


def one_line(text: str, most: int = 1000) -> str:
    """A text of others, such as a folder's name or a line of a log, as part of a line: no line ends in it, nothing that moves a
    terminal's cursor, and it is not endless."""
    plain = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+", " ", text)
    plain = plain.encode(errors="backslashreplace").decode()  # a name may be any bytes
    return plain if len(plain) <= most else f"{plain[:most]}..."


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
    return [one_line(line, _NOTE) for line in lines]


def _waiting(group: Group) -> str:
    count = sum(seed not in group.search_seeds for seed in group.seeds)
    return f"; {count} seeds wait for it" if count else ""


def file_name(text: str) -> str:
    """The text as the name of a file or folder."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "-"


def show_dev(dev: float | None) -> str:
    """A dev score as people read it; without a task it is a loss."""
    return "-" if dev is None else f"{100 * dev:.2f}" if dev >= 0 else f"loss {-dev:.4f}"
