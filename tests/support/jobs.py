"""The command `cola-ds` in processes of a test, without a launcher: what dies, hangs or is full does so for real."""

import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cola_ds.commands import streams
from cola_ds.distributed.launcher import free_port
from tests.support.distributed import _server


class Job:
    """`cola-ds WORDS...` in `world_size` processes. `sabotage(rank, *arguments)` is called in each before the command."""

    def __init__(
        self, folder: Path, words: list, world_size: int = 2, sabotage: Callable | None = None, arguments: tuple = ()
    ):
        port = free_port()
        folder.mkdir(exist_ok=True)
        self.logs = [folder / f"process-{rank}.log" for rank in range(world_size)]
        self.processes = []
        for rank in range(world_size):
            self.logs[rank].unlink(missing_ok=True)
            process = _server.Process(
                target=_command,
                args=(rank, world_size, port, [str(word) for word in words], self.logs[rank], sabotage, arguments),
                daemon=True,
            )
            process.start()
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, timeout_s: float = 240) -> list[int]:
        """The exit statuses, all of them, in time; minus the signal's number where one ended a process."""
        deadline = time.monotonic() + timeout_s
        while any(process.exitcode is None for process in self.processes):
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            multiprocessing.connection.wait(running, timeout=1)
            assert time.monotonic() < deadline, f"still running: {[p.exitcode for p in self.processes]}\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def send(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def text(self, rank: int | None = None) -> str:
        """What one process has printed, or all have."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs if log.exists())

    def wait_for(self, text: str, timeout_s: float = 180) -> None:
        """Until some process has printed that."""
        deadline = time.monotonic() + timeout_s
        while text not in self.text():
            assert time.monotonic() < deadline, f"never printed: {text}\n{self.text()}"
            time.sleep(0.05)


def run_job(folder: Path, words: list, **options) -> tuple[list[int], str]:
    """Exit statuses and what was printed."""
    with Job(folder, words, **options) as job:
        return job.wait(), job.text()


def _command(rank, world_size, port, words, log, sabotage, arguments):
    with open(log, "wb", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    streams.harden()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update(
        {name: str(value) for name, value in names.items()},
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    if sabotage:
        sabotage(rank, *arguments)
    from cola_ds.cli import main

    status = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# -- sabotage ----------------------------------------------------------------------------------------------------------


def at_heartbeat(rank, ranks, number, action):
    """Some processes do something when they have gone on `number` times, proofs before the first step apart: `action` is a
    signal's number, ("sleep", seconds), ("until", path), or a list of these."""
    if rank not in ranks:
        return
    from cola_ds.distributed import watchdog

    inner, seen = watchdog.heartbeat, [0]

    def heartbeat(*args, **options):
        inner(*args, **options)
        if str(args[0]).startswith("proof"):
            return
        seen[0] += 1
        if seen[0] == number:
            _act(action)

    watchdog.heartbeat = heartbeat


def at_call(rank, ranks, module, name, number, action):
    """The same at the n-th call of a function of the package, before it does anything."""
    if rank not in ranks:
        return
    import importlib

    owner = importlib.import_module(module)
    inner, seen = getattr(owner, name), [0]

    def called(*args, **options):
        seen[0] += 1
        if seen[0] == number:
            _act(action)
        return inner(*args, **options)

    setattr(owner, name, called)


def at_file_event(rank, number):
    """Process 0 is killed when it has written, renamed, linked or removed so many files of its run's checkpoints and links."""
    if rank:
        return
    seen = [0]

    def hook(event, args):
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")
        if changes and any(part in str(args) for part in ("/checkpoints/", "/chain/", "/run.json")):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def poison(rank, ranks, steps):
    """The loss of some processes is not a number in some steps, counted from 1 in each start."""
    if rank not in ranks:
        return
    from cola_ds.training import loop

    step, loss = loop.train_step, loop.loss_sum
    seen, training = [0], [False]

    def poisoned_step(*args):
        seen[0] += 1
        training[0] = True
        result = step(*args)
        training[0] = False
        return result

    loop.train_step = poisoned_step
    loop.loss_sum = lambda *args: loss(*args) * (float("nan") if training[0] and seen[0] in steps else 1.0)


def fill_the_disk(rank, folder, full_from, full_until):
    """From one step of process 0 to another, its disk has no byte left."""
    if rank:
        return
    from cola_ds.training import loop

    step, seen, filler = loop.train_step, [0], Path(folder) / "filler"

    def filling_step(*args):
        seen[0] += 1
        if seen[0] == full_from:
            with open(filler, "wb", buffering=0) as out:
                try:
                    while True:
                        out.write(bytes(4096))
                except OSError:
                    pass
        if seen[0] == full_until:
            filler.unlink()
        return step(*args)

    loop.train_step = filling_step


def _act(action):
    if isinstance(action, list):
        for one in action:
            _act(one)
    elif isinstance(action, tuple):
        print("asleep", flush=True)
        if action[0] == "sleep":
            time.sleep(action[1])
        while action[0] == "until" and not Path(action[1]).exists():
            time.sleep(0.1)
    else:
        os.kill(os.getpid(), action)
