"""The command `cola-ds`.

Exit status: 0 done; 2 the user's mistake, with one line on stderr; 3 training failed; 75 stopped on a signal, to go on later.
"""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cola_ds import notices
from cola_ds.commands import streams
from cola_ds.commands.parser import parse
from cola_ds.distributed import rendezvous, signals, watchdog
from cola_ds.distributed.deepspeed_internals import end_process
from cola_ds.distributed.launcher import Process, identify
from cola_ds.errors import ArrivalError, StoppedError, TrainingFailedError, UserError, first_line, one_line
from cola_ds.run import lock

if TYPE_CHECKING:  # pydantic takes longer than all that --help needs
    from cola_ds.config.schema import RunConfig

_PATIENCE_S = 10  # launchers end the other processes of a run within seconds of the first that exits
_LAST_WORDS_S = 3  # before that, for what they have to say


def main(argv: list[str] | None = None) -> int:
    """Run one command: of `argv`, or of this process, whose output is then this command's. Returns the exit status."""
    if argv is None:
        streams.harden()
    args = _parsed(argv)
    if args is None:
        return 2
    notices.be_quiet(args.quiet)
    args.run = {
        "train": _train, "evaluate": _evaluate, "export": _export, "plan": _plan, "doctor": _doctor, "data": _data,
        "inspect": _inspect, "sweep": _sweep, "report": _report, "schema": _schema, "completion": _completion,
    }[args.command]  # fmt: skip
    process = None
    try:
        process = identify()
        args.run(args, process)
        return 0
    except UserError as error:
        status = 2
        watchdog.leave(status)
        _say(f"cola-ds: {error}", process, isinstance(error, ArrivalError))
    except TrainingFailedError as error:
        status = 3
        watchdog.leave(status)
        _say(f"cola-ds: training failed: {error}", process)
    except StoppedError as error:
        status = 75
        signals.finished()
        watchdog.leave(status)
        if process is None or process.rank == 0:
            again = "the same command goes on from there"
            if args.fresh or args.resume != "auto":
                again = "without --fresh and --resume, " + again
            notices.error(f"cola-ds: {error}; {again}")
    except OSError as error:  # of the machine: a disk that is full, a file that is gone
        status = 3 if args.run is _train else 1
        watchdog.leave(status)
        if error.errno is None:  # some library's own
            notices.error(traceback.format_exc().rstrip())
        what = f"{error.filename or 'a file'}: {error.strerror or first_line(error)} ({_place_of(error)})"
        _say(f"cola-ds: {what}; the same command goes on once it is mended", process)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        watchdog.leave(status)
        _say("cola-ds: interrupted", process)
    except (MemoryError, RecursionError) as error:  # ten thousand lines of traceback would say no more
        status = 3 if args.run is _train else 1
        watchdog.leave(status)
        what = "out of memory" if isinstance(error, MemoryError) else "something that was read is nested too deeply"
        _say(f"cola-ds: {what} ({first_line(error)}; {_place_of(error)})", process)
    except Exception as error:  # a defect, or a fault of the machine: all that is known of it
        status = 3 if args.run is _train else 1
        if process and process.world_size > 1:
            # Where another process died, the watch says so, and ends this one: what is raised here is only what followed.
            time.sleep(_PATIENCE_S if "by peer" in str(error) else 2)  # gloo: "Connection closed by peer"
        watchdog.leave(status)
        notices.error(traceback.format_exc().rstrip())
    if process and (process.world_size > 1 or watchdog.begun()):
        _exit_now(status)  # exit handlers of a process group can wait for peers that wait for this process
    return status


