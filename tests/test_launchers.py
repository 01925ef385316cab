"""Real launchers: what a signal to them, or to one of their processes, becomes; and that a run goes on under any of them.

Slurm is a real cluster of two nodes on this machine (mini-slurm.sh), each with its own host name and network.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.distributed import free_port
from tests.runs import record, three_links
from tests.toys import REPOSITORY, rows, save_run

STEPS = 300  # many seconds, and it is stopped after a few
MINI_SLURM = REPOSITORY / "tests/mini-slurm.sh"


@pytest.fixture
def run_file(toy, tmp_path):
    config = three_links(
        toy,
        optim={"max_steps": STEPS},
        checkpoint={"every_steps": None},
        run={"log_every_steps": 1},
        eval={"every": "end"},
    )
    config["run"]["dir"] = str(tmp_path / "run")
    return save_run(tmp_path / "run.yaml", config)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Runs a command on the head node of a Slurm cluster of two nodes."""
    if shutil.which("srun") is None or shutil.which("munged") is None:
        pytest.skip("Slurm is not installed: apt-get install slurm-wlm munge")
    if os.geteuid():
        pytest.skip("a cluster of namespaces needs root")
    env = {**os.environ, "MS_DIR": str(tmp_path_factory.mktemp("slurm"))}
    subprocess.run([MINI_SLURM, "start"], env=env, check=True, capture_output=True, timeout=60)
    yield [str(MINI_SLURM), "exec"], env
    subprocess.run([MINI_SLURM, "wipe"], env=env, capture_output=True, timeout=60)


def command(launcher, run_file, cluster=None):
    """How two processes are started by a launcher, and the environment."""
    train = [sys.executable, "-m", "cola_ds", "train", str(run_file)]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in names}
    env |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{env['PATH']}",
    }
    if launcher == "deepspeed":
        return ["./launch/local.sh", str(run_file), "2"], env
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
        return [*torchrun, "-m", *train[2:]], env
    if launcher == "mpirun":
        if shutil.which("mpirun") is None:
            pytest.skip("Open MPI is not installed: apt-get install openmpi-bin")
        # mpirun gives processes one second after its own SIGTERM, unless told otherwise; and then always waits as long.
        patience = ["--mca", "odls_base_sigkill_timeout", "4"]
        return ["mpirun", "--allow-run-as-root", "--oversubscribe", *patience, "-np", "2", *train], env
    head, extra = cluster
    srun = ["srun", "-N2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--chdir", str(REPOSITORY)]
    return [*head, *srun, *train], {**env, **extra}


