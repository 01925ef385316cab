"""Tables of runs, from results that are written by hand and worked out by hand."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cola_ds.cli import main
from cola_ds.config.loading import apply_override
from cola_ds.errors import UserError
from cola_ds.report.figures import _score_lines
from cola_ds.report.find import find_runs
from cola_ds.report.paper import PAPER_TABLES
from cola_ds.report.report import report
from cola_ds.sweep.groups import Group, read_groups, write_groups
from tests.support.recorded import recorded
from tests.support.toys import run_config, save_run

TRACE = "Traceback (most recent call last):\n  File 1\nTraceback (most recent call last):\n  File 2\n    x()\nE: no memory\n"
LORA = {"method": "lora", "chain": {"length": 1}, "lora": {"rank": 8, "alpha": 16}}
COLA = {"method": "cola", "chain": {"length": 2}, "lora": {"rank": 8, "alpha": 16}}


def save_result(folder, test, task="cb", dev=0.5, seed=0, flops=1e9, losses=(), **sections):
    """A finished run of a task."""
    folder.mkdir(parents=True)
    config = run_config(Path("model"), Path("train.jsonl"), folder, **sections)
    config["run"]["seed"] = seed
    if "task" in config["data"]:
        del config["data"]["train"]
    save_run(folder / "run.yaml", config)
    (folder / "environment.json").write_text("{}", encoding="utf-8")
    scores = {"metric": "f1" if task == "squad" else "accuracy", "dev": dev, "test": test, "best_step": 2}
    result = {
        "method": config["method"],
        "task": task,
        "seed": seed,
        "scores": scores,
        "links": config["chain"]["length"],
    }
    result |= {
        "steps": len(losses),
        "training_flops": flops,
        "profiled_flops": 2 * flops,
        "wall_time_s": 12.5,
        "peak_memory_bytes": 2**30,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    rows = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
    return recorded(folder)


def tables(*paths, plot=None, csv_file=None, paper=None, figures=None):
    return report([str(path) for path in paths], plot, csv_file, paper, figures)


def test_mean_deviation_and_comparison(tmp_path):
    """cb: LoRA 60 61 62 63 64, COLA 61 63 65 67 69: differences 1 to 5, t = 3 / (sqrt(2.5) / sqrt(5)), p = 0.013236."""
    for seed in range(5):
        save_result(tmp_path / f"l{seed}", (60 + seed) / 100, seed=seed, **LORA)
        save_result(tmp_path / f"c{seed}", (61 + 2 * seed) / 100, seed=seed, **COLA)
        save_result(tmp_path / f"s{seed}", 0.5, task="squad", seed=seed, **LORA)
    save_result(tmp_path / "z", 0.99, task="squad", method="zero-shot", chain={"length": 1}, data={"eval": "dev.jsonl"})
    save_result(tmp_path / "c", 0.51, task="squad", **COLA)
    text = tables(tmp_path)
    assert "| task | metric | cola-2 | lora | zero-shot |" in text
    assert "| cb | accuracy | **65.00 ±3.16 (5)** | 62.00 ±1.58 (5) | - |" in text
    # What has one seed of five is not called the best, and is compared with no test.
    assert "| squad | f1 | 51.00 (1 of 5 seeds) | 50.00 ±0.00 (5) | 99.00 (1 of 5 seeds) |" in text
    assert "| cb | cola-2 - lora | 5 | +3.00 | 0.0132 | 0.0132 | better |" in text
    assert "| squad | cola-2 - lora | 1 | +1.00 | - | - | no significant difference |" in text
    assert "Missing, 8 runs: squad/cola-2/seed=1, squad/cola-2/seed=2," in text


def test_seeds_that_both_have_are_compared(tmp_path):
    """Of LoRA 0, 1 and 2, of COLA 1 and 2: 61 - 60 and 72 - 70, t = 1.5 / (sqrt(0.5) / sqrt(2)) = 3, p = 0.2048."""
    for seed, score in enumerate((0.5, 0.6, 0.7)):
        save_result(tmp_path / f"l{seed}", score, seed=seed, **LORA)
    for seed, score in ((1, 0.61), (2, 0.72)):
        save_result(tmp_path / f"c{seed}", score, seed=seed, **COLA)
    assert "| cb | cola-2 - lora | 2 | +1.50 | 0.205 | 0.205 | no significant difference |" in tables(tmp_path)


def test_a_difference_that_is_not_significant_is_not_called_so(tmp_path):
    """Differences 1 3 2 5 0.5: t = 2.3 / (sqrt(3.2) / sqrt(5)), p = 0.0452; below 0.05 alone, but not as one of two."""
    for task, jitter in (("cb", (1, 3, 2, 5, 0.5)), ("rte", (1, 4, 2, -1, 1.5))):
        for seed, more in enumerate(jitter):
            save_result(tmp_path / f"{task}-l{seed}", 0.6, task=task, seed=seed, **LORA)
            save_result(tmp_path / f"{task}-c{seed}", 0.6 - more / 100, task=task, seed=seed, **COLA)
    assert "| cb | cola-2 - lora | 5 | -2.30 | 0.0452 | 0.0905 | no significant difference |" in tables(tmp_path)
    alone = [tmp_path / f"cb-{kind}{seed}" for kind in "lc" for seed in range(5)]
    assert "| cb | cola-2 - lora | 5 | -2.30 | 0.0452 | 0.0452 | worse |" in tables(*alone)


def test_comparisons_without_a_test_count_too(tmp_path):
    """One method equals LoRA at each seed: the other's p-value is adjusted for two comparisons all the same."""
    for seed, more in enumerate((-0.01, -0.03, -0.02, -0.05, -0.005)):
        save_result(tmp_path / f"l{seed}", 0.6, seed=seed, **LORA)
        save_result(tmp_path / f"c{seed}", 0.6 + more, seed=seed, **COLA)
        save_result(tmp_path / f"d{seed}", 0.6, seed=seed, **COLA | {"chain": {"length": 3}})
    text = tables(tmp_path)
    assert "| 5 | -2.30 | 0.0452 | 0.0905 | no significant difference |" in text
    assert "| 5 | +0.00 | - | - | no significant difference |" in text


