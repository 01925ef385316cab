"""slurm/submit.sh and train.sbatch on a real Slurm: stopped by a time limit, a requeue, a lost node, and gone on by itself."""

import itertools
import json
import os
import re
import subprocess
import sys
import time

import pytest
import yaml

from tests.support import forked
from tests.support.jobs import run_job
from tests.support.launching import Cluster, clean_environment, workers
from tests.support.runs import record, three_links
from tests.support.toys import REPOSITORY, rows, save_run, thorough

STEPS = 300
TWO_NODES = ("--nodes", "2", "--tasks", "1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """What a run that nothing happened to leaves, on two processes of one machine."""
    folder = tmp_path_factory.mktemp("whole")
    statuses, text = run_job(folder / "job", ["train", run_file(toy, folder)])
    assert statuses == [0, 0], text
    return record(folder / "run")


def run_file(toy, folder, **sections):
    """A run of many seconds."""
    config = three_links(
        toy,
        lora={"dropout": 0.0},  # whose random numbers another number of processes draws otherwise
        optim={"max_steps": STEPS},
        run={"log_every_steps": 1},
        checkpoint={"every_steps": 50},
        eval={"every": "end"},
    )
    for name, values in sections.items():
        config[name] = {**config[name], **values}
    config["run"]["dir"] = str(folder / "run")
    return save_run(folder / "run.yaml", config)


def wait_for_step(cluster, frozen, folder, step, timeout_s=300):
    """Until the run has made that step."""
    path, deadline = folder / "run/metrics.jsonl", time.monotonic() + timeout_s
    while not path.exists() or not (made := rows(path)) or made[-1]["step"] < step:
        assert time.monotonic() < deadline, (
            f"step {step} was never made:\n{cluster.do('exec', 'scontrol', 'show', 'job')}"
            f"{cluster.do('exec', 'sinfo', '-N', '-l')}{log(frozen)}"
        )
        time.sleep(0.2)


def events(folder):
    return [row["event"] for row in rows(folder / "run/events.jsonl") if row["event"] not in ("checkpoint", "loaded")]


def log(frozen):
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(frozen.glob("job-*.log")))


def test_a_time_limit_that_is_too_short(cluster, toy, tmp_path):
    """The signal comes, the run stops with a checkpoint, the job queues itself again, and ends with the same bits. Meanwhile
    the YAML that was submitted has changed, which is nothing to a job that was submitted before."""
    longer = {"optim": {"max_steps": 2 * STEPS}}
    statuses, text = run_job(tmp_path / "job", ["train", run_file(toy, tmp_path, **longer)])
    assert statuses == [0, 0], text
    # Slurm's time limits are minutes, and it looks at them twice a minute: the signal comes within 30 s of the start. Where a
    # run is over by then, the next one begins at another time between two looks.
    for attempt in range(4):
        time.sleep(7 * attempt)
        folder = tmp_path / str(attempt)
        folder.mkdir()
        path = run_file(toy, folder, **longer)
        job, frozen = cluster.submit(clean_environment(), *TWO_NODES, "--time", "1", "--signal", "USR1@45", path)
        path.write_text(path.read_text(encoding="utf-8").replace("lr: 0.005", "lr: 0.1"), encoding="utf-8")
        assert cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=540) == "COMPLETED", log(frozen)
        if int(cluster.show(job, "Restarts")) and "stopped" in events(folder):
            break
    assert int(cluster.show(job, "Restarts")) >= 1
    # A signal before the first step of a start leaves nothing to write down but that it began.
    happened = [name for name, _ in itertools.groupby(events(folder))]
    assert happened == ["started", *["stopped", "resumed"] * happened.count("stopped"), "finished"]
    stopped = [row["signal"] for row in rows(folder / "run/events.jsonl") if row["event"] == "stopped"]
    assert stopped
    assert set(stopped) == {"SIGUSR1"}
    assert json.dumps(record(folder / "run")) == json.dumps(record(tmp_path / "run"))
    text = log(frozen)
    starts = int(cluster.show(job, "Restarts")) + 1
    assert text.count("on n[1-2]: stopped on a signal: it is queued again") == starts - 1
    assert f"start {starts} on n[1-2]: done" in text
    assert {path.name for path in (frozen / "logs").iterdir()} == {*(f"{job}.{n}" for n in range(starts)), "latest"}
    assert sorted(path.name for path in (frozen / "logs/latest").iterdir()) == ["n1.0.log", "n2.1.log"]


def test_requeued_cancelled_and_submitted_again(cluster, toy, whole, tmp_path):
    """By the administrator, under way; the controller dies and comes back; cancelled; another job goes on."""
    path = run_file(toy, tmp_path)
    job, frozen = cluster.submit(clean_environment(), *TWO_NODES, "--time", "10", "--fresh", path)
    wait_for_step(cluster, frozen, tmp_path, 60)
    cluster.do("exec", "scontrol", "requeue", job)
    cluster.wait_for(job, "PENDING")
    cluster.wait_for(job, "RUNNING")
    wait_for_step(cluster, frozen, tmp_path, 110)
    cluster.do("crash", "head")
    cluster.do("boot", "head")
    wait_for_step(cluster, frozen, tmp_path, 130)
    cluster.do("exec", "scancel", job)
    cluster.wait_for(job, "CANCELLED")
    assert "it is queued again" not in log(frozen)
    second, _ = cluster.submit(clean_environment(), "--tasks", "1", path)
    assert cluster.wait_for(second, "COMPLETED", "FAILED") == "COMPLETED"  # one process, for the other half
    assert events(tmp_path)[0] == "started"
    assert events(tmp_path).count("started") == 1  # --fresh was for the first start alone
    assert events(tmp_path)[-1] == "finished"
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == list(range(1, STEPS + 1))
    assert record(tmp_path / "run")["result"]["steps"] == whole["result"]["steps"]
    check_close(tmp_path, whole)


def check_close(folder, whole):
    """The same losses in fp32's tolerance: another number of processes adds in another order."""
    found = [row["loss"] for row in record(folder / "run")["metrics.jsonl"]]
    assert found == pytest.approx([row["loss"] for row in whole["metrics.jsonl"]], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("nodes", "tasks"), thorough([("1-2", "2")], [("2", "1")]))
def test_a_node_is_lost(cluster, toy, whole, tmp_path, nodes, tasks):
    """The job goes on with the other node, and half as many processes, whose shards are all there is; or it is queued again, and
    waits for the node."""
    path = run_file(toy, tmp_path, model={"shards": "node"})
    job, frozen = cluster.submit(clean_environment(), "--nodes", nodes, "--tasks", tasks, "--time", "10", path)
    wait_for_step(cluster, frozen, tmp_path, 60)
    cluster.do("crash", "n2")
    try:
        if nodes == "2":
            cluster.wait_for(job, "PENDING")
            cluster.do("boot", "n2")
        assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", log(frozen)
    finally:
        cluster.do("boot", "n2")
    resumed = [row["hosts"] for row in rows(tmp_path / "run/events.jsonl") if row["event"] == "resumed"]
    if nodes == "2":
        # Slurm may repeat, up to a minute later, its order to end the job on the node that was lost: it then hits the second
        # start, which is a stop and a start more.
        assert int(cluster.show(job, "Restarts")) == len(resumed) in (1, 2)
    else:
        assert int(cluster.show(job, "Restarts")) == 0
        assert len(resumed) == 1
    assert all(hosts == (["n1", "n2"] if nodes == "2" else ["n1", "n1"]) for hosts in resumed)
    check_close(tmp_path, whole)
    if nodes == "2":
        assert json.dumps(record(tmp_path / "run")) == json.dumps(whole)
    else:
        assert "goes on with 1 of 2 nodes" in log(frozen)
        last = (frozen / "logs/latest/n1.0.log").read_text(encoding="utf-8")
        assert "shards      over all 2 processes: all are on n1" in last


def test_what_failed_stays_failed(cluster, toy, tmp_path):
    """A mistake in the config, and a killed slurmstepd, whose task is left without anybody above it."""
    path = run_file(toy, tmp_path, lora={"targets": ["no_such_layer"]})
    frozen = tmp_path / "by-hand"
    subprocess.run(
        [sys.executable, "-m", "cola_ds", "train", str(path), "--freeze", str(frozen)], check=True, cwd=REPOSITORY
    )
    (frozen / "job.env").write_text(
        f"run_dir={tmp_path}/run model=x processes_per_node=1 min_nodes=2 python={sys.executable} max_restarts=9 "
        "container= mounts= local_model= offline=1 fresh= setup=()\n",
        encoding="utf-8",
    )
    words = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--chdir={REPOSITORY}"]
    script = str(REPOSITORY / "slurm/train.sbatch")
    job = cluster.do("exec", *words, f"--output={frozen}/job-%j.log", script, str(frozen)).strip()
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
    assert cluster.show(job, "ExitCode") == "2:0", log(frozen)
    assert cluster.show(job, "Restarts") == "0"
    assert "1 cola-ds: lora.targets no_such_layer matches no layer" in log(frozen)

    job, frozen = cluster.submit(clean_environment(), *TWO_NODES, "--time", "10", run_file(toy, tmp_path))
    wait_for_step(cluster, frozen, tmp_path, 20)
    victims = workers(frozen / "run.yaml")
    cluster.do("on", "n2", "pkill", "-KILL", "-f", f"slurmstepd: .{job}.0")
    deadline = time.monotonic() + 120
    while any(os.path.exists(f"/proc/{pid}") for pid in victims):
        assert time.monotonic() < deadline, log(frozen)
        time.sleep(0.5)
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "NODE_FAIL") == "FAILED", log(frozen)
    assert cluster.show(job, "Restarts") == "0"


