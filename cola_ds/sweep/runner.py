"""Runner of a sweep: every task with every method and seed, the best point of a grid chosen on dev, one run after the other.

DIR/
  sweep.json                       what the sweep is made of, as `cola-ds report` reads it
  TASK/METHOD/[POINT/]seed=N/      a run's folder, such as sst2/cola-2/lr=0.0005/seed=0
  TASK/METHOD/[POINT/]seed=N.log   what the run printed at each start, with its exit status

Nothing else is kept: what has been done is told from the run folders and their logs, whoever ran them.
"""

from __future__ import annotations

import datetime
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_ds import notices
from cola_ds.config.inputs import named_file
from cola_ds.config.keys import names_file
from cola_ds.config.loading import apply_override
from cola_ds.config.parsing import dump_yaml
from cola_ds.config.schema import RunConfig
from cola_ds.distributed.signals import STOPPING
from cola_ds.errors import UserError, counted, cut
from cola_ds.run.scores import show_dev
from cola_ds.sweep.groups import write_groups
from cola_ds.sweep.outcomes import LOG_MARK
from cola_ds.sweep.plan import Overrides, Plan, Run, command_words, override_word, read_yaml
from cola_ds.sweep.selection import Choice, choose

# Each run finds its own: those of this process are not theirs.
_LAUNCHER_SETS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def list_runs(plan: Plan) -> str:
    """A line for each run: its number for --only, search or seeds, its state, its folder's name."""
    lines = [f"# folder {plan.sweep.dir}"]
    for run in plan.runs:
        point = _choice(run).point
        state = "waits" if point is None else run.outcome(point).state
        if state == "finished" and point is not None and not run.is_done(point):
            state = "changed"
        lines.append(f"{run.index:<5} {run.purpose:<7} {state:<9} {run.name(point)}")
    return "\n".join(lines)


def _choice(run: Run) -> Choice:
    return choose(run.series.group) if run.point is None else Choice(run.point, None, "")


def freeze(plan: Plan, folder: Path) -> Path:
    """Write the sweep as it is now to a new folder, for jobs that wait in a queue: its YAML, the base's with the command line's
    overrides, and the files that they name, DeepSpeed JSONs and tasks. Returns the sweep's path. Raises UserError.
    """
    base = read_yaml(plan.sweep.base, "the base's YAML")
    for override in plan.common:
        apply_override(base, override)
    copies: dict[str, str] = {}

    def copied(key: str, value: Any) -> Any:
        source = named_file(key, value) if names_file(key) else None
        if source is None:
            return value
        if value not in copies:
            there = folder.resolve() / "files" / str(len(copies)) / source.name  # a task's name is its file's
            there.parent.mkdir(parents=True)
            shutil.copy2(source, there)  # with its time: it has not changed
            copies[value] = str(there)
        return copies[value]

    def all_copied(by_name: Mapping[str, Overrides | None]) -> dict[str, Overrides]:
        return {name: {key: copied(key, value) for key, value in (o or {}).items()} for name, o in by_name.items()}

    try:
        folder.mkdir(parents=True)
        base["deepspeed"] = copied("deepspeed", base.get("deepspeed", RunConfig.model_fields["deepspeed"].default))
        if (base.get("data") or {}).get("task"):
            base["data"]["task"] = copied("data.task", base["data"]["task"])
        frozen = {**plan.sweep.model_dump(exclude_unset=True), "base": str(folder / "base.yaml")}
        frozen |= {"tasks": all_copied(plan.sweep.task_overrides()), "methods": all_copied(plan.sweep.methods)}
        for name, content in (("base.yaml", base), ("sweep.yaml", frozen)):
            (folder / name).write_text(dump_yaml(content), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--freeze {folder}: {error.filename or folder}: {error.strerror}") from None
    _write_sweep_json(plan)
    return folder / "sweep.yaml"


def _write_sweep_json(plan: Plan) -> None:
    write_groups(Path(plan.sweep.dir), [series.group for series in plan.series])


class Runner:
    """Starts runs as child processes, and passes on the signals that ask this process to stop."""

    def __init__(self, plan: Plan, launcher: str | None):
        words = plan.sweep.launcher if launcher is None else launcher
        if words is None:
            words = f"{shlex.quote(sys.executable)} -m cola_ds train {{run}}"
        try:
            self.command = [word.replace("{run}", plan.sweep.base) for word in command_words(words)]
        except ValueError as error:
            raise UserError(f"--launcher {cut(words)} {error}") from None
        if shutil.which(self.command[0]) is None:
            raise UserError(f"launcher {cut(words)}: there is no command {cut(self.command[0])} here")
        if "{run}" not in words:
            self.command.append(plan.sweep.base)
        self.stopped = 0
        """The number of the signal that asked to stop."""
        self.child: subprocess.Popen[bytes] | None = None
        for number in STOPPING:
            signal.signal(number, self._stop)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
            signal.signal(signal.SIGHUP, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        # A run of its own session would outlive the terminal, unwatched.
        self.stopped = signal.SIGTERM if number == signal.SIGHUP else number
        if self.child:
            self.child.send_signal(self.stopped)

    def run(self, run: Run, point: str) -> int:
        """Start a run and wait for it. Returns its exit status; 75 where it was stopped."""
        folder = run.place(point)
        its_own = [
            *run.series.points[point],
            override_word("run.seed", run.seed),
            override_word("run.dir", str(folder)),
        ]
        command = [*self.command, *run.series.words, *its_own]
        log = folder.with_name(folder.name + ".log")
        env = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_SETS}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            _check_log(log)
            with open(log, "ab") as out:
                _mark(log, f"{datetime.datetime.now().astimezone().isoformat()} {shlex.join(command)}")
                # A group of its own: what a terminal sends to all arrives once, from here.
                self.child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
                )
                if self.stopped:
                    self.child.send_signal(self.stopped)
                status = self.child.wait()
        except OSError as error:
            raise UserError(f"{error.filename or command[0]}: {error.strerror}") from None
        finally:
            self.child = None
        status = 75 if self.stopped else status if status >= 0 else 128 - status
        _mark(log, f"exit status {status}")
        return status


