"""`cola-ds sweep` with runs that take no time: a program that leaves what `cola-ds train` leaves, with the scores it is told."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from cola_ds.cli import main
from cola_ds.config import load_config
from cola_ds.report import report
from cola_ds.sweep_plan import PAPER_GRIDS, load_plan
from tests.launching import Cluster, clean_environment
from tests.toys import REPOSITORY, rows, run_config, save_run

STAND_IN = """
import json, os, pathlib, signal, sys, time, yaml
here = pathlib.Path(__file__).parent
base, *words = sys.argv[1:]
config = yaml.safe_load(open(base))
for word in words:
    key, _, text = word.partition("=")
    *sections, last = key.split(".")
    target = config
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = yaml.safe_load(text) if not text[:1].isdigit() else json.loads(text)
folder = pathlib.Path(config["run"]["dir"])
name = str(folder.relative_to(here / "runs"))
with open(here / "starts", "a") as out:
    print(name, {k: v for k, v in os.environ.items() if k in ("RANK", "MASTER_PORT")}, file=out)
told = json.loads((here / "told.json").read_text())
for part, status in told["fail"].items():
    if part in name:
        print("loading", "cola-ds: " + told.get("said", "no such layer"), "more", sep="\\n", flush=True)
        if status < 0:
            os.kill(os.getpid(), -status)
        sys.exit(status)
if told.get("wait") and told["wait"] in name and not folder.exists():
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text("{}")
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(1))  # as torchrun does
    time.sleep(60)
folder.mkdir(parents=True, exist_ok=True)
text = yaml.safe_dump(config)
if (folder / "result.json").exists() and (folder / "run.yaml").read_text() != text:
    print("cola-ds: the config has changed", file=sys.stderr)
    sys.exit(2)
(folder / "run.yaml").write_text(text)
(folder / "environment.json").write_text("{}")
dev, test = next((scores for part, scores in told["scores"].items() if part in name), [0.5, 0.5])
seed = config["run"]["seed"]
scores = {"metric": "accuracy", "dev": dev, "test": test + seed / 100, "best_step": 1}
print(" 50%|##   | 1/2", end="")
result = {"method": config["method"], "task": name.split("/")[0], "seed": seed, "scores": scores, "links": 1, "steps": 2,
          "training_flops": 1e9, "wall_time_s": 1.0, "peak_memory_bytes": 1}
(folder / "result.json").write_text(json.dumps(result))
"""
# On dev the second learning rate is the best; on test it is the worst.
SCORES = {
    "lora/lr=0.001": [0.6, 0.9],
    "lora/lr=0.0005": [0.7, 0.5],
    "lora/lr=0.0001": [0.7, 0.8],
    "zero-shot": [0.55, 0.5],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base, the stand-in for `cola-ds train`, and a function that writes a sweep."""
    base = run_config(tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "unused", chain={"length": 1})
    base["data"]["eval"] = "dev.jsonl"
    base["method"] = "lora"
    save_run(tmp_path / "base.yaml", base)
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    tell(tmp_path, scores=SCORES)
    monkeypatch.setattr("cola_ds.sweep.STOPPING", ())  # this process keeps its own handlers
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # what the command sets is undone
    write_sweep(tmp_path)
    return tmp_path


def tell(place, **told):
    (place / "told.json").write_text(json.dumps({"fail": {}, **told}), encoding="utf-8")


def write_sweep(place, **keys):
    sweep = {
        "base": str(place / "base.yaml"),
        "dir": str(place / "runs"),
        "tasks": {"easy": {"data.train": "easy.jsonl"}, "hard": {"data.train": "hard.jsonl", "optim.lr": 1e-3}},
        "methods": {"zero-shot": {}, "lora": None},
        "grid": {"optim.lr": [1e-3, 5e-4, 1e-4]},
        "seeds": [0, 1, 2],
        "launcher": f"{sys.executable} {place / 'stand_in.py'} {{run}}",
        **keys,
    }
    return save_run(place / "sweep.yaml", {key: value for key, value in sweep.items() if value is not None})


def sweep(place, *words):
    """What the command's exit status is."""
    try:
        return main(["sweep", str(place / "sweep.yaml"), *words])
    except SystemExit as error:
        return error.code


def starts(place):
    """The runs that were started since the last look, in order."""
    path = place / "starts"
    names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def table(place):
    return report([str(place / "runs")], None, None, None, None)


