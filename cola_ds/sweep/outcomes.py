"""Run status: what a run has come to, by its folder and the log beside it. Neither torch nor pandas is needed."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cola_ds.config.inputs import files_of, named_file
from cola_ds.config.keys import flat_keys, is_free, is_per_run, names_file
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError, inline
from cola_ds.notices import GOING
from cola_ds.run.learnt import is_run, read_learnt, run_config
from cola_ds.run.marker import LOG
from cola_ds.run.scores import loss_objective, score_objective

LOG_MARK = "cola-ds sweep: "
"""What a sweep's own lines in a run's log begin with: the command of each start, and the exit status that it ended with."""
_FAILED = "training failed: "


@dataclass(frozen=True, kw_only=True)
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
    def objective(self) -> float | None:
        """What a grid point is chosen by, to be minimized: that of the dev score or, without a task, of the held-out loss."""
        scores = self.result.get("scores", {})
        if self.is_task:
            return None if scores["dev"] is None else score_objective(scores["dev"])
        return None if scores.get("loss") is None else loss_objective(scores["loss"])

    def is_of(self, config: RunConfig) -> bool:
        """Whether it is a run of this config, apart from its seed, and began after the last change of the files that this names.
        Where it is not, `cola-ds train` knows what matters."""
        mine = self.config
        if mine is None:
            return False
        before, now = _compared(mine), _compared(config)
        if not all(_same_content(k, before[k], now[k]) if names_file(k) else before[k] == now[k] for k in now):
            return False
        return all(path.stat().st_mtime <= self._began_s for path in files_of(config))

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


def _compared(config: RunConfig) -> dict[str, Any]:
    """By key, what makes a run of a sweep another one; a model's folder as it lies, however it is named."""
    flat = {
        key: value for key, value in flat_keys(config.model_dump()).items() if not is_free(key) and not is_per_run(key)
    }
    model = Path(config.model.path)
    return flat | {"model.path": model.resolve() if model.is_dir() else config.model.path}


def _same_content(key: str, one: str | None, other: str | None) -> bool:
    """Whether these are the same names, or files that say the same."""
    if one == other:
        return True
    try:
        mine, theirs = named_file(key, one), named_file(key, other)
        return mine is not None and theirs is not None and mine.read_bytes() == theirs.read_bytes()
    except (OSError, UserError):
        return False


def read_outcome(folder: Path, seed: int) -> Outcome:
    """Read a run's status from its folder and log. A start that was refused later than it finished makes it a failed one: what is
    there is not what the sweep asks for."""
    status, said = _last_start(folder.with_name(folder.name + ".log"))
    if (folder / "result.json").is_file() and status in (None, 0, 75):
        try:
            result = read_learnt(folder).result
        except UserError as error:
            return Outcome(folder=folder, seed=seed, state="failed", why=str(error), damaged=True)
        if result["scores"].get("loss", 0.0) is None:  # as JSON has it, which knows no NaN
            return Outcome(folder=folder, seed=seed, state="diverged", why="its held-out loss is not finite")
        return Outcome(folder=folder, seed=seed, state="finished", result=result)
    failure = _failure_of(folder) if status is None and is_run(folder) else None
    if failure is not None:  # of a run without a sweep
        status, said = 3, failure
    if status in (None, 75):
        return Outcome(folder=folder, seed=seed, state="stopped" if is_run(folder) else "missing")
    diverged = said.startswith(_FAILED) and "finite" in said
    why = inline(f"status {status}: {said}", 400)
    return Outcome(folder=folder, seed=seed, state="diverged" if diverged else "failed", why=why)


def _text_of(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    except OSError:
        return ""


def _failure_of(folder: Path) -> str | None:
    """How training failed in the last start that the run's own log has; None where it did not."""
    started = _text_of(folder / LOG).rpartition("\n== ")[2]
    found = re.findall(rf"^cola-ds: ({_FAILED}.*)$", started, re.MULTILINE)
    return str(found[-1]) if found else None


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
    failures = [line for line in said if line.startswith(_FAILED)]  # other processes may speak after it
    traces = [i for i, line in enumerate(printed) if line.endswith("Traceback (most recent call last):")]
    if traces and not failures and not any(spoken[traces[-1] :]):
        raised = (line for line in printed[traces[-1] + 1 :] if line and not line.startswith(" "))
        said = [next(raised, "a traceback that was cut off")]
    others = [line for line in printed if line and not line.startswith(GOING)]
    return int(ended[1]), (failures or said or others or ["it said nothing"])[-1]