def _check_log(log: Path) -> None:
    if log.exists():
        with open(log, "rb") as held:
            if held.read(len(LOG_MARK)) != LOG_MARK.encode():
                raise UserError(f"{log} is not a log of this sweep's runs, which would go on in it; name another dir")


def _mark(log: Path, text: str) -> None:
    """Add a line of the sweep's own to a run's log, which may end inside a line: a progress bar does."""
    with open(log, "ab+") as out:
        out.seek(max(0, out.seek(0, os.SEEK_END) - 1))
        inside = out.read() not in (b"", b"\n")
        out.write(b"\n" * inside + f"{LOG_MARK}{text}\n".encode())


def run_one(plan: Plan, index: int, launcher: str | None) -> int:
    """Run one of the list, unless it has finished. Returns its exit status. Raises UserError."""
    if not 0 <= index < len(plan.runs):
        raise UserError(f"--only {index}: the sweep's runs are 0 to {len(plan.runs) - 1}")
    run = plan.runs[index]
    choice = _choice(run)
    point = choice.point
    if point is None:
        raise UserError(f"{run.name(None)} waits for the choice of a grid point: {choice.why}")
    runner = Runner(plan, launcher)
    if not (Path(plan.sweep.dir) / "sweep.json").exists():  # an array's task may be of an older sweep than the folder's
        _write_sweep_json(plan)
    if run.is_done(point):
        notices.result(f"{run.name(point)}: finished already")
        return 0
    return _print_outcome(run, point, runner.run(run, point))


def run_all(plan: Plan, launcher: str | None) -> int:
    """Run what has not finished: the search, then the rest of the seeds at what it has chosen. Returns the exit status: 0 all
    have finished, 75 stopped on a signal, 1 otherwise. Raises UserError."""
    runner = Runner(plan, launcher)
    _write_sweep_json(plan)
    failed, waiting, before = [], [], 0
    for run in plan.runs:
        choice = _choice(run)
        point = choice.point
        if point is None:
            waiting.append(f"{run.name(None)}: {choice.why}")
            continue
        if run.is_done(point):
            before += 1
            continue
        notices.line(f"[{run.index + 1} of {len(plan.runs)}] {run.name(point)}")
        status = 75 if runner.stopped else runner.run(run, point)
        if status == 75:
            notices.error(f"cola-ds: stopped at {run.name(point)}; the same command goes on from there")
            return 75
        if _print_outcome(run, point, status):
            failed.append(f"{run.place(point)}: {run.outcome(point).why}")
    done = len(plan.runs) - len(failed) - len(waiting)
    notices.result(
        f"{done} of {counted(len(plan.runs), 'run')} {'has' if done == 1 else 'have'} finished, {before} of them before; "
        f"cola-ds report {plan.sweep.dir}"
    )
    for line in [f"failed: {line}" for line in failed] + [f"not run: {line}" for line in waiting]:
        notices.error(f"cola-ds: {line}")
    return 1 if failed or waiting else 0


def _print_outcome(run: Run, point: str, status: int) -> int:
    """Say what a run that has just ended has come to. Returns its status; 1 for one that says it is done and left no result."""
    outcome = run.outcome(point)
    if outcome.state == "finished":
        dev = f"dev {show_dev(outcome.objective)}, " if outcome.objective is not None else ""
        test = f"test {100 * outcome.test:.2f}, " if outcome.is_task else ""
        notices.result(f"{run.name(point)}: {dev}{test}{outcome.result['wall_time_s']:.0f} s")
        return status
    log = run.place(point).with_name(run.place(point).name + ".log")
    notices.error(f"cola-ds: {run.name(point)}: {outcome.why or outcome.state}; its log is {log}")
    return status or 1