def started(words, env, folder):
    """The running command, once it has made three steps."""
    with open(folder / "out.txt", "wb") as out:
        options = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        # A shell that started these tests in the background has them, and what they start, ignore SIGINT.
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(words, env=env, cwd=REPOSITORY, **options)
    deadline = time.monotonic() + 120
    while not (folder / "run/metrics.jsonl").exists() or len(rows(folder / "run/metrics.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline, said(folder)
        time.sleep(0.1)
    return process


def said(folder):
    return (folder / "out.txt").read_text(encoding="utf-8", errors="replace")


def workers(run_file):
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


def check_stopped(folder, name):
    """Stopped with a checkpoint after the last step that was logged."""
    event = rows(folder / "run/events.jsonl")[-1]
    assert (event["event"], event["signal"]) == ("stopped", name), said(folder)
    step = rows(folder / "run/metrics.jsonl")[-1]["step"]
    assert 3 <= step < STEPS
    assert [path.name for path in (folder / "run/checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    assert not (folder / "run/lock.json").exists()
    assert f"stopped on {name} after step {step}, with a checkpoint" in said(folder)


LAUNCHERS = ["deepspeed", "torchrun", "mpirun", "srun"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_one_process(request, run_file, tmp_path, launcher, number):
    words, env = command(launcher, run_file, launcher == "srun" and request.getfixturevalue("cluster"))
    process = started(words, env, tmp_path)
    os.kill(workers(run_file)[1], number)
    status = process.wait(60)
    check_stopped(tmp_path, number.name)
    assert status == (1 if launcher == "torchrun" else 75), said(tmp_path)  # torchrun itself always ends with 1
    if launcher == "torchrun":
        assert "exitcode  : 75" in said(tmp_path)


@pytest.mark.parametrize(
    ("launcher", "number", "arrives"),
    [
        ("deepspeed", signal.SIGTERM, "SIGUSR1"),
        ("deepspeed", signal.SIGINT, "SIGUSR1"),
        ("deepspeed", signal.SIGUSR1, "SIGUSR1"),
        ("torchrun", signal.SIGTERM, "SIGTERM"),
        ("mpirun", signal.SIGTERM, "SIGTERM"),
        ("mpirun", signal.SIGUSR1, "SIGUSR1"),
        ("srun", signal.SIGUSR1, "SIGUSR1"),
        ("scancel", signal.SIGTERM, "SIGTERM"),
    ],
)
def test_a_signal_to_the_launcher(request, run_file, tmp_path, launcher, number, arrives):
    """What each of them passes on, and what status it ends with."""
    slurm = request.getfixturevalue("cluster") if launcher in ("srun", "scancel") else None
    words, env = command(launcher, run_file, slurm)
    process = started(words, env, tmp_path)
    if slurm:
        head, slurm_env = slurm
        job = subprocess.run(
            [*head, "squeue", "-h", "-o", "%i"], env=slurm_env, capture_output=True, text=True
        ).stdout.strip()
        srun = ["pkill", f"-{number.name}", "-o", "-x", "srun"]
        send = srun if launcher == "srun" else [*head, "scancel", f"--signal={number.name[3:]}", job]
        subprocess.run(send, env=slurm_env, check=True)
    else:
        os.kill(process.pid, number)
    status = process.wait(60)
    check_stopped(tmp_path, arrives)
    assert status == {"torchrun": 1}.get(launcher, status if (launcher, number) == ("mpirun", signal.SIGTERM) else 75)


def test_a_run_goes_on_under_another_launcher(request, toy, tmp_path):
    """Begun with deepspeed's, stopped; gone on with torchrun, stopped; with mpirun, stopped; ended on two Slurm nodes."""
    config = three_links(toy, optim={"max_steps": 40}, run={"log_every_steps": 1})
    whole = {**config, "run": {**config["run"], "dir": str(tmp_path / "whole")}}
    words, env = command("deepspeed", save_run(tmp_path / "whole.yaml", whole))
    assert subprocess.run(words, env=env, cwd=REPOSITORY, capture_output=True, timeout=120).returncode == 0
    config["run"]["dir"] = str(tmp_path / "run")
    run_file = save_run(tmp_path / "run.yaml", config)
    for launcher in LAUNCHERS:
        words, env = command(launcher, run_file, launcher == "srun" and request.getfixturevalue("cluster"))
        before = len(rows(tmp_path / "run/metrics.jsonl")) if (tmp_path / "run").exists() else 0
        with open(tmp_path / "out.txt", "wb") as out:
            process = subprocess.Popen(words, env=env, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT)
        if launcher != "srun":
            deadline = time.monotonic() + 120
            while (
                not (tmp_path / "run/metrics.jsonl").exists() or len(rows(tmp_path / "run/metrics.jsonl")) < before + 2
            ):
                assert process.poll() is None and time.monotonic() < deadline, said(tmp_path)
                time.sleep(0.02)
            os.kill(workers(run_file)[0], signal.SIGUSR1)
        process.wait(90)
    assert process.returncode == 0, said(tmp_path)
    events = rows(tmp_path / "run/events.jsonl")
    assert [row["event"] for row in events if row["event"] != "checkpoint"] == [
        "started", "stopped", "resumed", "stopped", "resumed", "stopped", "resumed", "finished",
    ]  # fmt: skip
    assert [row["hosts"] for row in events if row["event"] == "resumed"][-1] == ["n1", "n2"]
    assert json.dumps(record(tmp_path / "run")) == json.dumps(record(tmp_path / "whole"))