def test_only_alike_runs_are_compared(tmp_path):
    """Not an AdaGrad chain with an AdamW LoRA, nor rank 16 with rank 8; lora is also a chain of one link."""
    for seed in range(2):
        save_result(tmp_path / f"a{seed}", 0.6 + seed / 10, seed=seed, **{**COLA, "chain": {"length": 1}})
        save_result(tmp_path / f"b{seed}", 0.6, seed=seed, **COLA, optim={"name": "adagrad"})
        save_result(tmp_path / f"c{seed}", 0.6, seed=seed, **{**COLA, "lora": {"rank": 16, "alpha": 16}})
        save_result(tmp_path / f"d{seed}", 0.6, seed=seed, **{**COLA, "lora": {"rank": [8, 4], "alpha": 16}})
    text = tables(tmp_path)
    names = ["cola-1", "cola-2 rank=8 name=adagrad", "cola-2 rank=16 name=adamw", "cola-2 rank=[8, 4] name=adamw"]
    assert f"| task | metric | {' | '.join(names)} |" in text
    compared = [line for line in text.splitlines() if " - cola-1 |" in line]
    assert compared == [
        "| cb | cola-2 rank=[8, 4] name=adamw - cola-1 | 2 | -5.00 | 0.5 | 0.5 | no significant difference |"
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"path": "model", "links": "runs/earlier"}},
        {"model": {"path": "model", "adapter": "models/adapter"}},
        {"lora": {**LORA["lora"], "bias": "lora_only"}},
        {"lora": {**LORA["lora"], "targets": ["q_proj"]}},
    ],
)
def test_a_chain_on_another_start_is_not_compared(tmp_path, other):
    """On earlier links or an adapter, or with other parameters that train: what it has more is not the chain's doing."""
    for seed in range(3):
        save_result(tmp_path / f"lora/{seed}", 0.5 + seed / 100, seed=seed, **LORA)
        save_result(tmp_path / f"cola/{seed}", 0.8 - seed / 100, seed=seed, **{**COLA, **other})
        save_result(tmp_path / f"like/{seed}", 0.8 - seed / 100, seed=seed, **COLA)
    assert "| compared |" not in tables(tmp_path / "lora", tmp_path / "cola")
    assert " | better |" in tables(tmp_path / "lora", tmp_path / "like")


