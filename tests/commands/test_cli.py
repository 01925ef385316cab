"""The command: what it prints, what it leaves, and how it refuses. Real processes, forked where it does not matter how they
were started; and under the deepspeed launcher."""

import json
import multiprocessing.connection
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch

from tests.support import forked
from tests.support.jobs import Job
from tests.support.toys import REPOSITORY, rows, run_config, save_model, save_run, save_sums, thorough

COMMAND = [sys.executable, "-m", "cola_ds"]


def run(*words, timeout_s=240, **environment):
    """A command with a hard timeout, in an environment without a launcher's variables."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=timeout_s, env=env, cwd=REPOSITORY
    )


def cola_ds(*words, **options):
    """The command, without the seconds of its imports."""
    return run(*forked.shared_command(), *words, **options)


def under_the_launcher(*words):
    begin = time.monotonic()
    done = run("./launch/local.sh", words[0], 2, *words[1:], timeout_s=180)
    return done, time.monotonic() - begin


def under_two_processes(run_file, *overrides):
    """As a launcher does, it kills the other process once one has ended. All that they print is the result's stderr."""
    begin = time.monotonic()
    with Job(run_file.parent / "job", ["train", run_file, *overrides]) as job:
        assert multiprocessing.connection.wait([process.sentinel for process in job.processes], timeout=120), job.text()
        (status, *_) = [process.exitcode for process in job.processes if process.exitcode is not None]
    return subprocess.CompletedProcess([], status, "", job.text()), time.monotonic() - begin


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return save_model(folder / "model"), save_sums(folder / "train.jsonl", 30)


@pytest.fixture
def run_file(toy, tmp_path):
    return save_run(tmp_path / "run.yaml", run_config(*toy, tmp_path / "run", data={"eval": str(toy[1])}))


def test_dry_run_prints_the_resolved_run_and_leaves_nothing(run_file, tmp_path):
    done = cola_ds("train", run_file, "--dry-run", "--processes", 2, "chain.length=3", "lora.rank=[8, 4, 2]")
    assert done.returncode == 0, done.stderr
    for line in (
        "method      cola, 4 target layers",
        "data        30 training examples, 30 held out",
        "batch       8 = 2 examples x 2 micro steps x 2 processes",
        "steps       6 (4 per epoch)",
        "knots       local ties, exact merges",
        "link 1      steps 1-2, LoRA rank 8, 1,792 trainable parameters",  # 2 layers x 8 x (32 + 32 + 32 + 16)
        "link 3      steps 5-6, LoRA rank 2, 448 trainable parameters",
    ):
        assert line in done.stdout
    assert not (tmp_path / "run").exists()
    done = cola_ds("train", run_file, "--dry-run", "chain.length=2", "model.dtype=bf16", "chain.merge=plain")
    assert "local ties, plain merges, 0.0 MiB of host memory for remainders" in done.stdout