SEARCH = [
    "easy/zero-shot/seed=0", "easy/zero-shot/seed=1", "easy/zero-shot/seed=2",
    "easy/lora/lr=0.001/seed=0", "easy/lora/lr=0.0005/seed=0", "easy/lora/lr=0.0001/seed=0",
    "hard/zero-shot/seed=0", "hard/zero-shot/seed=1", "hard/zero-shot/seed=2",
    "hard/lora/seed=0", "hard/lora/seed=1", "hard/lora/seed=2",
]  # fmt: skip
CHOSEN = ["easy/lora/lr=0.0005/seed=1", "easy/lora/lr=0.0005/seed=2"]


def test_the_grid_is_chosen_on_dev_and_the_rest_of_the_seeds_run_there(place, capfd):
    """The first of two equal ones; what is not trained, and a task that says its own learning rate, are not searched."""
    assert sweep(place) == 0
    assert starts(place) == SEARCH + CHOSEN
    printed = capfd.readouterr()
    assert "[5 of 14] easy/lora/lr=0.0005/seed=0\neasy/lora/lr=0.0005/seed=0: dev 70.00, test 50.00, 1 s" in printed.out
    assert "14 of 14 runs have finished, 0 of them before" in printed.out
    log = (place / "runs/easy/lora/lr=0.0005/seed=1.log").read_text(encoding="utf-8").splitlines()
    assert log[0].endswith(f"run.seed=1 run.dir={place / 'runs/easy/lora/lr=0.0005/seed=1'}")
    assert log[1:] == [" 50%|##   | 1/2", "cola-ds sweep: exit status 0"]
    config = yaml.safe_load((place / "runs/easy/lora/lr=0.0005/seed=1/run.yaml").read_text(encoding="utf-8"))
    assert (config["method"], config["optim"]["lr"], config["run"]["seed"]) == ("lora", 5e-4, 1)
    assert config["data"]["train"] == "easy.jsonl"

    assert sweep(place) == 0  # again
    assert starts(place) == []
    assert "14 of 14 runs have finished, 14 of them before" in capfd.readouterr().out
    assert sweep(place, "--list") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"# folder {place / 'runs'}"
    assert lines[5].split() == ["4", "search", "finished", "easy/lora/lr=0.0005/seed=0"]
    assert lines[13].split() == ["12", "seeds", "finished", "easy/lora/lr=0.0005/seed=1"]


def test_runs_find_their_own_launcher(place):
    """Not the variables that this process has set for itself, which would make every run use one port."""
    write_sweep(place, tasks={"easy": {"data.train": "x"}}, methods={"zero-shot": {}}, seeds=[0])
    assert sweep(place) == 0
    assert (place / "starts").read_text(encoding="utf-8") == "easy/zero-shot/seed=0 {}\n"


def test_search_seeds(place):
    """The mean over two search seeds decides; with all of them, nothing is left to run."""
    tell(place, scores={"lr=0.001/seed=0": [0.9, 0], "lr=0.001/seed=1": [0.1, 0], "lr=0.0005": [0.6, 0], "": [0.5, 0]})
    write_sweep(place, tasks={"easy": {"data.train": "x"}}, methods={"lora": {}}, search_seeds=[0, 1])
    assert sweep(place) == 0
    assert starts(place)[6:] == ["easy/lora/lr=0.0005/seed=2"]
    write_sweep(place, tasks={"easy": {"data.train": "x"}}, methods={"lora": {}}, search_seeds="all")
    assert sweep(place) == 0
    assert len(starts(place)) == 2  # of the nine
    assert all(run.stage == "search" for run in load_plan(str(place / "sweep.yaml"), []).runs)