def test_what_training_has_taken(tmp_path):
    """The estimate and the profiler's count, which save_result doubles: the mean over the seeds; nothing where nothing trains."""
    for seed in range(2):
        save_result(tmp_path / f"a{seed}", 0.7, seed=seed, flops=(3 + seed) * 1e12, **COLA)
    save_result(tmp_path / "b", 0.7, flops=1e12, task="squad", **LORA)
    none = {
        "method": "zero-shot",
        "chain": {"length": 1},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"eval": "dev.jsonl"},
    }
    save_result(tmp_path / "c", 0.6, flops=0, **none)
    text = tables(tmp_path)
    assert "| task | cola-2 | lora |\n| --- | --- | --- |\n| cb | 3.5; 7 | - |\n| squad | - | 1; 2 |" in text


def test_ranks_and_the_flops_that_they_save(tmp_path):
    """Over the seeds that both have: 3e9 - 2e9, and 4e9 - 2e9."""
    for seed in range(2):
        save_result(tmp_path / f"a{seed}", 0.7, seed=seed, flops=(3 + seed) * 1e9, **COLA)
        save_result(
            tmp_path / f"b{seed}", 0.72, seed=seed, flops=2e9, **{**COLA, "lora": {"rank": [8, 4], "alpha": 16}}
        )
    save_result(tmp_path / "b2", 0.72, seed=2, flops=2e9, **{**COLA, "lora": {"rank": [8, 4], "alpha": 16}})
    save_result(tmp_path / "w", 0.9, **{**COLA, "lora": {"rank": 16, "alpha": 16}})
    text = tables(tmp_path, paper="ranks")
    assert "| method | LoRA ranks | cb |" in text
    assert "| (16, 16) |" not in text
    assert "| cola-2 rank=8 | (8, 8) | 70.00 |" in text
    assert "| cola-2 rank=[8, 4] | (8, 4) | 72.00; 3.00e+09 (2) |" in text
    assert (
        "| cb | accuracy | 70.00 ±0.00 (2 of 3 seeds) [76.78] | 72.00 ±0.00 (3) [75.35; 7.20e11] | 90.00 (1 of 3 seeds) |"
        in text
    )
    (tmp_path / "a1").rename(tmp_path / "b3")
    for seed in (0, 3):  # no seed that both have
        shutil.rmtree(tmp_path / f"b{seed}")
    text = tables(tmp_path / "a0", tmp_path / "b1", paper="ranks")
    assert "| cola-2 rank=[8, 4] | (8, 4) | 72.00; - |" in text


def test_the_papers_numbers(tmp_path):
    save_result(tmp_path / "l", 0.7, **LORA)
    save_result(tmp_path / "c", 0.71, **COLA)
    save_result(tmp_path / "z", 0.5, method="zero-shot", chain={"length": 1}, data={"eval": "dev.jsonl"})
    text = tables(tmp_path, paper="opt-1.3b")
    assert "| cb | accuracy | **71.00 (1)** [76.78 ±6.38] | 70.00 (1) [75.35 ±4.84] | 50.00 (1) |" in text
    # Only what is made as the paper's: by that optimizer, on so many examples.
    for paper, cola, number in (("sgd", "70.71", "69.29"), ("adagrad", "73.21", "69.29")):
        other = {"optim": {"name": paper}}
        assert "[" not in tables(tmp_path, paper=paper)
        save_result(tmp_path / paper / "l", 0.7, **LORA, **other)
        save_result(tmp_path / paper / "c", 0.7, **COLA, **other)
        text = tables(tmp_path / paper, paper=paper)
        assert f"[{cola}]" in text
        assert f"[{number}]" in text
        assert "[" not in tables(tmp_path / paper, paper="opt-1.3b")
    for number, expected in ((100, True), (1000, False)):
        data = {"task": "cb", "num_train": number}
        folder = save_result(tmp_path / f"with-{number}", 0.7, **LORA, data=data)
        assert ("[72.76]" in tables(folder, paper="low-data")) == expected
    few = save_result(tmp_path / "few", 0.7, **LORA, data={"task": "cb", "num_train": 100})
    full = {"method": "full", "chain": {"length": 1}}
    assert "[" not in tables(few, paper="opt-1.3b")  # whose number is of 1000
    assert "[90.35]" in tables(save_result(tmp_path / "full", 0.7, **full), paper="llama-2-7b")
    few = save_result(tmp_path / "few-full", 0.7, **full, data={"task": "cb", "num_train": 100})
    assert "[" not in tables(few, paper="llama-2-7b")
    for length, expected in ((2, False), (3, True)):  # main's chains have three links
        of = save_result(tmp_path / f"main/of-{length}", 0.7, **COLA | {"chain": {"length": length}})
        assert ("[76.42]" in tables(of, paper="main")) == expected
    for name in PAPER_TABLES:
        tables(tmp_path / "main", paper=name)
    with pytest.raises(UserError, match=r"--paper 1: known are main, opt-1.3b, llama-2-7b, ranks, sgd"):
        tables(tmp_path, paper="1")