def test_a_run_leaves_its_folder(run_file, tmp_path):
    events = tmp_path / "events"
    engine = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text(encoding="utf-8"))
    engine |= {"tensorboard": {"enabled": True, "output_path": str(events), "job_name": "toy"}}
    (tmp_path / "engine.json").write_text(json.dumps(engine), encoding="utf-8")
    before = set(os.listdir("/dev/shm"))
    done, _ = under_the_launcher(run_file, f"deepspeed={tmp_path / 'engine.json'}", "eval.every=link")
    assert done.returncode == 0, done.stderr
    left = {name for name in set(os.listdir("/dev/shm")) - before if "deepspeed" in name}
    deadline = time.monotonic() + 30
    while left & set(os.listdir("/dev/shm")):  # those of another test's run, at the same time, go away
        assert time.monotonic() < deadline, left  # 66 MiB a process
        time.sleep(0.5)
    assert (
        done.stderr.count("knot: link 1 (LoRA rank 4) tied at step 3")
        + done.stdout.count("knot: link 1 (LoRA rank 4) tied at step 3")
        == 1
    )
    assert f"done: {tmp_path / 'run'}" in done.stdout

    folder = tmp_path / "run"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "run.json", "run.yaml", "environment.json", "deepspeed.json", "metrics.jsonl", "evals.jsonl", "knots.jsonl",
        "result.json", "events.jsonl", "log.txt",
        "checkpoints/latest", "checkpoints/best", "checkpoints/step-00000006/manifest.json",
        "checkpoints/step-00000006/state.json", "checkpoints/step-00000006/random.safetensors",
        "checkpoints/step-00000006/trained-00001.safetensors", "checkpoints/step-00000006/link-0001.safetensors",
        "checkpoints/step-00000003/manifest.json", "checkpoints/step-00000003/state.json",
        "checkpoints/step-00000003/random.safetensors", "checkpoints/step-00000003/trained-00001.safetensors",
        "checkpoints/step-00000003/link-0001.safetensors",
        "chain/link-0001/adapter_config.json", "chain/link-0001/adapter_model.safetensors",
        "chain/link-0002/adapter_config.json", "chain/link-0002/adapter_model.safetensors",
    }  # fmt: skip
    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert [row["link"] for row in metrics] == [1, 1, 1, 2, 2, 2]
    assert set(metrics[0]) >= {"step", "link", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_s"}
    assert metrics[0]["lr"] == pytest.approx(2e-3)
    assert metrics[3]["lr"] == pytest.approx(1e-3)  # the schedule runs over the chain: half way at the knot
    knots = rows(folder / "knots.jsonl")
    assert [(row["link"], row["step"], row["lora_rank"]) for row in knots] == [(1, 3, 4), (2, 6, 4)]
    assert set(knots[0]) == {
        "link", "step", "lora_rank", "delta_norm", "rounding_error", "loss_before", "loss_after", "tie_s", "rebuild_s",
        "bytes_moved", "peak_memory_bytes",
    }  # fmt: skip
    assert knots[0]["rebuild_s"] > 0
    assert knots[1]["rebuild_s"] is None  # the last knot ties and does not extend
    evaluations = rows(folder / "evals.jsonl")
    assert [row["step"] for row in evaluations] == [3, 6]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert environment["world_size"] == 2
    assert environment["packages"]["torch"] == torch.__version__
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["scores"]["loss"] == evaluations[-1]["loss"]
    assert (result["method"], result["seed"], result["steps"], result["links"]) == ("cola", 0, 6, 2)
    assert result["remainder_bytes"] == 0  # fp32
    assert result["tokens"] == sum(row["tokens"] for row in metrics)
    assert min(result["peak_memory_bytes"], result["training_flops"], result["wall_time_s"]) > 0
    check_monitor(events, metrics)

    again = cola_ds("train", run_file, f"deepspeed={tmp_path / 'engine.json'}", "eval.every=link")
    assert again.returncode == 0, again.stderr
    assert f"this run is finished already: {tmp_path / 'run'}" in again.stdout
    assert rows(folder / "metrics.jsonl") == metrics
    check_report(folder, tmp_path / "loss.png")


def check_monitor(events, metrics):
    """TensorBoard got the chain's steps, not those of the engines, which begin anew at each knot."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in events.rglob("events.*")}
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    found = [(event.step, event.value) for event in accumulator.Scalars("Train/loss")]
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in metrics]


def check_report(folder, picture):
    done = cola_ds("report", folder, "--plot", picture)
    assert done.returncode == 0, done.stderr
    loss = json.loads((folder / "result.json").read_text(encoding="utf-8"))["scores"]["loss"]
    assert f"| run | cola | 2 | 6 | {loss:.4f} |" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_alone_and_as_the_installed_command(run_file, tmp_path):
    done = run("cola-ds", "train", run_file, "--fresh", "method=zero-shot", "chain.length=1")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert (result["method"], result["steps"], result["training_flops"]) == ("zero-shot", 0, 0)
    assert result["scores"]["examples"] == 30
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_every_export_is_the_same_model(run_file, tmp_path, toy):
    """The merged model; the chain as one adapter, as PEFT applies it; its links, as PEFT merges one after another."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = cola_ds("train", run_file, "chain.length=2", "lora.rank=[8,4]", "optim.lr=1e-2")
    assert done.returncode == 0, done.stderr
    for form, name in (("hf", "merged"), ("peft", "adapter"), ("links", "links")):
        done = cola_ds("export", tmp_path / "run", "--to", form, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base, chain = (AutoModelForCausalLM.from_pretrained(toy[0]) for _ in range(2))
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy[0]), tmp_path / "adapter").eval()
    assert adapter.peft_config["default"].r == 8 + 4
    assert [path.name for path in sorted((tmp_path / "links").iterdir())] == ["link-0001", "link-0002"]
    for path in sorted((tmp_path / "links").iterdir()):
        chain = PeftModel.from_pretrained(chain, path).merge_and_unload()
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        for model in (adapter, chain):
            torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-3)

    again = cola_ds("export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "merged")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "already exists; name a new folder" in again.stderr


BAD_INPUT = {
    "unknown key": (["lora.rnk=8"], "unknown key lora.rnk; did you mean lora.rank?"),
    "lora rank 0": (["lora.rank=0"], "lora.rank must be a whole number of at least 1"),
    "lr as text": (["optim.lr='1e-3'"], "optim.lr must be a number; it is '1e-3'"),
    "knots out of order": (["chain.length=3", "chain.knots={steps: [4, 2]}"], "chain.knots are out of order"),
    "knots past the end": (["chain.knots={steps: [6]}"], "step 6 is at or past the end of the run, which has 6 steps"),
    "batch that does not divide": (
        ["optim.global_batch_size=7"],
        "optim.global_batch_size 7 does not divide into micro batches of 2 on",
    ),
    "missing model": (["model.path=/no/such/model"], "model.path /no/such/model is not a folder"),
    "model that the hub lacks": (
        ["model.path=no-such/model"],
        "model.path no-such/model: is not a folder here, and the hub",
    ),
    "target that matches nothing": (
        ["lora.targets=[q_prj]"],
        "lora.targets q_prj matches no layer; this model's linear layers",
    ),
    "missing data": (["data.train=none.jsonl"], "data.train none.jsonl is not a file"),
    "missing column": (["data.completion=answer"], "has no column answer; it has prompt, completion"),
    "prompts longer than the model": (
        ["data.max_length=500"],
        "data.max_length 500 is more than the model's 128 positions",
    ),
    "missing engine file": (["deepspeed=none.json"], "cannot read the DeepSpeed JSON none.json"),
}


@pytest.fixture
def bad_input(tmp_path):
    """Every case as overrides and the message they must give."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "stage.json").write_text('{"zero_optimization": {"stage": 0}}', encoding="utf-8")
    (tmp_path / "batch.json").write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": 3}', encoding="utf-8")
    return BAD_INPUT | {
        "empty data": ([f"data.train={tmp_path / 'empty.jsonl'}"], "empty.jsonl is empty: it needs at least one row"),
        "stage 0": (
            [f"deepspeed={tmp_path / 'stage.json'}"],
            "zero_optimization.stage is 0; a chain runs at stage 2 or 3",
        ),
        "batch size": (
            [f"deepspeed={tmp_path / 'batch.json'}"],
            "train_batch_size 3 contradicts optim.global_batch_size 8",
        ),
    }


CASES = [*BAD_INPUT, "empty data", "stage 0", "batch size"]


def said_in_one_line(stderr, message):
    said = [line for line in stderr.splitlines() if line.startswith("cola-ds: ")]
    return len(said) == 1 and message in said[0] and "Traceback" not in stderr


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_status_2(run_file, tmp_path, bad_input, case, capfd, monkeypatch):
    from cola_ds.cli import main

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # alone; and what the command sets is undone
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # read as it was imported; a hub takes its time
    monkeypatch.setattr("cola_ds.distributed.signals.listen", lambda *args: None)  # this process keeps its own handlers
    overrides, message = bad_input[case]
    assert main(["train", str(run_file), *overrides]) == 2
    stderr = capfd.readouterr().err
    assert said_in_one_line(stderr, message), stderr
    assert not (tmp_path / "run").exists()  # nothing is left half-written


# The hub takes its time to be asked, 40 s of it.
@pytest.mark.parametrize("case", thorough([case for case in CASES if "hub" not in case], ["model that the hub lacks"]))
def test_bad_input_under_two_processes(run_file, tmp_path, bad_input, case):
    overrides, message = bad_input[case]
    start = under_the_launcher if case == "target that matches nothing" else under_two_processes
    done, seconds = start(run_file, *overrides)
    assert done.returncode == 2, done.stderr
    assert said_in_one_line(done.stderr, message), done.stderr  # from one process
    assert seconds < 60  # no hang
    assert not (tmp_path / "run").exists()


def test_what_deepspeed_itself_refuses_is_one_line_too(run_file, tmp_path):
    (tmp_path / "engine.json").write_text(
        '{"zero_optimization": {"stage": 3, "reduce_buket_size": 5}}', encoding="utf-8"
    )
    done, seconds = under_two_processes(run_file, f"deepspeed={tmp_path / 'engine.json'}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("engine.json: DeepSpeed refuses reduce_buket_size 5: ") == 1
    assert "Traceback" not in done.stderr
    assert seconds < 60
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["truncated", "incomplete", "other shapes"])
def test_damaged_weights_are_one_line_too(run_file, tmp_path, toy, damage):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(toy[0], tmp_path / "damaged")
    weights = model / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        tensors = load_file(weights)
        name = "model.layers.1.mlp.up_proj.weight"
        tensor = tensors.pop(name)
        save_file(
            tensors if damage == "incomplete" else tensors | {name: tensor[:3].clone()},
            weights,
            metadata={"format": "pt"},
        )
    done, seconds = under_two_processes(run_file, f"model.path={model}")
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("cola-ds: ")]
    assert len(said) == 1
    assert str(model) in said[0]
    assert "Traceback" not in done.stderr
    assert seconds < 60
    assert not (tmp_path / "run").exists()


def test_run_folders_that_cannot_be(run_file, tmp_path, toy):
    (tmp_path / "file").touch()
    for folder, message in (
        (tmp_path / "file", "is not a folder"),
        (toy[0].parent, "which the run reads; name a folder of its own"),
    ):
        done = cola_ds("train", run_file, "--fresh", f"run.dir={folder}")
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert (toy[0] / "config.json").is_file()  # --fresh removed nothing of the reader's
    (tmp_path / "mine/model").mkdir(parents=True)
    done = cola_ds("train", run_file, "--fresh", f"run.dir={tmp_path / 'mine'}")
    assert (done.returncode, "holds model, but no run left it there" in done.stderr) == (2, True), done.stderr
    assert (tmp_path / "mine/model").is_dir()


def test_a_folder_that_holds_a_run_under_two_processes(run_file, tmp_path):
    """Process 0 alone looks at the folder: the other one must not wait for it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text("{}", encoding="utf-8")
    done, seconds = under_two_processes(run_file)
    assert done.returncode == 2
    assert done.stderr.count("holds result.json, but no run left it there") == 1
    assert seconds < 60


def test_a_mistake_of_one_process_alone_names_it(run_file, toy):
    """As when a file is missing on one node: process 0 goes on, process 1 says who it is."""
    script = 'if [ "$RANK" = 1 ]; then exec "$@" data.train=gone.jsonl; else exec "$@"; fi'
    words = [*COMMAND, "train", str(run_file)]
    done = run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python",
        "bash", "-c", script, "bash", *words,
    )  # fmt: skip
    assert done.returncode != 0
    assert "data.train gone.jsonl is not a file" in done.stderr
    assert "(process 1 on " in done.stderr


