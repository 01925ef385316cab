"""`cola-ds doctor`: whether a run would work here. A row for each thing that was looked at, printed as soon as it is known.

Every process looks at its own machine; what it finds is gathered, and all judge it alike. Nothing waits for ever: arrival has
the limit of --wait, and from then on the watch ends all when a process dies or hangs.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cola_ds.commands import machine
from cola_ds.config.deepspeed_json import read_engine_config
from cola_ds.config.loading import load_config
from cola_ds.config.schema import RunConfig
from cola_ds.distributed import accelerator, collectives, rendezvous, signals, watchdog
from cola_ds.distributed.launcher import Process
from cola_ds.errors import ArrivalError, UserError, counted, first_line, some_of
from cola_ds.training.preflight import SHARED_WITHIN_S

_HANG_S = 30.0
_COMPILATION_S = 240.0  # while a machine compiles what the group needs
_CLOCKS_APART_S = 1.0
_COLLECTIVE_BYTES = 4 * 2**20  # of each process
_GATHERED_BYTES = 64 * 2**20  # and at most that of all together, which every process has to hold
_NAME_S = 0.5  # for the name of an address
_EXCHANGE_BYTES = 8 * 2**20
LAST_WORDS_S = 3  # before this process ends: for what the others have to say
_SLOW = 2.0  # times the median pair
_MOST_ROUNDS = 12  # of pairs: of more than twelve hosts each meets twelve others, or eleven
_token: Path | None = None


class _Table:
    """What was looked at, what was found, and what is to be said of it; process 0 prints each row at once."""

    def __init__(self, speaks: bool):
        self.speaks = speaks
        self.failed = False
        self._print("check", "found", "result")
        self._print("---", "---", "---")

    def row(self, check: str, found: str, failures: Sequence[str] = (), warnings: Sequence[str] = ()) -> None:
        """Failures and warnings end in a remedy; without any, it is ok."""
        said = [f"FAILED: {text}" for text in failures] + [f"warning: {text}" for text in warnings]
        self.failed |= bool(failures)
        self._print(check, found, some_of(said, between="; ") or "ok")

    def _print(self, *cells: str) -> None:
        if self.speaks:
            print("| " + " | ".join(cells) + " |", flush=True)


def examine(
    config_path: str | None, overrides: list[str], place: str | None, wait_s: float, process: Process,
    exit_now: Callable[[int], Any], say: Callable[[str, Process, bool], None],
) -> bool:  # fmt: skip
    """Whether a run would work here, in the folder of a run's YAML or in `place`. Collective.

    `exit_now` ends this process, `say` says what is wrong with the machines. Raises UserError for what is wrong with the call.
    """
    if wait_s <= 0:
        raise UserError("--wait must be a positive number of seconds")
    if place and config_path:
        raise UserError("--dir goes without RUN.yaml, whose run.dir is looked at")
    config = load_config(config_path, overrides) if config_path else None
    engine_json = read_engine_config(config) if config else {}
    folder = Path(config.run.dir if config else place or ".")

    def end(status: int) -> None:
        remove_token()
        watchdog.leave(1)
        exit_now(1)

    signals.listen(lambda message: None, end)
    rendezvous.begin(process, end)
    try:
        works = doctor(config, engine_json, folder, wait_s, process, end)
    except UserError as error:  # of the machines, not of the call
        works = False
        say(f"cola-ds: {error}", process, isinstance(error, ArrivalError))
    signals.finished()
    watchdog.leave(0 if works else 1)
    if watchdog.begun():
        collectives.destroy_process_group()
    elif process.rank == 0 and process.world_size > 1:
        time.sleep(LAST_WORDS_S)
    return works


def doctor(
    config: RunConfig | None,
    engine_json: dict[str, Any],
    folder: Path,
    wait_s: float,
    process: Process,
    end: Callable[[int], None],
) -> bool:
    """Look at everything, and say what was found; whether a run would work. Collective.

    With a run's config and DeepSpeed JSON, or without. Raises UserError on processes other than 0 when no group of processes
    begins. `end` must end the process; the watch calls it.
    """
    table, since = _Table(process.rank == 0), time.monotonic()
    compilation = accelerator.compilation_facts()  # before the group begins, which compiles
    problem = _begin(table, process, wait_s, end)
    # A run.dir that is still to be made: the nearest folder above it that process 0 has.
    above = (folder.absolute(), *folder.absolute().parents)
    level = next(number for number, parent in enumerate(above) if os.path.exists(parent)) if config else 0
    level = level if problem else collectives.broadcast_object(level)
    mine = machine.look(config, engine_json, above[min(level, len(above) - 1)]) | {"compilation": compilation}
    watchdog.heartbeat("gathering that")  # a process that did not get here hangs, not the others
    everyone = [mine] if problem else collectives.all_gather_objects(mine)  # without a group, of process 0 alone
    hosts = [theirs["host"] for theirs in everyone]
    found = f"{mine['accelerator']['backend']}, on {some_of(list(dict.fromkeys(hosts)))}"
    found += f", after {time.monotonic() - since:.1f} s"
    table.row("group" if watchdog.begun() else "arrival", found, [problem] if problem else [])
    for row in machine.judge(everyone, config):
        table.row(*row)
    if not problem:
        _check_shared(table, Path(mine["folder"]["where"]), hosts)
        _check_clocks(table, hosts)
        _check_names(table, hosts, process.rank)
        _check_collectives(table, hosts)
        _check_pairs(table, hosts, process.rank)
    if table.speaks:
        print(f"a run would {'fail' if table.failed else 'work'} here", flush=True)
    return not table.failed


def _begin(table: _Table, process: Process, wait_s: float, end: Callable[[int], None]) -> str:
    """Begin the group of processes, watched; why it does not begin. Collective. What process 0 returns, the others raise."""
    since = time.monotonic()

    def arrived(share: Callable[[Any], Any]) -> None:
        table.row(
            "arrival",
            f"all of {counted(process.world_size, 'process', 'processes')}, after {time.monotonic() - since:.1f} s",
        )
        watchdog.begin(process, _COMPILATION_S, end, share)
        watchdog.heartbeat("joining the group")

    try:
        collectives.init_process_group(process, wait_s, arrived)
    except Exception as error:  # whatever it is, a run would meet it, too
        problem = (
            error
            if isinstance(error, UserError)
            else UserError(
                f"no group of processes on {socket.gethostname()}: {first_line(error)}; if that is the network: hosts must reach "
                f"each other on every port, and {accelerator.interface_variable()} name the interface between them"
            )
        )
        if process.rank != 0:
            raise problem from None
        return str(problem)
    watchdog.allow(max(wait_s, _HANG_S))
    watchdog.heartbeat("what the machines have")
    return ""


def remove_token() -> None:
    """Remove the file that process 0 writes for the others to see, if there is one now."""
    if _token:
        with contextlib.suppress(OSError):
            _token.unlink()


def _check_shared(table: _Table, place: Path, hosts: list[str]) -> None:
    """Whether all see a file that process 0 writes. Collective."""
    global _token
    watchdog.heartbeat("shared folder")
    token = place / collectives.broadcast_object(f".cola-ds-doctor-{uuid.uuid4().hex}")
    problem = ""
    try:
        if table.speaks:
            _token = token
            try:
                token.write_text(token.name, encoding="utf-8")
            except OSError as error:
                problem = f"{error.strerror}; {machine.OTHER_FOLDER}"
        problem = collectives.broadcast_object(problem)
        deadline = time.monotonic() + (0 if problem else SHARED_WITHIN_S)
        while not (seen := _holds(token, token.name)) and time.monotonic() < deadline:
            time.sleep(0.1)
        watchdog.heartbeat("shared folder, gathering that")
        sees = collectives.all_gather_numbers(float(seen))
    finally:
        remove_token()
    blind = [f"{host} (process {rank})" for rank, host in enumerate(hosts) if not sees[rank]]
    if blind and not problem:
        problem = f"not the same folder on {some_of(blind)}; name one on a shared file system (run.dir or --dir)"
    table.row("shared folder", f"{place}, as process 0 on {hosts[0]} has it", [problem] if problem else [])


def _holds(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8") == text
    return False


def _check_clocks(table: _Table, hosts: list[str]) -> None:
    """How far clocks are from that of process 0. Collective."""
    watchdog.heartbeat("clocks")
    rounds = []
    for _ in range(5):
        since, before = time.perf_counter(), time.time()
        collectives.broadcast_object(None)  # so that the others look at theirs after process 0 has looked at its own
        theirs = collectives.all_gather_numbers(time.time())
        taken = time.perf_counter() - since
        rounds.append((taken, [seconds - before - taken / 2 for seconds in theirs]))
    taken, ahead = collectives.broadcast_object(min(rounds))
    far = {host: seconds for host, seconds in zip(hosts, ahead, strict=True) if abs(seconds) > _CLOCKS_APART_S}
    warnings = [f"{host} by {seconds:+.1f} s; synchronize its clock (NTP)" for host, seconds in far.items()]
    apart = max(abs(seconds) for seconds in ahead[1:] or [0.0])
    table.row("clocks", f"at most {apart:.3f} s from process 0, give or take {taken / 2:.3f}", [], warnings)


def _check_names(table: _Table, hosts: list[str], rank: int) -> None:
    """How long the name of an address takes: torch's store looks up that of every connection, one after another. Collective."""
    watchdog.heartbeat("names of addresses")
    theirs = collectives.all_gather_texts(machine.address_towards(os.environ["MASTER_ADDR"]) if rank else "", 64)
    asked = theirs if rank == 0 else [machine.address_of(os.environ["MASTER_ADDR"])]
    seconds = machine.name_lookup_s([address for address in dict.fromkeys(asked) if address])
    watchdog.heartbeat("names of addresses, gathering that")
    taken = collectives.all_gather_numbers(seconds)
    slow = list(dict.fromkeys(host for host, seconds in zip(hosts, taken, strict=True) if seconds > _NAME_S))
    remedy = "connections wait for them as a run begins: repair the reverse DNS, or write lines "
    remedy += "::ffff:ADDRESS HOST into /etc/hosts"
    warnings = [f"slow on {some_of(slow)}; {remedy}"] if slow else []
    table.row("names", f"at most {max(taken):.2f} s for that of another host's address", [], warnings)