SWITCHES = [
    ("lora.targets=all-linear", "lora.targets all-linear"),
    ("lora.targets=[q_proj, k_proj]", "lora.targets q_proj, k_proj"),
    ("lora.alpha=32", "lora.alpha 32"),
    ("lora.dropout=0.05", "lora.dropout 0.05"),
    ("lora.init=pissa", "lora.init pissa"),
    ("lora.scaling=alpha/sqrt(r)", "lora.scaling alpha/sqrt(r)"),
    ("lora.train=[both, B]", "lora.train [both, B]"),
    ("optim.lr_ratio=16", "B's learning rate 16 times A's"),
    ("chain.merge_weight=0.5", "chain.merge_weight 0.5"),
    ("chain.merge_weight=[1.0, 0.5]", "chain.merge_weight [1.0, 0.5]"),
    ("chain.optimizer_at_knot={prune: 0.9}", "chain.optimizer_at_knot {prune: 0.9}"),
    ("chain.knots={plateau: {}}", "chain.knots plateau"),
]


@pytest.mark.parametrize(("override", "said"), SWITCHES)
def test_a_chain_of_other_links_stands_beside_no_number_of_the_paper(tmp_path, override, said):
    """The column is empty, and a line says why; the plain chain beside it has its number."""
    save_result(tmp_path / "plain", 0.71, **COLA)
    config = run_config(Path("model"), Path("train.jsonl"), tmp_path, **COLA)
    apply_override(config, override)
    save_result(tmp_path / "switched", 0.7, **{name: config[name] for name in ("chain", "lora", "optim")})
    text = tables(tmp_path, paper="opt-1.3b")
    assert text.count("[76.78 ±6.38]") == 1
    (line,) = (line for line in text.splitlines() if line.startswith("Without a number of the paper"))
    assert f"({said})." in line
    assert "Without a number" not in tables(tmp_path)


