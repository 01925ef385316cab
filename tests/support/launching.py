"""What starts runs for real: launchers, and a Slurm cluster of two nodes on this machine (mini-slurm.sh), each with its own
host name, network and processes."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.toys import REPOSITORY

MINI_SLURM = str(REPOSITORY / "tests/support/mini-slurm.sh")


class Cluster:
    """`with Cluster(folder) as cluster`: nodes n1 and n2, and a head node."""

    def __init__(self, folder: Path, **options: str):
        if shutil.which("srun") is None or shutil.which("munged") is None:
            pytest.skip("Slurm is not installed: apt-get install slurm-wlm munge")
        if os.geteuid():
            pytest.skip("a cluster of namespaces needs root")
        self.own = {"MS_DIR": str(folder), **options}
        self.env = {**os.environ, **self.own}
        self.head = [MINI_SLURM, "exec"]

    def __enter__(self):
        self.do("start")
        return self

    def __exit__(self, *error):
        subprocess.run([MINI_SLURM, "wipe"], env=self.env, capture_output=True, timeout=60)

    def do(self, *words, timeout_s: float = 180) -> str:
        """One of the script's verbs: crash n2, boot n2, cut n2, on n1 COMMAND, exec COMMAND."""
        done = subprocess.run([MINI_SLURM, *words], env=self.env, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, env: dict, *words) -> tuple[str, Path]:
        """What slurm/submit.sh does on the head node: the job's number, and the folder that it made."""
        self.wait_for_nodes()
        command = [*self.head, "./slurm/submit.sh", *map(str, words)]
        done = subprocess.run(
            command, cwd=REPOSITORY, env={**env, **self.own}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r"Submitted batch job (\d+)", done.stdout)[1], Path(
            re.search(r"^logs: (.*)/logs/latest/", done.stdout, re.MULTILINE)[1]
        )

    def wait_for_nodes(self, timeout_s: float = 300) -> None:
        """Until every node answers and has heard that its last job is over: one that was just booted has not at once."""
        deadline = time.monotonic() + timeout_s
        while found := re.findall(r"\S*(?:down|unk|comp|[*])\S*", self.do("exec", "sinfo", "-h", "-N", "-o", "%N:%t")):
            assert time.monotonic() < deadline, found
            time.sleep(0.3)

    def carried(self) -> int:
        """Bytes that have gone from one node to another (or to the head node) so far, with all headers, as the nodes' own network
        interfaces count them. What processes of one node tell each other is not among them: that is `lo`."""
        counted = 0
        for node in ("n1", "n2"):
            line = re.search(r"^ *eth0: *(.*)$", self.do("on", node, "cat", "/proc/net/dev"), re.MULTILINE)[1].split()
            counted += int(line[0]) + int(line[8])  # received, sent
        return counted // 2  # each byte was sent by one and received by the other

    def show(self, job: str, field: str) -> str:
        """A field of `scontrol show job`."""
        return re.search(rf"\b{field}=(\S*)", self.do("exec", "scontrol", "show", "job", job))[1]

    def wait_for(self, job: str, *states: str, timeout_s: float = 300) -> str:
        """Until the job is in one of these states."""
        deadline = time.monotonic() + timeout_s
        while (state := self.show(job, "JobState")) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {states}"
            time.sleep(0.3)
        return state


def clean_environment() -> dict[str, str]:
    """Without what a launcher has set; two processes share this machine's cores."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in names}
    return env | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{env['PATH']}",
    }


def workers(run_file: Path) -> list[int]:
    """Process ids of the run's own processes, in the order of their ranks; of launchers none."""
    found = {}
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as held:
                words = held.read().split(b"\0")
            with open(f"/proc/{entry}/environ", "rb") as held:
                env = dict(part.partition(b"=")[::2] for part in held.read().split(b"\0"))
        except (OSError, ValueError):
            continue
        rank = env.get(b"RANK") or env.get(b"OMPI_COMM_WORLD_RANK") or env.get(b"SLURM_PROCID")
        if b"cola_ds" in words[2:4] and str(run_file).encode() in words and rank:  # python [-u] -m cola_ds
            found[int(rank)] = int(entry)
    return [found[rank] for rank in sorted(found)]


def in_copy(copy: Path, command: str, timeout_s: float = 600) -> str:
    """A shell command as a reader of the documents would type it, in a copy of the repository. What lies in its bin/ goes before
    what is installed."""
    env = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    done = subprocess.run(
        ["bash", "-c", f'source .venv/bin/activate && PATH="$PWD/bin:$PATH" && {command}'],
        cwd=copy, env=env, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
