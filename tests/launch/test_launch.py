"""The scripts of launch/, and its ready runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.commands.test_cli import run
from tests.support.launching import clean_environment, in_copy
from tests.support.toys import REPOSITORY, save_model, save_sums

PAGE = (REPOSITORY / "launch/README.md").read_text(encoding="utf-8")


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [
        *(REPOSITORY / "launch").glob("*.sh"), *(REPOSITORY / "slurm").glob("*.sh"), REPOSITORY / ".ci/run",
        REPOSITORY / "tests/support/mini-slurm.sh",
    ]  # fmt: skip
    assert len(scripts) >= 11
    batch = [*(REPOSITORY / "slurm").glob("*.sbatch")]
    assert batch
    done = run("shellcheck", "-x", *scripts, *batch)
    assert done.returncode == 0, done.stdout
    for script in (*scripts, *batch):
        assert run("bash", "-n", script).returncode == 0
    assert all(os.access(script, os.X_OK) for script in scripts)


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["local.sh"], {}, "local.sh: usage: launch/local.sh RUN.yaml [N]"),
        (["hostfile.sh", "RUN"], {}, "usage: launch/hostfile.sh RUN.yaml HOSTFILE"),
        (["hostfile.sh", "RUN", "none"], {}, "there is no hostfile none; write one line per machine"),
        (["hostfile.sh", "none.yaml", "HOSTS"], {}, "there is no none.yaml"),
        (["hostfile.sh", "RUN", "EMPTY"], {}, "names no machine; write one line per machine"),
        (["hostfile.sh", "RUN", "BAD"], {}, 'has the line "n1 slots=many"; a line looks like: node1 slots=8'),
        (["hostfile.sh", "RUN", "TWICE"], {}, "names n1 twice; give each machine one line"),
        (
            ["hostfile.sh", "RUN", "HOSTS"],
            {},
            "no-such-host.invalid in HOSTS is not reached over ssh without a password",
        ),
        (["mpirun.sh", "RUN"], {}, "usage: launch/mpirun.sh RUN.yaml N"),
        (["mpirun.sh", "RUN", "2", "--", "--host", "localhost:1"], {}, "not enough slots"),
        (
            ["torchrun.sh", "RUN"],
            {"NNODES": "2"},
            "NNODES is 2, but NODE_RANK is not set; it is 0 on the first machine",
        ),
        (["torchrun.sh", "RUN"], {"NNODES": "2", "NODE_RANK": "0"}, "but MASTER_ADDR is not set"),
    ],
)
def test_wrong_calls_of_the_scripts(tmp_path, words, env, message):
    """One line, status 2, at once."""
    for tool, script in (("pdsh", "hostfile.sh"), ("mpirun", "mpirun.sh"), ("ssh", "hostfile.sh")):
        if words[0] == script and shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    (tmp_path / "RUN").write_text("{}", encoding="utf-8")
    hosts = {
        "HOSTS": "no-such-host.invalid slots=1\n", "EMPTY": "# none\n\n", "BAD": "n1 slots=many\n",
        "TWICE": "n1 slots=1\nn1 slots=2\n",
    }  # fmt: skip
    for name, text in hosts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    clean = {**clean_environment(), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **env}
    done = subprocess.run(
        [REPOSITORY / "launch" / words[0], *words[1:]],
        cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


RUNS = sorted([*(REPOSITORY / "launch/runs").glob("*.yaml"), *REPOSITORY.glob("launch/*/run.yaml")])


@pytest.mark.parametrize("path", RUNS, ids=[path.stem for path in RUNS])
def test_ready_runs_resolve_as_their_first_lines_call_them(tmp_path, path):
    """On a small model of their architecture, for the number of processes that they name."""
    from cola_ds.config.loading import load_config
    from cola_ds.training.prepare import prepare

    sizes = {"num_key_value_heads": 2} if "llama-2-7b" not in path.stem and "13b" not in path.stem else {}
    model = save_model(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=4096, **sizes)
    save_sums(tmp_path / "data.jsonl", 40)
    text = path.read_text(encoding="utf-8")
    calls = [line.removeprefix("#").split() for line in text.splitlines() if re.match(r"#\s+\./", line)]
    assert calls
    toy = [f"model.path={model}", f"data.train={tmp_path / 'data.jsonl'}", f"data.eval={tmp_path / 'data.jsonl'}"]
    for words in calls:
        assert (REPOSITORY / words[0]).is_file()
        at = next(index for index, word in enumerate(words) if word.endswith(".yaml"))
        assert words[at] == str(path.relative_to(REPOSITORY))
        named = dict(zip(words[1:at:2], words[2:at:2], strict=True))
        count = (
            int(words[at + 1])
            if words[at + 1].isdigit()
            else int(named.get("--nodes", 1)) * int(named.get("--gpus", 16))
        )
        overrides = [word for word in words[at + 1 :] if "=" in word]
        config = load_config(path, [*overrides, *toy])
        prepared = prepare(config, count)
        assert prepared.step_plan.micro_steps * config.optim.micro_batch_size * count == config.optim.global_batch_size
        for name in re.findall(r"deepspeed=(\S+)", text):
            prepare(load_config(path, [*overrides, *toy, f"deepspeed={name}"]), count)


@pytest.mark.quickstart
def test_quickstart_runs(copy):
    """With fewer steps and held-out examples; the whole of it otherwise, the download of the model included."""
    in_copy(copy, "python launch/quickstart/data.py build/quickstart 800 8")
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

    # What the script does before its runs, a second time.
    second = in_copy(
        copy, "./launch/setup.sh quickstart && python launch/quickstart/model.py build/SmolLM2-135M-Instruct"
    )
    assert "installing" not in second  # it neither installs nor converts again
    assert stamp.stat().st_mtime_ns == installed
    # The copy was not installed in the place of this repository, whose environment it shares.
    assert in_copy(copy, "cd / && python -c 'import cola_ds; print(cola_ds.__file__)'").startswith(str(REPOSITORY))
    assert (copy / "build/SmolLM2-135M-Instruct/model.safetensors").stat().st_mtime_ns == model


def test_chat_example(tmp_path):
    """Its run and its answers with a toy in the model's place, and as many links as it says; the real model: ./launch/chat.sh."""
    for name in ("launch", "cola_ds", "ds_configs", "tests"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    model = save_model(tmp_path / "build/SmolLM2-135M-Instruct", max_position_embeddings=512)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}",
        encoding="utf-8",
    )
    env = {**clean_environment(), "PYTHONPATH": str(REPOSITORY)}

    def python(*words):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python("launch/chat/data.py", "build/chat", "40", "8")
    rows = [json.loads(line) for line in (tmp_path / "build/chat/train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"] * 2
    question = (tmp_path / "build/chat/question.txt").read_text(encoding="utf-8").strip()
    held_out = json.loads((tmp_path / "build/chat/dev.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert question == held_out["messages"][0]["content"]
    assert all(question != row["messages"][0]["content"] for row in rows)
    python("-m", "cola_ds", "train", "launch/chat/run.yaml", "optim.max_steps=4")
    result = json.loads((tmp_path / "runs/chat/result.json").read_text(encoding="utf-8"))
    assert (result["links"], result["steps"]) == (2, 4)
    python("-m", "cola_ds", "export", "runs/chat", "--to", "hf", "--out", "build/chat/model")
    answers = [python("launch/chat/answer.py", "build/chat/model", question, "8") for _ in range(2)]
    assert answers[0] == answers[1]


@pytest.mark.quickstart
def test_benchmark_runs(copy):
    """On a toy model; its tables have every row that launch/README.md shows."""
    save_sums(save_model(copy / "models/bench") / "sums.jsonl", 40)
    toy = "model.path=models/bench data.train=models/bench/sums.jsonl data.max_length=64"
    shown = in_copy(copy, f"./launch/bench.sh {toy} --knots 1 --pairs 1 --steps 12 --memory-pairs 1")
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in shown.splitlines() if line.startswith("| ")}
    shown_there = PAGE.split("\nknots of ")[1]
    names = {line.split("|")[1].strip() for line in shown_there.splitlines() if line.startswith("| ")}
    assert {name.replace("120 steps", "12 steps") for name in names} == set(cells)
    local, gathered, rebuilt = map(float, cells["tie, KiB moved per process"])
    assert 0 < local == rebuilt < gathered
    assert [float(moved) > 0 for moved in cells["extend, KiB moved per process"]] == [False, False, True]
    assert 0.5 < float(cells["peak memory, 12 steps"][0]) < 2


def test_benchmark_of_a_gpu_runs_where_nothing_can_be_installed(tmp_path):
    """Without a .venv it takes the interpreter that is there, makes none, and climbs its rungs."""
    for name in ("launch", "cola_ds", "ds_configs", "tests"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    env = {name: value for name, value in clean_environment().items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    env |= {"COLA_DS_GPU_TESTS_ON": "cpu", "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
    words = [
        "gpu",
        "--model",
        "toy",
        "--steps",
        "5",
        "--chain-steps",
        "9",
        "--max-length",
        "64",
        "--rungs",
        "zero3, sdpa",
    ]
    words += ["attention"]
    done = subprocess.run(
        ["launch/bench.sh", *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / ".venv").exists()
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    rungs = [dict(zip(cells["rung"], cells[name], strict=True)) for name in ("zero3, sdpa", "attention")]
    for rung in rungs:
        assert all(float(rung[name]) > 0 for name in ("tokens/s", "step, s", "TFLOP/s", "peak, GiB", "first step, s"))
    assert rungs[0]["loss"] == rungs[1]["loss"]  # bf16, the same examples, to a thousandth
    assert float(cells["peak, GiB"][2]) > 0 and "knots, s to tie + to extend: " in done.stdout
    assert f"torch {version('torch')}" in done.stdout
    assert " ".join(words) in done.stdout


def test_benchmark_of_evaluation_runs(tmp_path):
    """On a toy, as two processes: both ways score and answer alike, and the figures are of what it was asked for."""
    model = save_model(tmp_path / "model")
    for name in ("launch", "cola_ds", "ds_configs", "tests"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    words = ["evaluation", str(model), "--examples", "7", "--rounds", "1", "--batch-size", "2", "--lengths", "5", "40"]
    words += ["--new-tokens", "12", "--processes", "2"]
    env = clean_environment() | {"PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        ["launch/bench.sh", *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("| ")
    ]
    assert [row[0] for row in cells] == ["examples a second", "---", "candidates", "answers"]
    assert all(float(cell) > 0 for row in cells[2:] for cell in row[1:4])
    assert "7 of 7 answers are the same ids" in done.stdout
    assert " ".join(words[1:]) in done.stdout


def test_quickstart_data_is_split_without_leakage(copy):
    in_copy(copy, "python launch/quickstart/data.py data/docs")
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