def test_csv_and_figures(tmp_path):
    for seed in range(2):
        for length in (1, 2, 3):
            options = {
                "method": "cola",
                "chain": {"length": length},
                "lora": {"rank": 8, "alpha": 16},
                "data": {"eval": "d"},
            }
            save_result(
                tmp_path / f"runs/{length}-{seed}", 0.7 + length / 100, seed=seed, losses=[3.0, 2.5, 2.25], **options
            )
    save_result(tmp_path / "runs/wide", 0.75, losses=[3.0], **{**COLA, "lora": {"rank": 16, "alpha": 16}})
    save_result(tmp_path / "zero", 0.5, method="zero-shot", chain={"length": 1}, data={"eval": "d"})
    figures = tmp_path / "figures"
    tables(tmp_path / "runs", plot=tmp_path / "a/loss.png", csv_file=tmp_path / "b/all.csv", figures=figures)
    assert {path.name for path in figures.iterdir()} == {"loss-cb.png", "score-by-length.png", "score-by-rank.png"}
    for picture in (*figures.iterdir(), tmp_path / "a/loss.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 5000
    with open(tmp_path / "b/all.csv", newline="", encoding="utf-8") as held:
        rows = list(csv.DictReader(held))
    assert len(rows) == 8  # one seed of `wide` is missing
    assert next(row for row in rows if row["folder"] == str(tmp_path / "runs/3-1")) == {
        "task": "cb", "name": "cola-3", "state": "finished", "chosen": "yes", "method": "cola", "links": "3",
        "lora_ranks": "8 8 8", "lr": "0.002", "optimizer": "adamw", "num_train": "", "seed": "1", "dev": "0.5", "test": "0.73",
        "metric": "accuracy", "best_step": "2", "steps": "3", "flops": "1000000000.0", "profiled_flops": "2000000000.0",
        "seconds": "12.5", "folder": str(tmp_path / "runs/3-1"),
    }  # fmt: skip
    assert [row["state"] for row in rows].count("missing") == 1
    tables(tmp_path / "zero", csv_file=tmp_path / "b/zero.csv")
    with open(tmp_path / "b/zero.csv", newline="", encoding="utf-8") as held:
        (row,) = csv.DictReader(held)
    assert (row["lr"], row["optimizer"], row["lora_ranks"]) == ("", "", "")  # it trains nothing


def make_group(task, name, paths, points=("",), seeds=(0, 1, 2)):
    """A group whose first seed searches."""
    return Group(task=task, name=name, paths=paths, points=points, seeds=seeds, search_seeds=seeds[:1])


def save_sweep(folder, states):
    """A sweep of a grid of two points and three seeds, whose runs are as the states say."""
    paths = {(point, seed): folder / f"cb/lora/{point}/seed={seed}" for point in ("lr=1", "lr=2") for seed in range(3)}
    write_groups(folder, [make_group("cb-100", "lora", paths, points=("lr=1", "lr=2"))])
    for place, state in states.items():
        run = folder / "cb/lora" / place
        if isinstance(state, float):
            save_result(run, state, dev=1 - state, seed=int(place[-1]), **LORA)
        else:
            run.parent.mkdir(parents=True, exist_ok=True)
            run.with_name(run.name + ".log").write_text(state, encoding="utf-8")


def test_a_sweep_with_failed_and_missing_runs(tmp_path):
    """The first start of a log was another story."""
    log = (
        "cola-ds sweep: then\ncola-ds: no data\ncola-ds sweep: exit status 2\n"
        "cola-ds sweep: now\ncola-ds: step 3\ncola-ds ... step 4 of 9\nKilled\ncola-ds sweep: exit status 137\n"
    )
    save_sweep(tmp_path / "runs", {"lr=1/seed=0": 0.4, "lr=2/seed=0": 0.6, "lr=1/seed=1": log})
    moved = (tmp_path / "runs").rename(tmp_path / "elsewhere")
    save_result(tmp_path / "elsewhere/not/of/the/sweep", 0.9, task="rte", **LORA)
    text = tables(tmp_path, paper="opt-1.3b")
    assert "| cb-100 | accuracy | 40.00 (1 of 3 seeds) [75.35 ±4.84] |" in text
    assert "rte" not in text
    assert "Chosen on dev: cb-100 / lora: lr=1 (dev 60.00)." in text
    assert f"Failed: {moved / 'cb/lora/lr=1/seed=1'}: status 137: step 3" in text
    assert f"Missing, 1 run: {moved / 'cb/lora/lr=1/seed=2'}." in text


@pytest.mark.parametrize(
    ("log", "state"),
    [
        ("cola-ds sweep: now\nloading", "Not finished, 1 run"),
        ("cola-ds sweep: now\ncola-ds sweep: exit status 75\n", "Not finished, 1 run"),
        ("cola-ds sweep: now\ncola-ds sweep: exit status 1\n", "status 1: it said nothing"),
        ("cola-ds sweep: now\nKilled\n\ncola-ds sweep: exit status 1\n", "status 1: Killed"),
        (
            f"cola-ds sweep: now\ncola-ds: going on\n{TRACE}bye\ncola-ds sweep: exit status 3\n",
            "status 3: E: no memory\n",
        ),
        (f"cola-ds sweep: now\n{TRACE}cola-ds: 1 is gone\ncola-ds sweep: exit status 3\n", "status 3: 1 is gone\n"),
        (
            "cola-ds sweep: now\nTraceback (most recent call last):\ncola-ds sweep: exit status 1\n",
            "1: a traceback that was",
        ),
        ("cola-ds sweep: now\ncola-ds sweep: exit status 0\n", "status 0: it said nothing"),
        (
            "cola-ds sweep: now\n 9%| cola-ds: training failed: disk\ncola-ds: bye\ncola-ds sweep: exit status 3\n",
            "status 3: training failed: disk",
        ),
    ],
)
def test_how_a_run_ended(tmp_path, log, state):
    save_sweep(tmp_path, {"lr=1/seed=0": log, "lr=2/seed=0": 0.6})
    (tmp_path / "cb/lora/lr=1/seed=0").mkdir(parents=True)
    recorded(tmp_path / "cb/lora/lr=1/seed=0")
    text = tables(tmp_path) + "\n"
    assert state in text
    chosen = "Nothing chosen: cb-100 / lora: 1 of 2 runs of its search has not finished; 2 seeds wait for it."
    assert chosen in text


def test_sweeps_that_have_a_task_in_common(tmp_path):
    """A row for each, compared within each alone; a folder that is named twice counts once."""
    for name, better in (("few", 0.0), ("many", 0.2)):
        paths = {(kind, s): tmp_path / name / f"cb/{kind}/seed={s}" for kind in ("lora", "cola") for s in range(3)}
        groups = [
            make_group("cb", kind, {("", seed): paths[kind, seed] for seed in range(3)}) for kind in ("lora", "cola")
        ]
        write_groups(tmp_path / name, groups)
        for (kind, seed), path in paths.items():
            more = better + (0.01 * (seed + 1) if kind == "cola" else 0)
            save_result(path, 0.5 + more, seed=seed, **(COLA if kind == "cola" else LORA))
    text = tables(tmp_path, paper="opt-1.3b")
    assert "| cb (few) | accuracy | 50.00 ±0.00 (3) [75.35 ±4.84] | **52.00 ±1.00 (3)** [76.78 ±6.38] |" in text
    assert "| cb (many) | accuracy | 70.00 ±0.00 (3) [75.35 ±4.84] | **72.00 ±1.00 (3)** [76.78 ±6.38] |" in text
    compared = [line for line in text.splitlines() if " - lora |" in line]
    assert [line.split(" | ")[0] for line in compared] == ["| cb (few)", "| cb (many)"]
    assert tables(tmp_path / "few", tmp_path / "few/../few") == tables(tmp_path / "few")
    assert "| cb | accuracy | 50.00" in tables(tmp_path / "few")
    (tmp_path / "many").rename(tmp_path / "few/few")
    assert f"| cb ({tmp_path}/few/few) |" in tables(tmp_path / "few")
    with pytest.raises(UserError, match=r"cb/lora is a part of the sweep in .*few: name that, or a run"):
        tables(tmp_path / "few/cb/lora")


def test_runs_of_the_same_name_in_two_folders(tmp_path):
    for seed in range(2):
        save_result(tmp_path / f"lora/seed={seed}", 0.5, seed=seed, **LORA)
        save_result(tmp_path / f"cola/seed={seed}", 0.6 + seed / 10, seed=seed, **COLA)
    text = tables(tmp_path / "lora", tmp_path / "cola")
    assert "| cb | accuracy | 50.00 ±0.00 (2) | **65.00 ±7.07 (2)** |" in text
    assert tables(tmp_path / "lora", tmp_path / "lora", tmp_path / "cola") == text
    with pytest.raises(UserError, match=r"lora/seed=0 and .*lora/seed=0 are the same run twice"):
        tables(tmp_path, tmp_path / "lora")


def test_runs_of_another_budget_are_not_compared(tmp_path):
    """Nor joined by a line, nor the FLOPs that one saves."""
    stepped = {"method": "cola", "chain": {"length": 2}, "lora": {"rank": [8, 4], "alpha": 16}}
    few, many = {"num_train": 100, "task": "cb"}, {"num_train": 1000, "task": "cb"}
    for seed in range(2):
        save_result(tmp_path / f"a{seed}", 0.5, seed=seed, flops=20, **{**LORA, "data": few})
        save_result(tmp_path / f"b{seed}", 0.6, seed=seed, flops=10, **{**COLA, "data": few})
        save_result(tmp_path / f"c{seed}", 0.6, seed=seed, flops=6, **{**stepped, "data": few})
        save_result(tmp_path / f"d{seed}", 0.7, seed=seed, flops=100, **{**COLA, "data": many})
        save_result(tmp_path / f"e{seed}", 0.8, seed=seed, **{**LORA, "data": many})
        save_result(tmp_path / f"f{seed}", 0.9, seed=seed, **{**LORA, "data": many, "model": {"path": "other"}})
    text = tables(tmp_path)
    compared = [line.split(" | ")[1] for line in text.splitlines() if line.endswith(" | no significant difference |")]
    assert compared == [
        "cola-2 rank=8 num_train=100 - lora path=model num_train=100",
        "cola-2 rank=[8, 4] num_train=100 - lora path=model num_train=100",
        "cola-2 rank=8 num_train=1000 - lora path=model num_train=1000",
    ]
    assert "60.00; 8.00e+00 (2)" in text
    assert text.count("e+0") == 1
    lines = _score_lines(find_runs([str(tmp_path)]).cells, "length")
    assert lines == {
        "cb, rank 8, adamw": {1: [50.0, 50.0], 2: [60.0, 60.0]},
        "cb, rank 8, adamw, cola-2 rank=8 num_train=1000": {2: [70.0, 70.0], 1: [80.0, 80.0]},
    }


def test_other_layers_and_switches_are_no_points_of_a_line(tmp_path):
    """Nor what a rank that steps down is compared with."""
    wide = {"rank": 8, "alpha": 16, "targets": "all-linear"}
    for seed in range(2):
        save_result(tmp_path / f"a{seed}", 0.5, seed=seed, flops=20, **LORA)
        save_result(tmp_path / f"b{seed}", 0.6, seed=seed, flops=10, **COLA)
        save_result(tmp_path / f"c{seed}", 0.6, seed=seed, flops=6, **COLA | {"lora": {"rank": [8, 4], "alpha": 16}})
        save_result(tmp_path / f"d{seed}", 0.8, seed=seed, flops=60, **COLA | {"lora": wide})
        save_result(
            tmp_path / f"e{seed}",
            0.9,
            seed=seed,
            flops=11,
            **COLA | {"lora": {**wide, "targets": ["v_proj", "q_proj"], "init": "pissa"}},
        )
    text = tables(tmp_path)
    assert "60.00; 8.00e+00 (2)" in text and text.count("e+0") == 1
    assert _score_lines(find_runs([str(tmp_path)]).cells, "length") == {
        "cb, rank 8, adamw": {1: [50.0, 50.0], 2: [60.0, 60.0]}
    }


def test_what_was_begun_is_in_the_csv(tmp_path):
    """Also at a point that was not chosen, and at the chosen one with a seed that only searched."""
    states = {"lr=1/seed=0": 0.4, "lr=2/seed=0": 0.6, "lr=1/seed=1": 0.5, "lr=2/seed=2": 0.7}
    save_sweep(tmp_path / "a", states)
    groups = read_groups(tmp_path / "a")
    write_groups(tmp_path / "a", [replace(groups[0], seeds=(1, 2))])
    tables(tmp_path / "a", csv_file=tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as held:
        found = {"/".join(row["folder"].split("/")[-2:]): (row["chosen"], row["state"]) for row in csv.DictReader(held)}
    assert found == {
        "lr=1/seed=0": ("no", "finished"), "lr=1/seed=1": ("yes", "finished"), "lr=1/seed=2": ("yes", "missing"),
        "lr=2/seed=0": ("no", "finished"), "lr=2/seed=2": ("no", "finished"),
    }  # fmt: skip


def test_a_loss_that_is_not_finite(tmp_path):
    """JSON has null for it. In a sweep that point is out; alone the run is named."""
    save_sweep(tmp_path / "a", {"lr=1/seed=0": 0.4, "lr=2/seed=0": 0.6})
    run = tmp_path / "a/cb/lora/lr=1/seed=0"
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    lost = {**result, "task": None, "scores": {"loss": None, "perplexity": None, "examples": 3}}
    (run / "result.json").write_text(json.dumps(lost), encoding="utf-8")
    recorded(run)
    text = tables(tmp_path)
    assert "Chosen on dev: cb-100 / lora: lr=2 (dev 40.00)" in text
    assert f"Failed: {run}: its held-out loss is not finite" in text
    alone = shutil.copytree(run, tmp_path / "alone")
    assert f"Failed: {alone}: its held-out loss is not finite" in tables(alone)


def save_losses(folder, losses, **sections):
    """A method of a sweep on own data, its runs by seed."""
    for seed, loss in enumerate(losses):
        run = save_result(folder / f"seed={seed}", 0.5, seed=seed, **sections)
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        result |= {"task": None, "scores": {"loss": loss, "perplexity": 12.0, "examples": 3}}
        (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
        recorded(run)
    paths = {("", seed): folder / f"seed={seed}" for seed in range(3)}
    return replace(make_group("own", folder.name, paths), search_seeds=(0, 1, 2))


def test_losses_are_compared_as_scores_are(tmp_path):
    """Of a sweep on own data, in whose tables lower is better: 2.5, 2.7, 2.9 and 2.3, 2.4, 2.8: mean -0.2, t = -0.2 / (0.1 /
    sqrt(3)) = -3.4641, two degrees of freedom: p = 1 - t / sqrt(t^2 + 2) = 0.0742. Other targets or rows: no pair."""
    lora = save_losses(tmp_path / "lora", [2.5, 2.7, 2.9], **LORA)
    chain = save_losses(tmp_path / "chain", [2.3, 2.4, 2.8], **COLA)
    wide = save_losses(tmp_path / "wide", [2.0, 2.0], **COLA | {"lora": {"rank": 8, "targets": "all-linear"}})
    other = save_losses(tmp_path / "other", [1.0, 1.0, 1.0], **COLA | {"data": {"train": "other.jsonl"}})
    write_groups(tmp_path, [lora, chain, wide, other])
    text = tables(tmp_path)
    assert "| task | metric | lora | chain | wide | other |" in text
    cells = "2.7000 ±0.2000 (3) | 2.5000 ±0.2646 (3) | 2.0000 ±0.0000 (2 of 3 seeds) | **1.0000 ±0.0000 (3)** |"
    assert f"| own | loss | {cells}" in text
    assert "of the test score x 100, or of the held-out loss (seeds)" in text
    assert "| own | chain - lora | 3 | -0.2000 | 0.0742 | 0.0742 | no significant difference |" in text
    assert "wide - lora" not in text
    assert "other - lora" not in text
    write_groups(tmp_path, [replace(lora, task="cb")])  # a name of the paper's, but no score
    assert "| cb | loss | 2.7000 ±0.2000 (3) |" in tables(tmp_path, paper="opt-1.3b")
    shutil.rmtree(tmp_path / "chain")
    write_groups(tmp_path, [lora, save_losses(tmp_path / "chain", [2.3, 2.5001, 2.7], **COLA)])
    assert "| own | chain - lora | 3 | -0.2000 | 2.78e-08 | 2.78e-08 | better |" in tables(tmp_path)


def test_names_that_markdown_would_cut(tmp_path):
    write_groups(tmp_path, [make_group("a|b", "x|y", {("", 0): tmp_path / "r"}, seeds=(0,))])
    save_result(tmp_path / "r", 0.5, **LORA)
    assert "| task | metric | x\\|y |" in tables(tmp_path, figures=tmp_path / "f")
    assert (tmp_path / "f/loss-a-b.png").is_file()


def test_what_cannot_be_read(tmp_path, capsys):
    save_sweep(tmp_path / "a", {"lr=1/seed=0": 0.4, "lr=2/seed=0": 0.6})
    for text in ("{", '{"scores": null}'):
        (tmp_path / "a/cb/lora/lr=1/seed=0/result.json").write_text(text, encoding="utf-8")
        said = tables(tmp_path / "a", csv_file=tmp_path / "x")
        assert "lr=1/seed=0/result.json is not what the run in this folder wrote" in said
    assert main(["report", str(tmp_path / "a"), "--csv", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "a/sweep.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"a/sweep.json is not what cola-ds sweep writes .*; without it"):
        tables(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        tables(tmp_path / "empty")
    save_result(tmp_path / "b/1", 0.5, **LORA)
    save_result(tmp_path / "b/2", 0.5, **LORA)
    with pytest.raises(UserError, match=r"b/1 and .*b/2 are the same run twice: name one of them"):
        tables(tmp_path / "b")


def test_runs_without_a_task_beside_those_with_one(tmp_path):
    """As before, a row each; of several in one folder, by their paths in it."""
    for name in ("x/one", "x/two"):
        folder = save_result(tmp_path / name, 0.5, **LORA)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        result |= {"task": None, "scores": {"loss": 2.5, "perplexity": 12.18, "examples": 3}}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        recorded(folder)
    save_result(tmp_path / "x/task", 0.5, **LORA)
    text = tables(tmp_path, plot=tmp_path / "loss.png")
    assert "| x/one | lora | 1 | 0 | 2.5000 | 12.18 | 12 | 1.00 |\n| x/two | lora" in text
    assert "| cb | accuracy | 50.00 (1) |" in text
    assert "| two | lora | 1 | 0 | 2.5000" in tables(tmp_path / "x/two")
    (tmp_path / "x/two/result.json").unlink()
    assert f"Not finished: {tmp_path / 'x/two'}" in tables(tmp_path)
    with pytest.raises(UserError, match=r"x/two has no result.json: the run has not finished"):
        tables(tmp_path / "x/two")