def test_a_port_that_is_taken(run_file, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = cola_ds("train", run_file, **launched)
    assert done.returncode == 2, done.stderr
    assert said_in_one_line(
        done.stderr, f"MASTER_PORT {port} on {socket.gethostname()}: Address already in use; set another"
    )
    assert not (tmp_path / "run").exists()


def test_training_that_fails_is_status_3(run_file, tmp_path):
    # On some processors a norm makes zeros of what is merely large: alpha has the products overflow for certain.
    words = ["optim.name=sgd", "optim.lr=1e38", "lora.alpha=1e38", "optim.max_grad_norm=null"]
    done = cola_ds("train", run_file, *words)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("cola-ds: training failed: ") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/chain/link-0002").exists()
    assert not (tmp_path / "run/result.json").exists()


def test_export_and_report_of_what_is_no_run(tmp_path):
    for words in (["export", tmp_path, "--to", "hf", "--out", tmp_path / "o"], ["report", tmp_path]):
        done = cola_ds(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert str(tmp_path) in done.stderr


def test_a_dtype_that_the_accelerator_lacks(run_file, tmp_path):
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        done = cola_ds("train", run_file, "model.dtype=fp16")
        assert done.returncode == 0, done.stderr
        return
    done = cola_ds("train", run_file, "model.dtype=fp16")
    assert done.returncode == 2
    assert "model.dtype fp16 is not supported on cpu; use fp32, bf16" in done.stderr
    assert not (tmp_path / "run").exists()
