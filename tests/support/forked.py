"""`cola-ds` without the seconds of its imports: forked from a server that has made them.

`python tests/support/forked.py SOCKET WORD ...` is `cola-ds WORD ...`, forked by the server of that socket,
`python -m tests.support.forked --serve SOCKET`: with this process's environment, folder,
output and status, and the signals that are sent to it.
"""

import atexit
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Server:
    """`with Server(folder) as server`: `server.command` begins a command line. `within`: the words that start it somewhere else,
    such as in a node of a cluster, with its network; what it forks is there, too."""

    def __init__(self, folder: Path, name: str = "forked", within: tuple[str, ...] = ()):
        self.socket, self.within = folder / f"{name}.socket", within
        self.command = [sys.executable, "-S", "-E", str(Path(__file__).resolve()), str(self.socket)]

    def __enter__(self):
        words = [*self.within, sys.executable, "-m", "tests.support.forked", "--serve", str(self.socket)]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }  # read as the libraries are imported
        self.process = subprocess.Popen(
            words, cwd=Path(__file__).resolve().parents[2], env=environment, stdout=subprocess.PIPE
        )
        assert b"ready\n" in self.process.stdout  # reads as far as that: libraries speak before
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.stdout.close()  # one in a node lives on, and holds it, until the node is gone
        self.process.wait()


@functools.cache
def shared_command() -> list[str]:
    """The command line of a server that all tests of this process share, begun with the first of them."""
    folder = Path(tempfile.mkdtemp())
    server = Server(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.__exit__)
    return server.__enter__().command


def shared_python() -> str:
    """A folder to put before others in PATH: for scripts, whose `python -m cola_ds` is then this command."""
    command = shared_command()
    script = Path(command[-1]).with_name("python")
    script.write_text(
        '#!/usr/bin/env bash\n[ "$1 $2" = "-m cola_ds" ] || '
        f'exec {shlex.quote(sys.executable)} "$@"\nshift 2\nexec {shlex.join(command)} "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return str(script.parent)


def serve(path: str) -> None:
    import tests.support.preload  # noqa: F401
    from cola_ds.cli import main

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets those that have ended
        print("ready", flush=True)
        while True:
            caller, _ = listening.accept()
            text, outputs, _, _ = socket.recv_fds(caller, 1 << 20, 2)
            if os.fork():  # several at a time: each has a process that waits for it
                caller.close()
                for output in outputs:
                    os.close(output)
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if pid := os.fork():
                caller.send(f"{pid}\n".encode())
                for output in outputs:
                    os.close(output)
                caller.send(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
                os._exit(0)
            told = json.loads(text)
            for number, output in enumerate(outputs, 1):
                os.dup2(output, number)
            os.environ.clear()
            os.environ.update(told["environment"])
            os.chdir(told["folder"])
            status = 1
            try:
                status = main(told["words"])
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status or 0)


def call(path: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        told = {"words": words, "environment": dict(os.environ), "folder": os.getcwd()}
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is somebody to pass them on to
        socket.send_fds(server, [json.dumps(told).encode()], [1, 2])
        answers = server.makefile()
        pid = int(answers.readline())
        for number in PASSED_ON:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        status = int(answers.readline())
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    sys.exit(call(sys.argv[1], sys.argv[2:]))