@pytest.mark.parametrize(("options", "reason"), [
    (["--max-restarts", "1"], "it was started again 1 time, which is all that submit.sh's --max-restarts allows"),
    ([], "it was started again 3 times without a new checkpoint"),
])  # fmt: skip
def test_a_job_that_comes_back_for_ever_gives_up(cluster, toy, tmp_path, options, reason):
    job, frozen = cluster.submit(
        clean_environment(), *TWO_NODES, *options, "--setup", "sleep 300", run_file(toy, tmp_path)
    )
    while cluster.wait_for(job, "RUNNING", "FAILED", "COMPLETED") == "RUNNING":
        time.sleep(1)
        if cluster.show(job, "JobState") == "RUNNING":
            cluster.do("exec", "scontrol", "requeue", job)
    assert cluster.show(job, "JobState") == "FAILED"
    assert reason in log(frozen)


def test_a_second_job_in_one_run_folder(cluster, toy, tmp_path):
    """The first is not disturbed; the second ends at once with status 2, and does not queue again."""
    path = run_file(toy, tmp_path, optim={"max_steps": 20 * STEPS})  # it outlasts the second, and is cancelled
    first, its = cluster.submit(clean_environment(), "--tasks", "1", "--local-model", tmp_path / "node-disk", path)
    wait_for_step(cluster, its, tmp_path, 3)
    second, frozen = cluster.submit(clean_environment(), "--tasks", "1", path)
    assert cluster.wait_for(second, "COMPLETED", "FAILED") == "FAILED"
    assert cluster.show(second, "ExitCode") == "2:0"
    assert "belongs to a run that is still going: process" in log(frozen)
    assert f"(Slurm job {first})" in log(frozen)
    assert cluster.show(first, "JobState") == "RUNNING"
    (local,) = (tmp_path / "node-disk").iterdir()  # read from there, and found to be the same model
    config = yaml.safe_load((tmp_path / "run/run.yaml").read_text(encoding="utf-8"))
    assert config["model"]["path"] == str(local)
    cluster.do("exec", "scancel", first)
    cluster.wait_for(first, "CANCELLED")


