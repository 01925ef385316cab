"""The sweeps that come with the project: each task and method resolves, on a small model of that architecture."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cola_ds.data.tasks.catalog import TASKS
from cola_ds.data.tasks.files import Rows
from cola_ds.data.tasks.sampling import sample
from cola_ds.report.paper import PAPER_TABLES, numbers_of, published_columns
from cola_ds.sweep.plan import load_plan
from tests.data.test_tasks import BY_HAND
from tests.support.toys import REPOSITORY, save_model, save_sums

READY = sorted(path for path in (REPOSITORY / "launch/sweeps").glob("*/*.yaml") if not path.stem.endswith("base"))
OF_FILES = [path for path in READY if "data.train:" in path.read_text(encoding="utf-8")]
SWEEPS = [path for path in READY if path not in OF_FILES]

# Full fine-tuning's learning rates, as the paper's appendix has them.
FULL_OPT = [1e-6, 5e-6, 8e-6, 1e-5, 5e-5, 8e-5]
FULL_LLAMA = [1e-7, 5e-7, 8e-7, *FULL_OPT]

FEW = {"num_train": 20, "num_dev": 4, "num_test": 4, "demonstrations": 2}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Rows of every task, enough to draw from."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in {task for task, _, _ in BY_HAND}:
        rows = [row for task, row, _ in BY_HAND if task == name]
        (folder / name).mkdir()
        for split in ("train", "validation"):
            text = "".join(json.dumps(row) + "\n" for row in rows * 60)
            (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, name, max_position_embeddings=4096) for name in ("llama", "opt")}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_ready_sweep_resolves(path, tasks, models, monkeypatch):
    from cola_ds.training.prepare import prepare

    monkeypatch.chdir(REPOSITORY)
    name = str(path.relative_to(REPOSITORY))
    plan = load_plan(name, [])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(f"#   cola-ds sweep {name}") for line in lines)
    report = next(line for line in lines if line.startswith("#   cola-ds report "))
    assert report.split()[3] == plan.sweep.dir
    if "--paper" in report:  # every number of the paper's table has one place
        assert report.split()[-1] == path.stem
        numbers = numbers_of(path.stem)
        found = [
            (series.group.task, column)
            for series in plan.series
            for column in published_columns(series.configs[series.group.points[0]], path.stem)
            if (series.group.task, column) in numbers
        ]
        assert sorted(found) == sorted(numbers)
    for series in plan.series:
        config = series.configs[series.group.points[0]]
        model = models["opt" if re.search("opt-", config.model.path) else "llama"]
        own = {"path": str(model), "dtype": "fp32"}
        config = config.model_copy(update={
            "model": config.model.model_copy(update=own),
            "data": config.data.model_copy(update={"dir": str(tasks), **FEW}),
            "deepspeed": "ds_configs/zero3.json",
        })  # fmt: skip
        prepared = prepare(config, 1)
        assert prepared.test.task.name == series.group.task
        if path.parent.name == "paper":
            assert config.lora.bias == ("lora_only" if model == models["opt"] else "none")  # its appendix A.1
            if config.method == "full":
                rates = [each.optim.lr for each in series.configs.values()]
                assert rates == (FULL_OPT if model == models["opt"] else FULL_LLAMA)
        if config.trains_lora:
            assert len(prepared.step_plan.knots) == config.chain.length == len(config.lora_ranks)


@pytest.mark.parametrize("path", OF_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_ready_sweep_of_files_resolves(path, models, tmp_path, monkeypatch):
    """Its first lines run it and show it, and make the teachers of all its tasks; a chain takes LoRA's steps."""
    from cola_ds.training.prepare import prepare

    monkeypatch.chdir(REPOSITORY)
    name = str(path.relative_to(REPOSITORY))
    plan = load_plan(name, [])
    head = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert f"cola-ds sweep {name}" in " ".join(head)
    of_teacher = path.parent.name == "teacher"
    shown_by = "python launch/sweeps/teacher/table.py" if of_teacher else "cola-ds report"
    assert f"{shown_by} {plan.sweep.dir}" in head
    save_sums(tmp_path / "rows.jsonl", 2000)
    for series in plan.series:
        config = series.configs[series.group.points[0]]
        folder, beside = Path(config.data.train).parent, Path(config.data.eval).parent
        if of_teacher:
            assert beside == Path(config.model.path).parent
            rank = beside.name.split("-")[1] if "-" in beside.name else "16"
            for made in {folder, beside}:  # more texts of the same teacher have a folder of their own
                assert f"make.py {made} --rank {rank}" in " ".join(head).replace("$R", rank)
        else:
            assert folder == beside
        rows = {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")}
        config = config.model_copy(update={
            "model": config.model.model_copy(update={"path": str(models["llama"])}),
            "data": config.data.model_copy(update=rows), "deepspeed": "ds_configs/zero3.json",
        })  # fmt: skip
        step_plan = prepare(config, 1).step_plan
        assert step_plan.knots[-1] == config.optim.max_steps
        assert len(step_plan.knots) == (
            1 if config.chain.plateau else config.chain.length
        )  # the loss places the others


def test_pickled_weights_become_safetensors(models, tmp_path):
    """As the base of OPT's sweeps says."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = load_file(models["opt"] / "model.safetensors")
    shutil.copytree(models["opt"], tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights, tmp_path / "pickled/pytorch_model.bin")
    text = (REPOSITORY / "launch/sweeps/paper/opt-1.3b-base.yaml").read_text(encoding="utf-8")
    command = next(line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   python -c "))
    *words, source, target = shlex.split(command)
    assert (words[0], source, target) == ("python", "facebook/opt-1.3b", yaml.safe_load(text)["model"]["path"])
    subprocess.run([sys.executable, *words[1:], tmp_path / "pickled", tmp_path / "out"], check=True, timeout=120)
    made = load_file(tmp_path / "out/model.safetensors")
    assert made.keys() <= weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in made.items())
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids


OFFICIAL = {"sst2": 67_349, "rte": 2490, "cb": 250, "copa": 400, "wsc": 554, "wic": 5428, "boolq": 9427, "multirc": 27_243,
            "squad": 87_599, "drop": 77_400, "record": 100_730}  # fmt: skip
"""Rows of the training splits on the hub; of multirc, drop and record more examples come of them, or fewer."""


@pytest.mark.parametrize("path", [path for path in SWEEPS if path.parent.name == "paper"], ids=lambda path: path.stem)
def test_the_papers_examples_are_there(path, monkeypatch):
    """By each task's own numbers there is something to train on, and dev is the protocol's: 100 of CB and COPA."""
    monkeypatch.chdir(REPOSITORY)
    for series in load_plan(str(path.relative_to(REPOSITORY)), []).series:
        data = next(iter(series.configs.values())).data
        task, rows = TASKS[data.task], Rows(list(range(OFFICIAL[data.task])), {}, "")
        splits = sample(task, rows, rows, 0, data.num_train, data.num_dev, data.num_test)
        asked = {"data-5000": 400 if data.task == "wic" else 500, "low-data": 100, "low-data-50": 50}
        assert len(splits.dev) == asked.get(path.stem, 100 if data.task in ("cb", "copa") else 500)
        assert len(splits.train) == min(data.num_train, len(rows.examples) - len(splits.dev))


def test_the_papers_tables_are_all_there():
    assert {path.stem for path in SWEEPS if path.parent.name == "paper"} == set(PAPER_TABLES)