def test_a_failed_run_is_named_and_the_others_go_on(place, capfd):
    """Nothing is chosen before the search is complete; the second call runs what failed, and what waited for it."""
    tell(place, scores=SCORES, fail={"lr=0.0001": 2, "hard/lora/seed=1": -9})
    assert sweep(place) == 1
    assert starts(place) == SEARCH
    said = capfd.readouterr().err.splitlines()
    failed = str(place / "runs/easy/lora/lr=0.0001/seed=0")
    assert said[0] == f"cola-ds: easy/lora/lr=0.0001/seed=0: status 2: no such layer; its log is {failed}.log"
    assert said[2:] == [
        f"cola-ds: failed: {failed}: status 2: no such layer",
        f"cola-ds: failed: {place / 'runs/hard/lora/seed=1'}: status 137: no such layer",
        "cola-ds: not run: easy/lora/?/seed=1: 1 of 3 runs of its search have not finished",
        "cola-ds: not run: easy/lora/?/seed=2: 1 of 3 runs of its search have not finished",
    ]
    text = table(place)
    assert f"Failed: {failed}: status 2: no such layer" in text
    assert "Nothing chosen: easy / lora: 1 of 3 runs of its search have not finished." in text
    assert "| hard | accuracy | 51.00 ±1.00 (3) | 51.00 ±1.41 (2 of 3 seeds) |" in text

    assert sweep(place, "--list") == 0
    states = {line.split()[3]: line.split()[2] for line in capfd.readouterr().out.splitlines()[1:]}
    assert states["easy/lora/lr=0.0001/seed=0"] == "failed"
    assert states["easy/lora/?/seed=1"] == "waits"
    tell(place, scores=SCORES)
    assert sweep(place) == 0
    assert starts(place) == ["easy/lora/lr=0.0001/seed=0", "hard/lora/seed=1", *CHOSEN]
    assert "Failed" not in table(place)


def test_a_point_that_diverges_is_not_chosen(place, capfd):
    """It has failed, but the choice does not wait for it."""
    tell(place, scores=SCORES, fail={"lr=0.0005": 3}, said="training failed: no gradient was finite; lower optim.lr")
    assert sweep(place) == 1
    assert starts(place)[12:] == ["easy/lora/lr=0.0001/seed=1", "easy/lora/lr=0.0001/seed=2"]
    text = table(place)
    assert "Chosen on dev: easy / lora: lr=0.0001 (dev 70.00)" in text
    assert "lr=0.0005/seed=0: status 3: training failed: no gradient was finite" in text


def test_a_changed_sweep_runs_what_is_new(place, capfd):
    assert sweep(place) == 0
    starts(place)
    tell(place, scores={"lr=0.002": [0.8, 0.1], **SCORES})
    write_sweep(place, methods={"lora": {}}, grid={"optim.lr": [1e-3, 5e-4, 1e-4, 2e-3]})
    assert sweep(place) == 0
    assert starts(place) == [f"easy/lora/lr=0.002/seed={seed}" for seed in range(3)]
    text = table(place)
    assert "| easy | accuracy | 11.00 ±1.00 (3) |" in text  # the new point, and no zero-shot
    base = yaml.safe_load((place / "base.yaml").read_text(encoding="utf-8"))
    base["optim"]["max_steps"] = 7
    save_run(place / "base.yaml", base)
    assert sweep(place, "--list") == 0
    assert " changed " in capfd.readouterr().out
    assert sweep(place) == 1  # each is refused by the run itself, and keeps what it has
    assert "hard/lora/seed=0: status 2: the config has changed" in capfd.readouterr().err
    base["optim"]["max_steps"] = 6
    save_run(place / "base.yaml", base)
    assert sweep(place) == 0


def test_only_one_run(place, capfd):
    assert sweep(place, "--only", "12") == 2
    assert (
        "easy/lora/?/seed=1 waits for the choice of a grid point: 3 of 3 runs of its search" in capfd.readouterr().err
    )
    tell(place, scores=SCORES, fail={"easy/zero-shot/seed=0": 3})
    assert [sweep(place, "--only", str(n)) for n in (0, 3, 4, 5, 12)] == [3, 0, 0, 0, 0]
    assert starts(place) == [SEARCH[n] for n in (0, 3, 4, 5)] + CHOSEN[:1]
    assert sweep(place, "--only", "3") == 0
    assert starts(place) == []
    assert sweep(place, "--only", "14") == 2
    assert "--only 14: the sweep's runs are 0 to 13" in capfd.readouterr().err