def submit(*words):
    env = clean_environment()
    env["PATH"] = f"{forked.shared_python()}:{env['PATH']}"
    return subprocess.run(
        ["./slurm/submit.sh", *map(str, words)], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )


def test_dry_run_prints_and_writes_nothing(toy, tmp_path):
    path = run_file(toy, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = ["--nodes", "2", "--gpus", "2", "--time", "1:00:00", "--account", "a b", "--sbatch", "--exclusive"]
    done = submit("--dry-run", *words, path)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert command.startswith("sbatch --nodes=2 --ntasks-per-node=2 --signal=USR1@300 ")
    assert r"--time=1:00:00 --account=a\ b --exclusive --gpus-per-node=2 " in command
    assert "8 = 2 examples x 1 micro step x 4 processes" in done.stdout
    assert "cluster     2 nodes x 2 processes, on H100 with 80.0 GiB" in done.stdout and "MiB  in all" in done.stdout
    small = submit("--dry-run", *words, "--device", "A100", "--memory", "1KiB", path)
    assert small.returncode == 2 and "on A100 with" in small.stdout and "this does not fit" in small.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_commands_of_the_page(toy, tmp_path):
    page = (REPOSITORY / "slurm/README.md").read_text(encoding="utf-8")
    calls = [line.split() for line in page.splitlines() if line.startswith("./slurm/submit.sh ")]
    assert len(calls) >= 2
    mine = [f"model.path={toy[0]}", f"data.train={toy[1]}", f"data.eval={toy[2]}", "data.max_length=64"]
    for words in calls:
        done = submit("--dry-run", *words[1:], *mine, f"run.dir={tmp_path / 'run'}")
        assert done.returncode == 0, done.stderr
    helped = submit("--help").stdout
    for option in set(re.findall(r"--[a-z-]+", " ".join(" ".join(words) for words in calls))):
        assert option in helped


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: slurm/submit.sh [options] RUN.yaml"),
        (["--node", "2", "RUN"], "unknown option --node"),
        (["--nodes", "two", "RUN"], "--nodes two must be a number, or MIN-MAX"),
        (["--gpus", "0", "RUN"], "take a number from 1; it is 0"),
        (["--gpus", "2", "--tasks", "2", "RUN"], "contradict each other"),
        (["--signal", "KILL@3", "RUN"], "--signal KILL@3 must look like USR1@300"),
        (["--time"], "--time needs a value"),
        (["--nodes", "3", "RUN"], "optim.global_batch_size 8 does not divide into micro batches of 2 on 6 processes"),
        (["--nodes", "1-3", "RUN"], "does not divide into micro batches of 2 on 6 processes"),
        (["RUN", "optim.lrr=1"], "unknown key optim.lrr"),
        (["missing.yaml"], "cannot read the run's YAML missing.yaml"),
    ],
)
def test_wrong_calls(toy, tmp_path, words, message):
    path = run_file(toy, tmp_path)
    done = submit("--dry-run", *[path if word == "RUN" else word for word in words])
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
