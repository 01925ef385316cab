"""The scripts, and every command of the README, executed in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml

from tests.commands.test_cli import run
from tests.support.launching import clean_environment
from tests.support.toys import REPOSITORY, save_model, save_sums

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files of the repository, and its environment, in a folder that may be written to."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "cola_ds", "launch", "ds_configs", "slurm", "tests"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    if not (REPOSITORY / ".venv/.installed-quickstart").exists():
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


def save_task(folder):
    """Rows that are examples of sst2 and of cb."""
    folder.mkdir(parents=True)
    for name, count in (("train", 700), ("validation", 10)):
        rows = ({"sentence": f"a {n}", "premise": f"b {n}", "hypothesis": "c", "label": n % 2} for n in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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


RUNS = sorted((REPOSITORY / "launch/runs").glob("*.yaml"))


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
        assert words[at] == f"launch/runs/{path.name}"
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


def test_readme_commands_run(copy):
    """In the order of the README, on a toy model and data where it has the reader's own."""
    save_model(copy / "models/my-llama")
    (copy / "data").mkdir(exist_ok=True)
    save_sums(copy / "data/train.jsonl", 40)
    save_sums(copy / "data/dev.jsonl", 12, seed=1)
    for row in blocks("json"):
        assert {"prompt", "completion"} <= set(json.loads(row))
    for name in ("my_run", "my_base", "my_sweep"):
        (text,) = re.findall(rf"this `{name}.yaml`:\n\n```yaml\n(.*?)```", README, flags=re.DOTALL)
        (copy / f"{name}.yaml").write_text(text, encoding="utf-8")
    save_task(copy / "tasks/sst2")
    save_task(copy / "tasks/cb")
    # One of the 46 runs of the sweep is a real one, with a knot; what the others leave is made up.
    names = in_copy(copy, "cola-ds sweep my_sweep.yaml --list").splitlines()
    number = next(line.split()[0] for line in names if line.endswith("cb/cola/lr=0.001/seed=0"))
    in_copy(copy, f"cola-ds sweep my_sweep.yaml optim.epochs=5 --only {number}")
    (copy / "told.json").write_text('{"fail": {}, "scores": {}}', encoding="utf-8")
    with open(copy / "my_sweep.yaml", "a", encoding="utf-8") as out:
        out.write("launcher: python tests/support/stand_in.py . {run}\n")
    elsewhere = ("./launch/quickstart.sh", "./launch/test.sh", "source ")  # below; what runs this; done by in_copy
    mine = [command for command in commands() if not command.startswith(elsewhere)]
    assert len(mine) >= 5
    for command in mine:
        in_copy(copy, command)
    assert (copy / "my-merged-model/model.safetensors").is_file()
    assert len((copy / "starts").read_text(encoding="utf-8").splitlines()) == 45
    table = in_copy(copy, "cola-ds report runs/low-data --paper low-data").replace("*", "")
    made_up = re.escape("52.00 ±1.58 (5)")
    assert re.search(rf"\| cb \| accuracy \| {made_up} \| {made_up} \[72.76\] \| .* \(5\) \[73.21\] \|", table)
    assert (copy / "runs/low-data/runs.csv").is_file()
    assert (copy / "runs/low-data/figures/loss-cb.png").is_file()


def test_readme_names_what_is_there():
    slurm = (REPOSITORY / "slurm/README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(?:\./)?((?:launch|ds_configs|cola_ds|slurm|tests)/[\w./-]+)[`\s]", README + slurm):
        assert (REPOSITORY / path).exists(), path
    for image in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (REPOSITORY / image).is_file(), image
    for block in blocks("yaml"):
        assert yaml.safe_load(block)


@pytest.mark.quickstart
def test_quickstart_runs(copy):
    """With fewer steps and held-out examples; the whole of it otherwise, the download of the model included."""
    in_copy(copy, "python launch/quickstart_data.py build/quickstart 800 8")
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
        copy, "./launch/setup.sh quickstart && python launch/quickstart_model.py build/SmolLM2-135M-Instruct"
    )
    assert "installing" not in second  # it neither installs nor converts again
    assert stamp.stat().st_mtime_ns == installed
    # The copy was not installed in the place of this repository, whose environment it shares.
    assert in_copy(copy, "cd / && python -c 'import cola_ds; print(cola_ds.__file__)'").startswith(str(REPOSITORY))
    assert (copy / "build/SmolLM2-135M-Instruct/model.safetensors").stat().st_mtime_ns == model


@pytest.mark.quickstart
def test_benchmark_runs(copy):
    """On a toy model; its tables have every row that the README shows."""
    save_sums(save_model(copy / "models/bench") / "sums.jsonl", 40)
    toy = "model.path=models/bench data.train=models/bench/sums.jsonl data.max_length=64"
    shown = in_copy(copy, f"./launch/bench.sh {toy} --knots 1 --pairs 1 --steps 12 --memory-pairs 1")
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in shown.splitlines() if line.startswith("| ")}
    shown_in_readme = README.split("\nknots of ")[1].split("### Stopping")[0]
    names = {line.split("|")[1].strip() for line in shown_in_readme.splitlines() if line.startswith("| ")}
    assert {name.replace("120 steps", "12 steps") for name in names} == set(cells)
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
