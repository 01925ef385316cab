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

from tests.support.jobs import run_job
from tests.support.launching import Cluster, clean_environment, workers
from tests.support.runs import record, three_links
from tests.support.toys import REPOSITORY, rows, save_run

STEPS = 300  # many seconds, and it is stopped after a few


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
    with Cluster(tmp_path_factory.mktemp("slurm"), MS_GPUS="2") as cluster:  # GPUs by name only
        yield cluster


def command(launcher, run_file, cluster=None, overrides=()):
    """How two processes are started by a launcher, and the environment."""
    env, train = clean_environment(), [sys.executable, "-m", "cola_ds", "train", str(run_file), *overrides]
    if launcher == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("Open MPI is not installed: apt-get install openmpi-bin")
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if launcher == "deepspeed":
        return ["./launch/local.sh", str(run_file), "2", *overrides], env
    if launcher == "torchrun":
        return ["./launch/torchrun.sh", str(run_file), "2", *overrides], env
    if launcher == "mpirun.sh":
        return ["./launch/mpirun.sh", str(run_file), "2", *overrides, "--", "--oversubscribe"], env
    if launcher == "mpirun":
        # mpirun gives processes one second after its own SIGTERM, unless told otherwise; and then always waits as long.
        patience = ["--mca", "odls_base_sigkill_timeout", "4"]
        return ["mpirun", "--oversubscribe", *patience, "-np", "2", *train], env
    srun = ["srun", "-N2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--chdir", str(REPOSITORY)]
    return [*cluster.head, *srun, *train], {**env, **cluster.own}


def started(words, env, folder):
    """The running command, once it has made three steps."""
    with open(folder / "out.txt", "wb") as out:
        options = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        # A shell that started these tests in the background has them, and what they start, ignore SIGINT.
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(words, env=env, cwd=REPOSITORY, **options)
    deadline = time.monotonic() + 300
    while not (folder / "run/metrics.jsonl").exists() or len(rows(folder / "run/metrics.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline, said(folder)
        time.sleep(0.1)
    return process


def said(folder):
    return (folder / "out.txt").read_text(encoding="utf-8", errors="replace")


def check_stopped(folder, name):
    """Stopped with a checkpoint after the last step that was logged."""
    event = rows(folder / "run/events.jsonl")[-1]
    assert (event["event"], event.get("signal")) == ("stopped", name), (event, said(folder))
    step = rows(folder / "run/metrics.jsonl")[-1]["step"]
    assert 3 <= step < STEPS
    assert [path.name for path in (folder / "run/checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    assert not (folder / "run/lock.json").exists()
    assert f"stopped on {name} after step {step}, with a checkpoint" in said(folder)


LAUNCHERS = ["deepspeed", "torchrun", "mpirun", "srun"]
# A launcher sees no more of a signal to one process than how that ends, which is alike for all of them: one each.
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]


@pytest.mark.parametrize(("launcher", "number"), list(zip(LAUNCHERS, SIGNALS, strict=True)))
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
        ("mpirun.sh", signal.SIGTERM, "SIGUSR1"),
        ("srun", signal.SIGUSR1, "SIGUSR1"),
        ("scancel", signal.SIGTERM, "SIGTERM"),
    ],
)
def test_a_signal_to_the_launcher(request, run_file, tmp_path, launcher, number, arrives):
    """What each of them passes on, and what status it ends with."""
    slurm = request.getfixturevalue("cluster") if launcher in ("srun", "scancel") else None
    words, env = command(launcher, run_file, slurm)
    process = started(words, env, tmp_path)
    if launcher == "srun":
        subprocess.run(["pkill", f"-{number.name}", "-o", "-x", "srun"], check=True)
    elif slurm:
        job = slurm.do("exec", "squeue", "-h", "-o", "%i").strip()
        slurm.do("exec", "scancel", f"--signal={number.name[3:]}", job)
    else:
        os.kill(process.pid, number)
    status = process.wait(60)
    check_stopped(tmp_path, arrives)
    assert status == {"torchrun": 1}.get(launcher, status if (launcher, number) == ("mpirun", signal.SIGTERM) else 75)


@pytest.fixture(scope="module")
def quickstart(toy, tmp_path_factory):
    """Overrides that shorten the quickstart's run and put it on a toy model; and the losses of one process without a launcher."""
    folder = tmp_path_factory.mktemp("quickstart")
    overrides = [
        f"model.path={toy[0]}", f"data.train={toy[1]}", f"data.eval={toy[2]}", "optim.max_steps=6", "eval.every=end",
        "optim.micro_batch_size=2",
    ]  # fmt: skip
    words = ["train", "launch/quickstart/run.yaml", *overrides, f"run.dir={folder}"]
    statuses, text = run_job(folder / "job", words, world_size=1)
    assert statuses == [0], text
    return overrides, [row["loss"] for row in rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize("way", ["deepspeed", "torchrun", "mpirun.sh", "srun"])
def test_the_same_losses_everywhere(request, quickstart, tmp_path, way):
    """Those on several machines, beside Slurm's, are in test_node_shards.py."""
    overrides, losses = quickstart
    cluster = request.getfixturevalue("cluster") if way == "srun" else None
    words, env = command(way, "launch/quickstart/run.yaml", cluster, [*overrides, f"run.dir={tmp_path / 'run'}"])
    done = subprocess.run(words, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["loss"] for row in rows(tmp_path / "run/metrics.jsonl")] == pytest.approx(losses, rel=1e-5, abs=1e-5)
    environment = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))
    assert environment["world_size"] == 2
    assert environment["hosts"] == (["n1", "n2"] if cluster else environment["hosts"][:1])


def test_a_run_goes_on_under_another_launcher(request, toy, tmp_path):
    """Begun with deepspeed's, stopped; gone on with torchrun, stopped; with mpirun, stopped; ended on two Slurm nodes."""
    config = three_links(toy, optim={"max_steps": 40}, run={"log_every_steps": 1})
    whole = {**config, "run": {**config["run"], "dir": str(tmp_path / "whole")}}
    statuses, text = run_job(tmp_path / "job", ["train", save_run(tmp_path / "whole.yaml", whole)])
    assert statuses == [0, 0], text
    config["run"]["dir"] = str(tmp_path / "run")
    run_file = save_run(tmp_path / "run.yaml", config)
    for launcher in LAUNCHERS:
        words, env = command(launcher, run_file, launcher == "srun" and request.getfixturevalue("cluster"))
        before = len(rows(tmp_path / "run/metrics.jsonl")) if (tmp_path / "run").exists() else 0
        with open(tmp_path / "out.txt", "wb") as out:
            process = subprocess.Popen(words, env=env, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT)
        if launcher != "srun":
            deadline = time.monotonic() + 300
            while (
                not (tmp_path / "run/metrics.jsonl").exists() or len(rows(tmp_path / "run/metrics.jsonl")) < before + 2
            ):
                assert process.poll() is None and time.monotonic() < deadline, said(tmp_path)
                time.sleep(0.02)
            os.kill(workers(run_file)[0], signal.SIGUSR1)
        process.wait(90)
    assert process.returncode == 0, said(tmp_path)
    events = rows(tmp_path / "run/events.jsonl")
    assert [row["event"] for row in events if row["event"] not in ("checkpoint", "loaded")] == [
        "started", "stopped", "resumed", "stopped", "resumed", "stopped", "resumed", "finished",
    ]  # fmt: skip
    assert [row["hosts"] for row in events if row["event"] == "resumed"][-1] == ["n1", "n2"]
    assert json.dumps(record(tmp_path / "run")) == json.dumps(record(tmp_path / "whole"))