def test_a_signal_stops_the_sweep_and_the_same_call_goes_on(place):
    """With the table that a sweep has that nothing happened to."""
    assert sweep(place) == 0
    whole = table(place)
    (place / "runs").rename(place / "whole")
    tell(place, scores=SCORES, wait="lr=0.0005/seed=0")
    words = [sys.executable, "-m", "cola_ds", "sweep", str(place / "sweep.yaml")]
    child = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    waits = place / "runs/easy/lora/lr=0.0005/seed=0/environment.json"
    deadline = time.monotonic() + 30
    while not waits.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.3)  # the stand-in listens
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=30)[1]
    assert child.returncode == 75
    assert said == "cola-ds: stopped at easy/lora/lr=0.0005/seed=0; the same command goes on from there\n"
    assert "Not finished, 1 runs: " + str(waits.parent) in table(place)
    starts(place)
    assert sweep(place) == 0
    assert starts(place) == SEARCH[4:] + CHOSEN
    assert table(place) == whole


def test_a_run_that_is_stopped_stops_the_sweep(place, capfd):
    """As when a signal reaches the run alone."""
    tell(place, scores=SCORES, fail={"lora/lr=0.001": 75})
    assert sweep(place) == 75
    assert starts(place) == SEARCH[:4]
    assert "stopped at easy/lora/lr=0.001/seed=0; the same command goes on" in capfd.readouterr().err


def test_frozen(place, capfd):
    """What a job runs is what was submitted: the overrides, the base and the sweep of then."""
    frozen = place / "frozen"
    assert sweep(place, "optim.max_steps=5", "--freeze", str(frozen)) == 0
    capfd.readouterr()
    (place / "base.yaml").write_text("model: {}", encoding="utf-8")
    os.rename(frozen / "sweep.yaml", place / "sweep.yaml")
    assert sweep(place, "--only", "3") == 0
    config = yaml.safe_load((place / "runs/easy/lora/lr=0.001/seed=0/run.yaml").read_text(encoding="utf-8"))
    assert config["optim"]["max_steps"] == 5
    assert config["deepspeed"] == str(frozen / "deepspeed.json")
    (place / "engine.json").write_bytes((frozen / "deepspeed.json").read_bytes())
    base = yaml.safe_load((frozen / "base.yaml").read_text(encoding="utf-8"))
    save_run(frozen / "base.yaml", {**base, "deepspeed": str(place / "engine.json")})
    starts(place)
    assert sweep(place, "--only", "3") == 0  # frozen elsewhere, and the same
    assert starts(place) == []


def test_the_papers_grids_and_names(place):
    methods = {
        "full": {"optim.lr": 1e-5},
        "sgd": {"optim.name": "sgd"},
        "cola (8, 4)": {"method": "cola", "chain.length": 2, "lora.rank": [8, 4]},
    }
    grid = {"optim.lr": "paper", "optim.epochs": [3, 5], "optim.schedule": ["linear"]}
    write_sweep(place, tasks={"a": {"data.train": "x"}}, methods=methods, grid=grid, seeds=[4])
    full, sgd, cola = load_plan(str(place / "sweep.yaml"), ["lora.alpha=8"]).series
    assert list(full.points) == ["epochs=3,schedule=linear", "epochs=5,schedule=linear"]
    assert [config.optim.lr for config in sgd.configs.values()] == [lr for lr in PAPER_GRIDS["sgd"] for _ in range(2)]
    assert next(iter(sgd.points)) == "lr=0.002,epochs=3,schedule=linear"
    point = "lr=5e-05,epochs=5,schedule=linear"
    assert cola.group.paths[point, 4] == place / f"runs/a/cola-8-4/{point}/seed=4"
    assert cola.configs[point].lora_ranks == [8, 4]
    assert (cola.configs[point].optim.lr, cola.configs[point].lora.alpha) == (5e-5, 8)
    assert full.configs["epochs=3,schedule=linear"].method == "full"


