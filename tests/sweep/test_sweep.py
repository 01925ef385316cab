"""`cola-ds sweep` with runs that take no time: a program that leaves what `cola-ds train` leaves, with the scores it is told."""

import datetime
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import yaml

from cola_ds.cli import main
from cola_ds.report.report import report
from cola_ds.sweep.plan import PAPER_GRIDS, load_plan
from tests.support.sweeps import SCORES, save_base, tell, write_sweep
from tests.support.toys import REPOSITORY, save_run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a base and a sweep, whose runs the stand-in makes."""
    save_base(tmp_path)
    tell(tmp_path, scores=SCORES)
    monkeypatch.setattr("cola_ds.sweep.runner.STOPPING", ())  # this process keeps its own handlers
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # what the command sets is undone
    write_sweep(tmp_path)
    return tmp_path


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


FILES = [
    "engine.json",
    "mine.yaml",
    "model/config.json",
    "model/model.safetensors",
    "data/mine/train.jsonl",
    "data/x.jsonl",
]


@pytest.mark.parametrize("name", FILES)
def test_files_that_have_changed_are_looked_at_by_the_run(place, capfd, name):
    """Under the same name they may hold anything: whether that matters the run knows, which is asked once."""
    for file in FILES:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text("{}", encoding="utf-8")
    base = yaml.safe_load((place / "base.yaml").read_text(encoding="utf-8"))
    base["data"] = {"task": str(place / "mine.yaml"), "dir": str(place / "data")}
    save_run(place / "base.yaml", {**base, "deepspeed": str(place / "engine.json")})
    write_sweep(place, tasks={"mine": {"data.task": str(place / "mine.yaml")}}, methods={"zero-shot": {}}, seeds=[0, 1])
    runs = [f"mine/zero-shot/seed={seed}" for seed in (0, 1)]
    assert sweep(place) == 0
    assert starts(place) == runs
    assert sweep(place) == 0
    assert starts(place) == []
    time.sleep(0.05)  # a file's time is that of the kernel's last tick
    (place / name).write_text("{} ", encoding="utf-8")
    capfd.readouterr()
    assert sweep(place, "--list") == 0
    assert [line.split()[2] for line in capfd.readouterr().out.splitlines()[1:]] == ["changed"] * 2
    tell(place, scores=SCORES, fail={"seed=1": 75})
    assert sweep(place) == 75
    assert starts(place) == runs
    tell(place, scores=SCORES)
    assert sweep(place) == 0
    assert starts(place) == runs[1:]  # seed=0 has said that it is the same


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
    assert all(run.purpose == "search" for run in load_plan(str(place / "sweep.yaml"), []).runs)


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
        "cola-ds: not run: easy/lora/?/seed=1: 1 of 3 runs of its search has not finished",
        "cola-ds: not run: easy/lora/?/seed=2: 1 of 3 runs of its search has not finished",
    ]
    text = table(place)
    assert f"Failed: {failed}: status 2: no such layer" in text
    assert "Nothing chosen: easy / lora: 1 of 3 runs of its search has not finished; 2 seeds wait for it." in text
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_sweep_and_the_same_call_goes_on(place, number):
    """With the table that a sweep has that nothing happened to. SIGHUP is what a closed terminal sends."""
    assert sweep(place) == 0
    whole = table(place)
    (place / "runs").rename(place / "whole")
    tell(place, scores=SCORES, wait="lr=0.0005/seed=0")
    words = [sys.executable, "-m", "cola_ds", "sweep", str(place / "sweep.yaml")]
    own = partial(
        signal.signal, signal.SIGHUP, signal.SIG_DFL
    )  # these tests may run under nohup, which a sweep would honour
    child = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=own)
    waits = place / "runs/easy/lora/lr=0.0005/seed=0/environment.json"
    deadline = time.monotonic() + 90
    while not waits.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.3)  # the stand-in listens
    child.send_signal(number)
    said = child.communicate(timeout=90)[1]
    assert child.returncode == 75
    assert said == "cola-ds: stopped at easy/lora/lr=0.0005/seed=0; the same command goes on from there\n"
    assert "Not finished, 1 run: " + str(waits.parent) in table(place)
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
    """What a job runs is what was submitted: the overrides, the base, the sweep of then, and the files that they name."""
    for name in ("mine", "other"):
        (place / f"{name}.yaml").write_text(f"prompt: {name}", encoding="utf-8")
    base = yaml.safe_load((place / "base.yaml").read_text(encoding="utf-8"))
    save_run(place / "base.yaml", {**base, "data": {"task": str(place / "other.yaml")}})
    write_sweep(
        place,
        tasks=[str(place / "mine.yaml"), "sst2"],
        methods={"lora": {}, "full": {"deepspeed": "ds_configs/zero2.json"}},
    )
    plan = load_plan(str(place / "sweep.yaml"), [])
    frozen = place / "frozen"
    assert sweep(place, "optim.max_steps=5", "--freeze", str(frozen)) == 0
    capfd.readouterr()
    before = (place / "sweep.yaml").read_text(encoding="utf-8")
    os.rename(frozen / "sweep.yaml", place / "sweep.yaml")
    (place / "base.yaml").rename(place / "away.yaml")
    (place / "mine.yaml").rename(place / "away-mine.yaml")
    assert sweep(place, "--only", "0") == 0
    assert starts(place) == ["mine/lora/lr=0.001/seed=0"]
    config = yaml.safe_load((place / "runs/mine/lora/lr=0.001/seed=0/run.yaml").read_text(encoding="utf-8"))
    assert config["optim"]["max_steps"] == 5
    copies = [config["deepspeed"], config["data"]["task"]]
    assert [os.path.relpath(path, frozen) for path in copies] == ["files/0/zero3_sharded.json", "files/2/mine.yaml"]
    (full,) = [
        s for s in load_plan(str(place / "sweep.yaml"), []).series if s.group.name == "full" and s.group.task == "mine"
    ]
    assert {config.deepspeed for config in full.configs.values()} == {str(frozen / "files/3/zero2.json")}
    assert [s.group for s in load_plan(str(place / "sweep.yaml"), []).series] == [s.group for s in plan.series]

    # As submitted again from the same files: it is the same run. Not where the task's file says something else.
    (place / "sweep.yaml").write_text(before, encoding="utf-8")
    (place / "away.yaml").rename(place / "base.yaml")
    (place / "away-mine.yaml").rename(place / "mine.yaml")
    assert sweep(place, "optim.max_steps=5", "--only", "0") == 0
    assert sweep(place, "optim.max_steps=5", "--freeze", str(place / "again")) == 0
    assert main(["sweep", str(place / "again/sweep.yaml"), "--only", "0"]) == 0
    assert starts(place) == []
    (place / "mine.yaml").write_text("prompt: another", encoding="utf-8")
    capfd.readouterr()
    assert sweep(place, "optim.max_steps=5", "--list") == 0
    assert "changed" in capfd.readouterr().out.splitlines()[1]


def test_frozen_without_a_task_of_the_base(place):
    base = yaml.safe_load((place / "base.yaml").read_text(encoding="utf-8"))
    save_run(place / "base.yaml", {**base, "data": {"task": "cb"}})
    own = {"data.task": None, "data.train": "x.jsonl", "data.eval": "y.jsonl"}
    write_sweep(place, tasks={"own": own, "cb": {}}, methods={"lora": {}})
    assert sweep(place, "--freeze", str(place / "frozen")) == 0
    plans = [load_plan(str(path), []) for path in (place / "sweep.yaml", place / "frozen/sweep.yaml")]
    tasks = [[series.configs["lr=0.001"].data.task for series in plan.series] for plan in plans]
    assert tasks == [[None, "cb"]] * 2


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


def test_a_method_searches_a_grid_of_its_own(place):
    methods = {
        "full": {"grid": {"optim.lr": [1e-6, 5e-6]}},
        "lora": {},
        "sgd": {"optim.name": "sgd", "grid": {"lora.rank": [2, 4]}},
    }
    write_sweep(place, methods=methods, grid={"optim.lr": "paper"})
    full, lora, sgd, *_ = load_plan(str(place / "sweep.yaml"), []).series
    assert [config.optim.lr for config in full.configs.values()] == [1e-6, 5e-6]
    assert [config.optim.lr for config in lora.configs.values()] == PAPER_GRIDS["adamw"]
    assert len(sgd.points) == 2 * len(PAPER_GRIDS["sgd"])
    assert sweep(place, "--freeze", str(place / "frozen")) == 0
    assert [list(each.points) for each in load_plan(str(place / "frozen/sweep.yaml"), []).series[:3]] == [
        list(each.points) for each in (full, lora, sgd)
    ]


def test_tasks_by_name(place):
    """In a list, a value of data.task each; otherwise the name is, unless the task says what it is."""
    base = yaml.safe_load((place / "base.yaml").read_text(encoding="utf-8"))
    save_run(place / "base.yaml", {**base, "data": {}})
    write_sweep(place, tasks=["sst2", "mine/odd.yaml"], methods={"lora": {}})
    first, second = load_plan(str(place / "sweep.yaml"), []).series
    assert first.words == ["data.task=sst2", "method=lora"]
    assert second.words == ["data.task=mine/odd.yaml", "method=lora"]
    assert second.group.paths["lr=0.001", 0] == place / "runs/odd/lora/lr=0.001/seed=0"
    tasks = {"cb": None, "few": {"data.task": "cb", "data.max_length": 9}, "own": {"data.train": "x", "data.eval": "x"}}
    write_sweep(place, tasks=tasks, methods={"full": {}, "other": {"method": "lora"}})
    words = [series.words for series in load_plan(str(place / "sweep.yaml"), []).series]
    assert words[:2] == [["data.task=cb", "method=full"], ["data.task=cb", "method=lora"]]
    assert words[2] == ["data.task=cb", "data.max_length=9", "method=full"]
    assert words[4] == ["data.train=x", "data.eval=x", "method=full"]


def test_a_share_of_the_rows_may_choose_the_grid_s_best(place):
    plan = load_plan(str(place / "sweep.yaml"), ["data.eval=null", "data.eval_fraction=0.25"])
    assert any(len(series.points) > 1 for series in plan.series)


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
        (
            {"grid": {"optim.lr": "paper"}, "methods": {"full": {}}},
            [],
            "easy / full: grid.optim.lr paper is for LoRA and chains",
        ),
        ({"methods": {"lora": {"grid": 3}}}, [], "methods lora.grid must be keys with lists of values"),
        ({"methods": {"lora": {"grid": {1: [1, 2]}}}}, [], "methods lora.grid has a key that is no text: 1"),
        (
            {"methods": {"lora": {"grid": {"optim.lr": 3}}}},
            [],
            "methods lora.grid.optim.lr must be a list of different values",
        ),
        (
            {"methods": {"lora": {"grid": {"optim.epochs": "paper"}}}},
            [],
            "paper stands for the paper's values of optim.lr",
        ),
        ({"grid": {"lora.rank": [[8], "8"]}}, [], "two points of the grid have the same name: rank=8"),
        (
            {"grid": {"data.task": ["cb", "rte"]}},
            [],
            "grid: data.task is nothing to search: make each of its values a task",
        ),
        ({"grid": {"optim.lr": "paper"}}, ["optim.name=admw"], "optim.name must be 'adamw', 'sgd' or 'adagrad'"),
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
        ({"launcher": "./no-such {run}"}, [], "launcher ./no-such {run}: there is no command ./no-such here"),
        ({"launcher": "echo '"}, ["--list"], 'launcher is no command: no closing quotation; it is "echo \'"'),
        ({}, ["--launcher", "it's {run}"], "--launcher it's {run} is no command: no closing quotation"),
        ({"methods": {"lora": {"optim": {"lr": 1}}}}, [], "optim is a section: write its keys as optim.lr, with a dot"),
        ({"tasks": {"a": {"run": {"seed": 5}}}}, [], "run is a section: write its keys as run.dir, with a dot"),
        (
            {"grid": {"lora": [{"rank": 4}, {"rank": 8}]}},
            [],
            "lora is a section: write its keys as lora.rank, with a dot",
        ),
        ({}, ["run={seed: 5}"], "run is a section: write its keys as run.dir, with a dot"),
        ({"launcher": ""}, [], "launcher is no command: it is empty; it is ''"),
        ({"launcher": " "}, ["--list"], "launcher is no command: it is empty; it is ' '"),
        ({}, ["--launcher", ""], "--launcher  is no command: it is empty"),
        ({}, ["--launcher", "  "], "is no command: it is empty"),
        ({"launcher": "'' {run}"}, [], "there is no command  here"),
        ({"launcher": "x" * 5000}, [], "there is no command xxx"),
        ({"seeds": [2**31]}, [], "seeds must be a list of different whole numbers from 0; it is [2147483648]"),
        ({"seeds": list(range(3000))}, [], "tasks, methods, grid and seeds make more than 10,000 runs; name fewer"),
        (
            {"grid": {f"k.{n}": list(range(10)) for n in range(9)}},
            [],
            "grid has 1,000,000,000 points; a sweep takes 10,000",
        ),
        (
            {"grid": {"optim.lr": list(range(2000))}},
            [],
            "grid.optim.lr has 2,000 values, more than 1,000; it is [0, 1,",
        ),
        (
            {"tasks": {"t" * 300: {"data.train": "x"}}},
            [],
            "is too long for a folder's name: say it in at most 200 letters",
        ),
        ({"grid": {"data.prompt": ["p" * 300, "q"]}}, [], "is too long for a folder's name"),
        ({"methods": {"lora": {"chain.knots": {datetime.date(2021, 3, 4): [1]}}}}, [], "is no value of a run's config"),
        (
            {"methods": {"lora": {"optim.name": "2021-02-31"}}},
            [],
            "optim.name must be 'adamw', 'sgd' or 'adagrad'; it is '2021-",
        ),
        (
            {"tasks": [["x"] * 2000] * 20},
            [],
            "tasks must be a list of tasks, or names with what differs for each; it is [['x'",
        ),
        ({"dir": "a" * 300}, ["--list"], "has a name of 300 letters"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(place, capfd, keys, words, message):
    write_sweep(place, **keys)
    assert sweep(place, *words) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert len(said[0]) < 700
    assert message.replace("BASE", str(place / "base.yaml")) in said[0]
    assert starts(place) == []
    assert not (place / "runs").exists()


@pytest.mark.parametrize("optim", ["x", [1], {"name": ["sgd"]}])
def test_a_base_that_is_wrong(place, capfd, optim):
    base = yaml.safe_load((place / "base.yaml").read_text(encoding="utf-8"))
    save_run(place / "base.yaml", {**base, "optim": optim})
    write_sweep(place, grid={"optim.lr": "paper"})
    assert sweep(place, "--list") == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_what_cannot_change_a_result_is_no_change(place, capfd):
    assert sweep(place) == 0
    starts(place)
    assert sweep(place, "run.log_every_steps=3", "checkpoint.keep=5", "--list") == 0
    assert "changed" not in capfd.readouterr().out
    assert sweep(place, "run.log_every_steps=3", "checkpoint.keep=5") == 0
    assert starts(place) == []


def test_a_reader_who_has_enough(place):
    """Nothing is said of the pipe that is closed."""
    write_sweep(place, tasks={f"a{number}": {"data.train": "x", "optim.lr": 1e-3} for number in range(400)})
    words = f"{sys.executable} -m cola_ds sweep {place}/sweep.yaml --list | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "141"


def test_letters_of_any_alphabet(place):
    """In a folder's name, on the way to the run."""
    write_sweep(place, dir=str(place / "runs/läufe \U0001f600"), methods={"lora": {}}, grid={}, seeds=[0])
    assert sweep(place) == 0
    assert (place / "runs/läufe \U0001f600/easy/lora/seed=0/result.json").is_file()


def test_runs_without_a_dev_score_cannot_be_chosen_from(place, capfd):
    tell(place, scores={"": [None, 0.5]})
    assert sweep(place) == 2
    assert (
        "lr=0.001/seed=0: it has no score on held-out data, which a grid's best is chosen by" in capfd.readouterr().err
    )