def _parsed(argv: list[str] | None) -> argparse.Namespace | None:
    """The words of the command; None where they are wrong, which one process has said: all were called alike."""
    try:
        return parse(argv)
    except UserError as error:
        # Which process this is has not been checked yet.
        numbers = [os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")]
        if next(filter(None, numbers), "0") == "0":
            notices.error(f"cola-ds: {error}")
        else:
            time.sleep(_LAST_WORDS_S)
        return None


def _place_of(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{where.filename}, line {where.lineno}"


def _leave_now(status: int) -> NoReturn:
    watchdog.leave(status)
    _exit_now(status)


def _exit_now(status: int) -> NoReturn:
    with suppress(OSError):
        lock.release_held()
    end_process(status)


def _say(message: str, process: Process | None, arriving: bool = False) -> None:
    """One message from one process, although all may have found the same mistake.

    Process 0 speaks at once. A process that sees it go on after a while found what process 0 did not (a file missing on its
    node, say): it names itself. Where processes do not find each other, the first one of each machine speaks at once.
    """
    message = one_line(message)
    rendezvous.say_why(message)
    if process is None or process.rank == 0 or (arriving and process.local_rank == 0):
        notices.error(message)
        if arriving:
            time.sleep(_LAST_WORDS_S)
    elif not watchdog.process_0_leaves(within_s=_PATIENCE_S):
        notices.error(f"{message} (process {process.rank} on {socket.gethostname()})")


def _train(args: argparse.Namespace, process: Process) -> None:
    if args.processes is not None and (not args.dry_run or args.processes < 1):
        raise UserError(
            "--processes must be at least 1 and goes with --dry-run; a launcher says how many processes really run"
        )
    if not args.dry_run:
        _listen(process)
    if not args.dry_run and args.freeze is None:
        rendezvous.begin(process, _exit_now)
    from cola_ds.config.loading import load_config

    config = load_config(args.config, args.overrides)
    if args.freeze is not None:
        from cola_ds.commands.freeze import freeze

        notices.result(f"wrote {freeze(config, Path(args.freeze))}")
    elif args.dry_run:
        from cola_ds.training.api import describe  # torch takes seconds to import: not for a misspelt key

        text = describe(config, process, args.processes or process.world_size)
        if process.rank == 0:
            _print(text)
    else:
        _run(config, process, args.resume, args.fresh, args.allow_change)


def _evaluate(args: argparse.Namespace, process: Process) -> None:
    _listen(process)
    rendezvous.begin(process, _exit_now)
    if args.suite is not None:
        _suite(args, process)
    if args.suite_dir is not None or args.limit is not None:
        raise UserError("--suite-dir and --limit are for --suite; leave them out")
    from cola_ds.commands.evaluate import evaluation_config

    config = evaluation_config(
        args.target, args.method, args.task, args.dir, args.out, process.world_size, args.overrides
    )
    _run(config, process, args.resume, args.fresh, [])


def _suite(args: argparse.Namespace, process: Process) -> NoReturn:
    if args.method != "zero-shot" or args.dir is not None or (args.limit is not None and args.limit < 1):
        raise UserError("--suite stands without --method and --dir, and --limit takes a number of at least 1")
    from cola_ds.commands.suite import run_suite, suite_config, suite_tasks

    tasks = suite_tasks(args.suite)
    config = suite_config(args.target, args.out, process.world_size, args.overrides)
    run_suite(config, process, tasks, args.suite_dir, args.limit, args.fresh, _exit_now)
    watchdog.leave(0)
    _exit_now(0)


def _listen(process: Process) -> None:
    signals.listen(lambda message: notices.notice(f"process {process.rank}: {message}"), _leave_now)


def _run(config: RunConfig, process: Process, resume: str, fresh: bool, allow_change: list[str]) -> NoReturn:
    from cola_ds.checkpoint.decide import ResumeOptions
    from cola_ds.training.api import run_config

    run_config(config, process, ResumeOptions(resume, fresh, tuple(allow_change)), _exit_now)
    atexit._run_exitfuncs()  # W&B sends its last rows here
    _exit_now(0)


def _export(args: argparse.Namespace, process: Process) -> None:
    from cola_ds.commands.export import export
    from cola_ds.training.api import quiet_libraries

    quiet_libraries(process)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is half written is removed
    try:
        out = export(args.run_dir, args.to, args.out, args.overrides, upto=args.upto, svd_rank=args.svd_rank)
    finally:
        signal.signal(signal.SIGTERM, before)
    notices.result(f"wrote {out}")


def _plan(args: argparse.Namespace, process: Process) -> None:
    from cola_ds.config.loading import load_config

    config = load_config(args.config, args.overrides)
    from cola_ds.commands.plan import count_of, counts_of, plan, size_of
    from cola_ds.plan.run import Cluster
    from cola_ds.training.api import quiet_libraries

    quiet_libraries(process)
    if args.table is not None and args.nodes is not None:
        raise UserError("--table names numbers of nodes, and --nodes one: use one of them")
    table = [] if args.table is None else counts_of(args.table, "--table")
    host = None if args.host_memory is None else int(size_of(args.host_memory, "--host-memory"))
    cluster = Cluster(
        nodes=count_of("1" if args.nodes is None else args.nodes, "--nodes"), per_node=count_of(args.gpus, "--gpus"),
        device=args.device, memory=int(size_of(args.memory, "--memory")), host_memory=host,
        network=size_of(args.network, "--network", rate=True),
        node_network=size_of(args.node_network, "--node-network", rate=True), disk=size_of(args.disk, "--disk", rate=True),
    )  # fmt: skip
    text, wrong = plan(config, cluster, table)
    _print(text)
    if wrong is not None:
        raise UserError(wrong)


def _doctor(args: argparse.Namespace, process: Process) -> None:
    from cola_ds.commands.doctor import examine

    works = examine(args.config, args.overrides, args.dir, args.wait, process, _exit_now, _say)
    _exit_now(0 if works else 1)


def _data(args: argparse.Namespace, process: Process) -> None:
    if args.show < 0 or (args.clean and (args.show or args.plot)):
        raise UserError("--show takes a number of examples, and --clean stands alone: it only removes")
    from cola_ds.config.loading import load_config

    config = load_config(args.config, args.overrides)
    from cola_ds.commands.data import clean_cache, look

    if args.clean:
        _print(clean_cache(config))
        return
    from cola_ds.training.api import quiet_libraries

    quiet_libraries(process)
    with _reachable(args.config):
        seen = look(config, args.show, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    if args.plot is not None:
        from cola_ds.report.figures import draw_lengths

        with _reachable(args.plot):
            draw_lengths(seen.lengths, Path(args.plot))
    _print(seen.text)


def _inspect(args: argparse.Namespace, process: Process) -> None:
    from cola_ds.commands.inspect import inspect

    with _reachable(args.run_dir):
        text = inspect(args.run_dir)
    _print(text)


def _print(text: str) -> None:
    """What a command is for. Its status says so where that does not arrive: a full disk, a reader who has enough."""
    print(text, flush=True)
    if error := streams.lost(sys.stdout):
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        print(f"cola-ds: standard output: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _sweep(args: argparse.Namespace, process: Process) -> None:
    if process.world_size > 1:
        raise UserError(
            "a sweep starts its runs itself: start it once, and name the launcher of the runs by --launcher"
        )
    from cola_ds.sweep.plan import load_plan
    from cola_ds.sweep.runner import freeze, list_runs, run_all, run_one

    plan = load_plan(args.config, args.overrides)
    if args.list:
        _print(list_runs(plan))
    elif args.freeze is not None:
        notices.result(f"wrote {freeze(plan, Path(args.freeze))}")
    elif status := run_all(plan, args.launcher) if args.only is None else run_one(plan, args.only, args.launcher):
        sys.exit(status)


def _report(args: argparse.Namespace, process: Process) -> None:
    from cola_ds.report.report import report

    with _reachable(", ".join(args.runs)):
        text = report(args.runs, args.plot, args.csv, args.paper, args.figures, args.html)
    _print(text)


def _schema(args: argparse.Namespace, process: Process) -> None:
    from cola_ds.config.json_schema import run_schema, written
    from cola_ds.sweep.json_schema import sweep_schema

    _print(written(run_schema() if args.of == "run" else sweep_schema()).rstrip())


def _completion(args: argparse.Namespace, process: Process) -> None:
    from cola_ds.commands.completion import script
    from cola_ds.report.paper import PAPER_TABLES

    _print(script(args.shell, PAPER_TABLES).rstrip())


@contextmanager
def _reachable(what: str) -> Iterator[None]:
    """Turn what a file system may refuse into a UserError; files that are damaged are named where they are read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or what}: {error.strerror or error}") from None