def test_tasks_by_name(place, monkeypatch):
    """In a list, a value of data.task each; otherwise the name is, unless the task says what it is."""

    def without_task(path, words):
        return load_config(path, [word for word in words if not word.startswith("data.task=")])

    monkeypatch.setattr("cola_ds.sweep_plan.load_config", without_task)
    write_sweep(place, tasks=["sst2", "mine/odd.yaml"], methods={"lora": {}})
    first, second = load_plan(str(place / "sweep.yaml"), []).series
    assert first.words == ["data.task=sst2", "method=lora"]
    assert second.words == ["data.task=mine/odd.yaml", "method=lora"]
    assert second.group.paths["lr=0.001", 0] == place / "runs/odd/lora/lr=0.001/seed=0"
    tasks = {"cb": None, "few": {"data.task": "cb", "data.max_length": 9}, "own": {"data.train": "x"}}
    write_sweep(place, tasks=tasks, methods={"full": {}, "other": {"method": "lora"}})
    words = [series.words for series in load_plan(str(place / "sweep.yaml"), []).series]
    assert words[:2] == [["data.task=cb", "method=full"], ["data.task=cb", "method=lora"]]
    assert words[2] == ["data.task=cb", "data.max_length=9", "method=full"]
    assert words[4] == ["data.train=x", "method=full"]


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        ({"seed": [1]}, [], "unknown key seed; did you mean seeds?"),
        ({"seeds": None}, [], "missing key seeds"),
        ({"seeds": ["0"]}, [], "seeds must be a list of different whole numbers from 0; it is ['0']"),
        ({"seeds": [1, 1]}, [], "seeds must be a list of different whole numbers from 0; it is [1, 1]"),
        ({"search_seeds": "most"}, [], "search_seeds must be a list of different whole numbers from 0; it is 'most'"),
        ({"grid": {"optim.lr": []}}, [], "grid.optim.lr must be a list of different values, or paper; it is []"),
        (
            {"grid": {"optim.epochs": "paper"}},
            [],
            "paper stands for the paper's values of optim.lr, and of nothing else",
        ),
        ({"grid": {"optim.lr": "paper", "optim.name": ["sgd"]}}, [], "make each optimizer a method"),
        ({"grid": {"lora.rank": [[8], "8"]}}, [], "two points of the grid have the same name: rank=8"),
        ({"grid": {"run.seed": [1, 2]}}, [], "run.seed is set by the sweep: say seeds instead"),
        (
            {"methods": {"lora": {"lora.rnk": 4}}},
            [],
            "easy / lora: BASE: unknown key lora.rnk; did you mean lora.rank?",
        ),
        ({"methods": {"a": {"optim.lr": -1}}}, [], "easy / a: BASE: optim.lr must be greater than 0; it is -1"),
        ({"tasks": ["x/cb.yaml", "cb"]}, [], "two of x/cb.yaml, cb have the same folder; name them otherwise"),
        ({"methods": {"a b": {}, "a-b": {}}}, [], "two of a b, a-b have the same folder"),
        ({"tasks": 3}, [], "tasks must be a list of tasks, or names with what differs for each; it is 3"),
        ({"base": "none.yaml"}, [], "cannot read the base's YAML none.yaml: No such file"),
        ({}, ["optim.lr=1"], "override optim.lr: the sweep's tasks, methods or grid set it; change it in"),
        ({}, ["run.dir=x"], "run.dir is set by the sweep: say dir instead"),
        ({}, ["optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
        (
            {"methods": {"lora": {}}},
            ["data.eval=null"],
            "easy / lora: nothing is held out by which the grid's best is chosen",
        ),
        ({"launcher": "./no-such {run}"}, [], "./no-such: No such file or directory"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(place, capfd, keys, words, message):
    write_sweep(place, **keys)
    assert sweep(place, *words) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert message.replace("BASE", str(place / "base.yaml")) in said[0]
    assert starts(place) == []


def test_runs_without_a_dev_score_cannot_be_chosen_from(place, capfd):
    tell(place, scores={"": [None, 0.5]})
    assert sweep(place) == 2
    assert (
        "lr=0.001/seed=0: it has no score on held-out data, which a grid's best is chosen by" in capfd.readouterr().err
    )


# -- on Slurm ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(cluster, *words):
    """What slurm/sweep.sh says on the head node, and the numbers of the jobs by their stage."""
    command = [*cluster.head, "./slurm/sweep.sh", "--tasks", "1", *map(str, words)]
    env = {**clean_environment(), **cluster.own}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, dict(re.findall(r"^(search|seeds): job (\d+)$", done.stdout, re.MULTILINE))


def wait_until_over(cluster, job, timeout_s=90):
    """The states of the tasks of an array, by their indices, once all have ended."""
    deadline = time.monotonic() + timeout_s
    while True:
        text = cluster.do("exec", "scontrol", "show", "job", job)
        found = dict(re.findall(r"ArrayTaskId=(\S+).*?JobState=(\S+)", text, re.DOTALL))
        if found and not {"PENDING", "RUNNING", "COMPLETING"} & set(found.values()):
            return found
        assert time.monotonic() < deadline, text
        time.sleep(0.3)


def test_a_job_array_of_which_one_fails(cluster, place):
    """The others finish, the table says which failed and why; submitted again, only what is missing runs."""
    keys = {"launcher": None, "tasks": {"easy": {"data.train": "x"}}, "seeds": [0, 1]}
    tell(place, scores=SCORES, fail={"lora/seed=0": 3})
    write_sweep(place, grid={}, **keys)
    words = ["--at-once", "2", "--launcher", f"{sys.executable} {place / 'stand_in.py'} {{run}}", place / "sweep.yaml"]
    _, jobs = submit(cluster, *words)
    write_sweep(place, methods={"no-longer": {}})  # nothing to a job that was submitted before
    states = wait_until_over(cluster, jobs["search"])
    assert states == {"0": "COMPLETED", "1": "COMPLETED", "2": "FAILED", "3": "COMPLETED"}
    assert sorted(starts(place)) == [f"easy/{name}/seed={seed}" for name in ("lora", "zero-shot") for seed in (0, 1)]
    text = table(place)
    assert "| easy | accuracy | 50.50 ±0.71 (2) | 51.00 (1 of 2 seeds) |" in text
    assert f"Failed: {place / 'runs/easy/lora/seed=0'}: status 3: no such layer" in text
    (log,) = place.glob(f"runs/slurm/*/job-{jobs['search']}_2.log")
    assert "ends with status 3" in log.read_text(encoding="utf-8")

    tell(place, scores=SCORES)
    write_sweep(place, grid={}, **keys)
    assert wait_until_over(cluster, submit(cluster, *words)[1]["search"]) == {"2": "COMPLETED"}
    assert starts(place) == ["easy/lora/seed=0"]
    assert "Failed" not in table(place)

    # With a grid, the rest of the seeds comes after the search.
    write_sweep(place, grid={"optim.lr": [1e-3, 5e-4]}, **keys)
    assert wait_until_over(cluster, submit(cluster, *words)[1]["seeds"]) == {"4": "COMPLETED"}
    assert starts(place)[2:] == ["easy/lora/lr=0.0005/seed=1"]
    assert "Chosen on dev: easy / lora: lr=0.0005 (dev 70.00)" in table(place)
    assert "all of its runs have finished" in submit(cluster, *words)[0]


def test_a_run_of_an_array_comes_back_after_its_signal(cluster, toy, tmp_path):
    """As before a time limit: stopped with a checkpoint, queued again, and gone on to the end."""
    model, train, dev = toy
    base = run_config(
        model,
        train,
        "unused",
        chain={"length": 1},
        optim={"max_steps": 150},
        data={"eval": str(dev)},
        eval={"every": "end"},
    )
    save_run(tmp_path / "base.yaml", {**base, "method": "lora"})
    write_sweep(
        tmp_path, launcher=None, tasks={"sums": {"data.train": str(train)}}, methods={"lora": {}}, seeds=[0], grid={}
    )
    _, jobs = submit(cluster, "--time", "10", tmp_path / "sweep.yaml")
    run = tmp_path / "runs/sums/lora/seed=0"
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, (run.parent / "seed=0.log").read_text(encoding="utf-8")
        time.sleep(0.1)
    cluster.do("exec", "scancel", "--signal=USR1", jobs["search"])
    assert wait_until_over(cluster, jobs["search"]) == {"0": "COMPLETED"}
    assert [row["event"] for row in rows(run / "events.jsonl") if row["event"] != "checkpoint"] == [
        "started",
        "stopped",
        "resumed",
        "finished",
    ]
    assert "| 150 |" in table(tmp_path)

    base["optim"]["max_steps"] = 151  # another run: the one that is there refuses to be it
    save_run(tmp_path / "base.yaml", {**base, "method": "lora"})
    words = [sys.executable, "-m", "cola_ds", "sweep", str(tmp_path / "sweep.yaml")]
    done = subprocess.run(words, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "seed=0: status 2: " in done.stderr
    assert "optim.max_steps 150 -> 151" in done.stderr
    assert (run / "result.json").is_file()


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
    assert "--array=12\\,13%3 --dependency=afterany:JOB " in seeds
    assert sorted(place.rglob("*")) == before
