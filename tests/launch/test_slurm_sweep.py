"""slurm/sweep.sh and sweep.sbatch: a sweep as job arrays on a real Slurm, with real runs of which one fails."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cola_ds.report.report import report
from cola_ds.sweep.plan import command_words
from tests.support.launching import Cluster, clean_environment
from tests.support.sweeps import save_base, write_sweep
from tests.support.toys import REPOSITORY, rows, run_config, save_model, save_run
from tests.training.test_task_runs import reviews, write

TASK = "prompt: 'Review: {sentence}\\nGood? '\ncandidates: ['no', 'yes']\nlabel: label\n"


@pytest.fixture
def place(tmp_path):
    save_base(tmp_path)
    write_sweep(tmp_path)
    return tmp_path


def submit(cluster, *words):
    """What slurm/sweep.sh says on the head node, and the numbers of the jobs by their stage."""
    command = [*cluster.head, "./slurm/sweep.sh", "--tasks", "1", *map(str, words)]
    env = {**clean_environment(), **cluster.own}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, dict(re.findall(r"^(search|seeds): job (\d+)$", done.stdout, re.MULTILINE))


def wait_until_over(cluster, job, timeout_s=300):
    """The states of the tasks of an array, by their indices, once all have ended."""
    deadline = time.monotonic() + timeout_s
    while True:
        text = cluster.do("exec", "scontrol", "show", "job", job)
        found = dict(re.findall(r"ArrayTaskId=(\S+).*?JobState=(\S+)", text, re.DOTALL))
        if found and not {"PENDING", "RUNNING", "COMPLETING"} & set(found.values()):
            return found
        assert time.monotonic() < deadline, text
        time.sleep(0.3)


def starts(runs):
    """How often each run was started, by its log."""
    logs = {log: log.read_text(encoding="utf-8") for log in sorted(runs.glob("reviews/**/seed=*.log"))}
    marks = re.compile(r"^cola-ds sweep: \d{4}-", re.MULTILINE)
    return {str(log.relative_to(runs / "reviews"))[:-4]: len(marks.findall(text)) for log, text in logs.items()}


def test_job_arrays_of_which_one_run_fails(tmp_path):
    """The others finish, and the table says which failed and why; with the mistake corrected and submitted again, only what is
    missing runs, one of it through a signal as before a time limit; and the seeds after the search."""
    base = run_config(save_model(tmp_path / "model"), "unused", "unused", eval={"every": "end"})
    base["data"] = {"dir": str(tmp_path / "rows"), "num_train": 16, "num_dev": 6, "num_test": 6, "max_length": 64}
    base["optim"] = {"lr": 5e-3, "epochs": 50, "global_batch_size": 8, "micro_batch_size": 8}
    del base["method"], base["chain"], base["run"]["dir"]
    save_run(tmp_path / "base.yaml", base)
    write(tmp_path / "rows/train.jsonl", reviews(3))
    write(tmp_path / "rows/validation.jsonl", reviews(2))
    (tmp_path / "reviews.yaml").write_text(TASK, encoding="utf-8")
    keys = {"tasks": [str(tmp_path / "reviews.yaml")], "seeds": [0, 1], "launcher": None}
    runs = tmp_path / "runs"
    with Cluster(tmp_path / "slurm") as cluster:
        words = ["--at-once", "2", tmp_path / "sweep.yaml"]
        write_sweep(tmp_path, grid={"lora.targets": [["q_proj"], ["q_prj"]]}, **keys)
        _, jobs = submit(cluster, *words)
        (tmp_path / "sweep.yaml").write_text("", encoding="utf-8")  # nothing to jobs that were submitted before
        (tmp_path / "reviews.yaml").rename(tmp_path / "away.yaml")
        searched = wait_until_over(cluster, jobs["search"])
        assert searched == {"0": "COMPLETED", "1": "COMPLETED", "2": "COMPLETED", "3": "FAILED"}
        assert wait_until_over(cluster, jobs["seeds"]) == {"4": "FAILED"}
        text = report([str(runs)], None, None, None, None)
        assert re.search(r"\| reviews \| accuracy \| \d+\.\d\d ±\d+\.\d\d \(2\) \| - \|", text)
        failed = runs / "reviews/lora/targets=q_prj/seed=0"
        assert f"Failed: {failed}: status 2: lora.targets q_prj matches no layer" in text
        assert "Nothing chosen: reviews / lora: 1 of 2 runs of its search has not finished" in text
        logs = [next(runs.glob(f"slurm/*/job-{jobs[s]}_{n}.log")) for s, n in (("search", 3), ("seeds", 4))]
        assert "ends with status 2" in logs[0].read_text(encoding="utf-8")
        assert "waits for the choice of a grid point" in logs[1].read_text(encoding="utf-8")
        before = starts(runs)
        assert before == dict.fromkeys(before, 1)

        (tmp_path / "away.yaml").rename(tmp_path / "reviews.yaml")
        write_sweep(tmp_path, grid={"lora.targets": [["q_proj"], ["v_proj"]]}, **keys)
        _, jobs = submit(cluster, *words)
        run = runs / "reviews/lora/targets=v_proj/seed=0"
        deadline = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < deadline, cluster.do("status")
            time.sleep(0.1)
        cluster.do("exec", "scancel", "--signal=USR1", jobs["search"])
        assert wait_until_over(cluster, jobs["search"]) == {"3": "COMPLETED"}
        assert wait_until_over(cluster, jobs["seeds"]) == {"4": "COMPLETED"}
        happened = [row["event"] for row in rows(run / "events.jsonl") if row["event"] not in ("checkpoint", "loaded")]
        assert happened == ["started", "stopped", "resumed", "finished"]
        text = report([str(runs)], None, None, None, None)
        (chosen,) = re.findall(r"Chosen on dev: reviews / lora: (targets=[qv]_proj) \(dev", text)
        new = {"lora/targets=v_proj/seed=0": 2, f"lora/{chosen}/seed=1": 1}
        assert starts(runs) == {**before, **new}
        assert "Failed" not in text
        assert re.search(r"\(2\)\*{0,2} \| \*{0,2}\d+\.\d\d ±\d+\.\d\d \(2\)\*{0,2} \|", text)
        assert "all of its runs have finished" in submit(cluster, *words)[0]


@pytest.mark.parametrize(("statuses", "status"), [((75, 3, 75), 3), ((75, 75), 75), ((0, 0), 0), ((137, 2), 2)])
def test_the_status_of_a_run_of_several_processes(tmp_path, statuses, status):
    """srun gives the highest, and ends the others once one has failed."""
    (tmp_path / "job.env").write_text("python=python processes_per_node=2\n", encoding="utf-8")
    lines = "".join(f"echo '50%|## | step'; printf 'bar\\nexit status %s\\n' {one}; " for one in statuses)
    (tmp_path / "srun").write_text(f'#!/bin/bash\necho "$@"; {lines}\nexit {max(statuses)}\n', encoding="utf-8")
    (tmp_path / "srun").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2"}
    words = ["bash", str(REPOSITORY / "slurm/sweep.sbatch"), str(tmp_path), "step", "run.yaml", "run.dir=x"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == status
    assert "--ntasks=4 --ntasks-per-node=2" in done.stderr
    assert "python -u -m cola_ds train run.yaml run.dir=x" in done.stderr


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_a_signal_reaches_a_launcher_that_is_no_job_step(tmp_path, name):
    """Slurm sends it to the batch script alone, which queues its task again once the run has stopped."""
    folder = tmp_path / "it's here ü"
    folder.mkdir()
    (folder / "job.env").write_text(
        f"python={tmp_path}/python processes_per_node=2 max_restarts=5 offline= setup=() launcher='./mine {{run}}'\n"
    )
    # What waits is a child: a signal to the script alone does not reach it.
    wait = 'trap "echo stopped; exit 75" USR1; echo "$@" begun; for i in $(seq 600); do sleep 0.1; done'
    for command, text in (("python", wait), ("squeue", "echo RUNNING"), ("scontrol", 'echo "$@"; exit 1')):
        (tmp_path / command).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / command).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1"}
    env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_ON_NODE": "2"}
    words = ["bash", str(REPOSITORY / "slurm/sweep.sbatch"), str(folder)]
    job = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = [job.stdout.readline() for _ in range(2)]
    assert said[1] == f"-u -m cola_ds sweep {folder}/sweep.yaml --only 3 --launcher ./mine {{run}} begun\n"
    job.send_signal(getattr(signal, f"SIG{name}"))
    rest = job.communicate(timeout=60)[0].splitlines()
    assert job.returncode == 75
    assert rest[0] == "stopped"
    assert rest[2] == "requeue 7_3"


def test_a_folder_of_any_letters(tmp_path):
    """In the command that starts a run, as cola-ds takes its words apart, also in the C locale."""
    folder = tmp_path / "it's here ü"
    folder.mkdir()
    python = f'#!/bin/bash\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\nprintf "%s\\n" "${{@: -1}}"\n'
    (tmp_path / "python").write_text(python, encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    (folder / "job.env").write_text(
        f"python={tmp_path}/python processes_per_node=2 max_restarts=5 offline= setup=() launcher=\n", encoding="utf-8"
    )
    env = {**os.environ, "LC_ALL": "C", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "2"}
    env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(
        ["bash", str(REPOSITORY / "slurm/sweep.sbatch"), str(folder)], env=env, capture_output=True, text=True
    )
    command = done.stdout.splitlines()[1]
    assert command_words(command) == ["bash", f"{folder}/sweep.sbatch", str(folder), "step", "{run}"]


def test_what_the_cluster_refuses(place):
    """The second array, say: the script says so, and fails."""
    script = '#!/bin/bash\ncase "$*" in *--dependency*) echo "too many jobs" >&2; exit 1;; *) echo 7;; esac\n'
    (place / "sbatch").write_text(script, encoding="utf-8")
    (place / "sbatch").chmod(0o755)
    env = {**clean_environment(), "PATH": f"{place}:{os.environ['PATH']}"}
    words = ["./slurm/sweep.sh", "--time", "1:00:00", str(place / "sweep.yaml")]
    done = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "search: job 7" in done.stdout
    assert done.stderr.splitlines()[-2:] == [
        "too many jobs",
        "sweep.sh: the rest of the seeds could not be submitted, the search has been",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: slurm/sweep.sh [options] SWEEP.yaml"),
        (["--at-once", "0", "SWEEP"], "--nodes, --gpus, --tasks and --at-once take a number from 1; it is 0"),
        (["--gpus", "2", "--tasks", "2", "SWEEP"], "contradict each other"),
        (["--node", "2", "SWEEP"], "unknown option --node; --help lists them all"),
        (["--signal", "KILL@3", "SWEEP"], "--signal KILL@3 must look like USR1@300"),
        (["SWEEP", "optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
    ],
)
def test_wrong_calls_of_the_script(place, words, message):
    words = [str(place / "sweep.yaml") if word == "SWEEP" else word for word in words]
    done = subprocess.run(
        ["./slurm/sweep.sh", "--dry-run", *words],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stdout + done.stderr
    assert message in done.stderr


def test_the_dry_run_of_the_script(place):
    before = sorted(place.rglob("*"))
    words = ["--dry-run", "--gpus", "4", "--at-once", "3", "--time", "1:00:00", str(place / "sweep.yaml")]
    done = subprocess.run(
        ["./slurm/sweep.sh", *words], cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    search, seeds = done.stderr.splitlines()
    assert "--ntasks-per-node=4 --signal=USR1@300" in search
    assert "--time=1:00:00 --gpus-per-node=4 --array=0\\,1\\,2" in search
    assert "11%3 " in search
    words[1:1] = ["--launcher", "./launch/local.sh {run}"]
    done = subprocess.run(
        ["./slurm/sweep.sh", *words], cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True
    )
    assert done.stderr.count(" --signal=B:USR1@300 ") == 2
    assert "--array=12\\,13%3 --dependency=afterany:JOB " in seeds
    assert sorted(place.rglob("*")) == before


def test_indices_that_the_cluster_does_not_take(place):
    """By the name of the first run that it would not; those that have finished do not count."""
    (place / "scontrol").write_text("#!/bin/sh\necho 'MaxArraySize            = 13'\n", encoding="utf-8")
    (place / "scontrol").chmod(0o755)
    env = {**clean_environment(), "PATH": f"{place}:{os.environ['PATH']}"}
    words = ["./slurm/sweep.sh", "--dry-run", str(place / "sweep.yaml")]
    done = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "run 13, easy/lora/?/seed=2, is beyond this cluster's arrays, whose MaxArraySize is 13" in done.stderr
    write_sweep(place, seeds=[0, 1])
    assert subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True).returncode == 0


def test_the_commands_of_the_page(place):
    page = (REPOSITORY / "slurm/README.md").read_text(encoding="utf-8")
    calls = [line.split() for line in page.splitlines() if line.startswith("./slurm/sweep.sh ")]
    assert len(calls) == 2
    for words in calls:
        assert words[-1] == "my_sweep.yaml"
        words = [words[0], "--dry-run", *words[1:-1], str(place / "sweep.yaml")]
        done = subprocess.run(words, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "--ntasks-per-node=1 " in done.stderr