def _check_collectives(table: _Table, hosts: list[str]) -> None:
    """How long collectives of all processes take. Collective."""
    watchdog.heartbeat("collectives")
    given = min(_COLLECTIVE_BYTES, _GATHERED_BYTES // len(hosts))
    seconds = collectives.time_collectives(_COLLECTIVE_BYTES, given)
    found = ", ".join(f"{name} {taken * 1e3:.1f} ms" for name, taken in seconds.items())
    less = "" if given == _COLLECTIVE_BYTES else f" (all-gather: {given >> 10} KiB)"
    table.row(
        "collectives",
        f"{_COLLECTIVE_BYTES >> 20} MiB of each of {counted(len(hosts), 'process', 'processes')}{less}: {found}",
    )


def _check_pairs(table: _Table, hosts: list[str], rank: int) -> None:
    """How fast two hosts talk, by one process of each: all pairs, or of many hosts some pairs of each host. Collective."""
    names = list(dict.fromkeys(hosts))
    seconds: dict[str, float] = {}
    leaders = [hosts.index(name) for name in names]
    for number, pairs in enumerate(some_rounds(tournament(len(names))), 1):
        watchdog.heartbeat(f"pairs of hosts, round {number}")
        mine = 0.0
        for a, b in pairs:
            if rank in (leaders[a], leaders[b]):
                mine = collectives.time_exchange(leaders[a] + leaders[b] - rank, _EXCHANGE_BYTES)
        taken = collectives.all_gather_numbers(mine)
        seconds |= {f"{names[a]} - {names[b]}": max(taken[leaders[a]], taken[leaders[b]]) for a, b in pairs}
    if not seconds:
        table.row("pairs of hosts", "one host")
        return
    said = {pair: f"{pair} {_EXCHANGE_BYTES * 8 / taken / 1e9:.2f} Gbit/s" for pair, taken in seconds.items()}
    median = statistics.median(_EXCHANGE_BYTES * 8 / taken / 1e9 for taken in seconds.values())
    slowest = said[max(seconds, key=lambda pair: seconds[pair])]
    slow = [said[pair] for pair in slow_pairs(seconds)]
    warnings = [f"slow: {some_of(slow)}; look at the network between them"] if slow else []
    pairs_there_are = math.comb(len(names), 2)
    tried = f"{len(seconds)}" + (f" of {pairs_there_are}" if len(seconds) < pairs_there_are else "")
    table.row("pairs of hosts", f"{tried}, each way: median {median:.2f} Gbit/s, least {slowest}", [], warnings)


def tournament(teams: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each of `teams` meets every other exactly once, and nobody two at a time: all turn round the first one."""
    seats: list[int | None] = [*range(teams), *([None] * (teams % 2))]  # opposite None: a rest
    rounds = []
    for _ in range(len(seats) - 1):
        opposite = zip(seats[: len(seats) // 2], reversed(seats), strict=False)
        rounds.append([(a, b) for a, b in opposite if a is not None and b is not None])
        seats.insert(1, seats.pop())
    return rounds


def some_rounds(rounds: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """At most so many of them, evenly apart."""
    count = min(len(rounds), _MOST_ROUNDS)
    return [rounds[number * len(rounds) // count] for number in range(count)]


def slow_pairs(seconds: dict[str, float]) -> list[str]:
    """Those that take more than twice as long as the median pair."""
    median = statistics.median(seconds.values())
    return [pair for pair, taken in seconds.items() if taken > _SLOW * median]
