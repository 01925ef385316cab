"""The scripts, and every command of the README, executed in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml

from tests.test_cli import run
from tests.toys import REPOSITORY, save_model, save_sums

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files of the repository, and its environment, in a folder that may be written to."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "cola_ds", "launch", "ds_configs", "tests"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    if not (REPOSITORY / ".venv/bin/python").exists():
        pytest.skip("there is no .venv: run the tests with ./launch/test.sh")
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder


def in_copy(copy, command, timeout_s=600):
    """A shell command as a reader of the README would type it."""
    env = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    done = subprocess.run(
        ["bash", "-c", f"source .venv/bin/activate && {command}"],
        cwd=copy, env=env, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """Every command of the README, with its continuation lines joined."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()]


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*(REPOSITORY / "launch").glob("*.sh"), REPOSITORY / ".ci/run"]
    done = run("shellcheck", *scripts)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in scripts)


def test_readme_commands_run(copy):
    """In the order of the README, on a toy model and data where it has the reader's own."""
    save_model(copy / "models/my-llama")
    (copy / "data").mkdir(exist_ok=True)
    save_sums(copy / "data/train.jsonl", 40)
    save_sums(copy / "data/dev.jsonl", 12, seed=1)
    for row in blocks("json"):
        assert {"prompt", "completion"} <= set(json.loads(row))
    (run_yaml,) = [block for block in blocks("yaml") if "method:" in block]
    (copy / "my_run.yaml").write_text(run_yaml, encoding="utf-8")
    elsewhere = ("./launch/quickstart.sh", "./launch/test.sh", "source ")  # below; what runs this; done by in_copy
    mine = [command for command in commands() if not command.startswith(elsewhere)]
    assert len(mine) >= 5
    for command in mine:
        in_copy(copy, command)
    assert (copy / "my-merged-model/model.safetensors").is_file()


def test_readme_names_what_is_there():
    for path in re.findall(r"`((?:launch|ds_configs|cola_ds|tests)/[\w./-]+)`", README):
        assert (REPOSITORY / path).exists(), path
    for image in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (REPOSITORY / image).is_file(), image
    for block in blocks("yaml"):
        assert yaml.safe_load(block)


@pytest.mark.quickstart
def test_quickstart_runs_twice(copy):
    """With fewer steps; the whole of it otherwise, the download of the model included."""
    stamp = REPOSITORY / ".venv/.installed-quickstart"
    first = in_copy(copy, "./launch/quickstart.sh 2 optim.max_steps=3 eval.every=end", timeout_s=1200)
    installed = stamp.stat().st_mtime_ns
    table = {line.split("|")[1].strip(): line.split("|") for line in first.splitlines() if line.startswith("| ")}
    assert [table[name][3].strip() for name in ("zero-shot", "lora", "cola")] == ["0", "1", "3"]
    assert (copy / "runs/quickstart/loss.png").read_bytes().startswith(b"\x89PNG")
    losses = [float(table[name][5]) for name in ("zero-shot", "lora", "cola")]
    assert max(losses[1:]) < losses[0]  # even three steps teach something

    model = (copy / "build/SmolLM2-135M-Instruct/model.safetensors").stat().st_mtime_ns
    command = re.search(r"cola-ds export .*", first)[0]
    in_copy(copy, command)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained(copy / "build/quickstart-cola")
    tokenizer = AutoTokenizer.from_pretrained(copy / "build/quickstart-cola")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(exported.generate(**ids, max_new_tokens=4, do_sample=False)[0])

    second = in_copy(copy, "./launch/quickstart.sh 2 optim.max_steps=3 eval.every=end", timeout_s=1200)
    assert "installing" not in second  # run again, it neither installs nor converts again
    assert stamp.stat().st_mtime_ns == installed
    assert (copy / "build/SmolLM2-135M-Instruct/model.safetensors").stat().st_mtime_ns == model


@pytest.mark.quickstart
def test_benchmark_runs(copy):
    """On a toy model; its tables have every row that the README shows."""
    save_sums(save_model(copy / "models/bench") / "sums.jsonl", 40)
    toy = "model.path=models/bench data.train=models/bench/sums.jsonl data.max_length=64"
    shown = in_copy(copy, f"./launch/bench.sh {toy} --knots 1 --pairs 1 --steps 6 --memory-pairs 1")
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in shown.splitlines() if line.startswith("| ")}
    shown_in_readme = README.split("\nknots of ")[1].split("### Stopping")[0]
    names = {line.split("|")[1].strip() for line in shown_in_readme.splitlines() if line.startswith("| ")}
    assert {name.replace("120 steps", "6 steps") for name in names} == set(cells)
    local, gathered, rebuilt = map(float, cells["tie, KiB moved per process"])
    assert 0 < local == rebuilt < gathered
    assert [float(moved) > 0 for moved in cells["extend, KiB moved per process"]] == [False, False, True]
    assert 0.5 < float(cells["peak memory, 12 steps"][0]) < 2


def test_quickstart_data_is_split_without_leakage(copy):
    in_copy(copy, "python launch/quickstart_data.py data/docs")
    halves = []
    for name in ("train", "dev"):
        rows = [
            json.loads(line) for line in (copy / f"data/docs/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        packages = {re.search(r"`(\w+)", row["prompt"])[1] for row in rows}
        halves.append((packages, {row["completion"].lower() for row in rows}, len(rows)))
    (train_packages, train_texts, train), (held_packages, held_texts, held) = halves
    assert not train_packages & held_packages
    assert not train_texts & held_texts
    assert len(train_texts) == train > 1000  # no docstring twice
    assert len(held_texts) == held > 200
