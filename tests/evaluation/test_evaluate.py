"""Held-out loss: each example once, the same at every world size, and what transformers itself computes. `cola-ds evaluate`: a
model, or what a run has learnt."""

import hashlib
import json
import math

import pytest
import torch

from cola_ds.commands.evaluate import evaluation_config
from cola_ds.config.schema import ModelConfig
from cola_ds.errors import UserError
from cola_ds.run.fingerprint import model_fingerprint
from tests.commands.test_cli import cola_ds
from tests.support.distributed import run_distributed
from tests.support.jobs import run_job
from tests.support.recorded import recorded
from tests.support.runs import three_links, train_in
from tests.support.toys import rows, run_config, save_model, save_run, save_sums
from tests.training.test_chain import make_chain
from tests.training.test_task_runs import reviews, task_run


def evaluate_here(process, path):
    from cola_ds.evaluation.evaluators import held_out_loss

    chain = make_chain(process, path)
    found = held_out_loss(chain.engine, chain.held_out, chain.config.eval.batch_size, lambda: False)
    return {"loss": found.loss, "perplexity": found.perplexity, "examples": found.examples, "tokens": found.loss_tokens}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("text", [False, True])
def test_held_out_loss_is_right_at_every_world_size(tmp_path, batch_size, text):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_model(tmp_path / "model")
    data = save_sums(tmp_path / "dev.jsonl", 13)  # no multiple of any batch
    options = {"eval": str(data)} | ({"text": "completion"} if text else {})
    config = run_config(model, data, tmp_path / "run", data=options, eval={"batch_size": batch_size})
    path = save_run(tmp_path / "run.yaml", config)

    # One example at a time, with transformers' own loss.

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    total, count = 0.0, 0
    for row in rows(data):
        prompt = [1] if text else tokenizer(row["prompt"]).input_ids
        answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, 2]
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += plain(ids, labels=labels).loss.item() * len(answer)
        count += len(answer)
    for world_size in (1, 2, 4):
        for found in run_distributed(evaluate_here, world_size, path):
            assert found["examples"] == 13
            assert found["tokens"] == count
            assert found["loss"] == pytest.approx(total / count, rel=1e-5)
            assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


# -- cola-ds evaluate --------------------------------------------------------------------------------------------------

QUESTIONS = """
prompt: "{prompt}"
answer: "{completion}"
generate: true
metric: accuracy
"""


@pytest.fixture
def task(toy, tmp_path):
    """The additions as a task; its validation split is what the runs held out."""
    for split, path in (("train", toy[1]), ("validation", toy[2])):
        (tmp_path / f"{split}.jsonl").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "sums.yaml").write_text(QUESTIONS, encoding="utf-8")
    return [
        "--task", tmp_path / "sums.yaml", "--dir", tmp_path,
        "data.num_train=2", "data.num_dev=2", "data.num_test=4", "data.max_length=64",
    ]  # fmt: skip


def base_weights(process, path):
    """SHA-256 of every parameter but A and B, once the model is as it is evaluated."""
    from cola_ds.distributed.shards import gathered

    chain, found = make_chain(process, path), {}
    for name, param in chain.engine.module.named_parameters():
        with gathered([param]):
            bits = param.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        if "lora_" not in name:
            found[name] = hashlib.sha256(bits).hexdigest()
        elif "lora_B" in name:
            assert not any(bits)
    return found


def config_of(folder, **changes):
    """A run's config on held-out data alone, with the links of the run in `folder`."""
    import yaml

    config = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    config = {key: config[key] for key in ("model", "data", "optim", "deepspeed")} | {"method": "zero-shot", **changes}
    config["model"] = {**config["model"], "links": str(folder / "run")}
    return config | {"run": {"dir": str(folder / "evaluation")}}


@pytest.mark.parametrize("variant", ["bf16 exact", "bf16 plain", "ended early, biases"])
def test_what_a_run_has_learnt_is_its_export_to_the_last_bit(toy, tmp_path, variant):
    from safetensors.torch import load_file

    from cola_ds.commands.export import export

    options = {"model": {"dtype": "bf16"}, "chain": {"length": 3, "merge": variant.split()[-1]}, "optim": {"lr": 2e-2}}
    if variant.startswith("ended"):
        model = save_model(tmp_path / "model", "opt")
        options = {"lora": {"bias": "lora_only"}, "optim": {"lr": 0.3}, "eval": {"every": 3, "patience": 1}}
        toy = (model, *toy[1:])
    train_in(tmp_path, three_links(toy, **options))
    exported = load_file(export(tmp_path / "run", "hf", tmp_path / "merged") / "model.safetensors")
    expected = {name: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in exported.items()}
    for found in run_distributed(base_weights, 2, save_run(tmp_path / "evaluation.yaml", config_of(tmp_path))):
        assert expected.items() <= found.items()
        assert len(found) - len(expected) <= 1  # a tied head
    base = load_file(toy[0] / "model.safetensors")
    changed = [name for name, tensor in exported.items() if not torch.equal(tensor, base[name].to(tensor.dtype))]
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


def test_evaluate_takes_a_run_and_a_model(toy, tmp_path, task):
    train_in(tmp_path, three_links(toy, optim={"lr": 2e-2}), 1)
    model = save_model(tmp_path / "model", intermediate_size=40)
    for target, out in ((tmp_path / "run", "of-run"), (model, "of-model")):
        done = cola_ds("evaluate", target, *task, "--out", tmp_path / out, "model.dtype=fp32")
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / out / "result.json").read_text(encoding="utf-8"))
        assert (result["method"], result["task"], result["scores"]["test_examples"]) == ("zero-shot", "sums", 4)
        assert "test at step 0: accuracy" in done.stdout
        assert "steps" not in done.stdout.split("run folder")[0]
    again = cola_ds("evaluate", tmp_path / "run", *task, "--out", tmp_path / "of-run", "model.dtype=fp32")
    assert f"links       those of {tmp_path / 'run'}" in again.stdout
    assert "this run is finished already" in again.stdout

    # What is wrong is said in one line.
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/run.yaml").write_bytes((tmp_path / "run/run.yaml").read_bytes())
    for words, message in (
        ([tmp_path / "unfinished"], "unfinished is no run's folder: it has no run.json"),
        ([tmp_path / "run", f"model.path={model}"], "belongs to another base model"),
        ([tmp_path / "run", "method=cola"], "method cola trains: an evaluation's is zero-shot or icl"),
        ([tmp_path / "nothing/here/at/all"], "is not a folder, and cannot be a name on the Hugging Face hub"),
    ):
        done = cola_ds("evaluate", *words, *task, "--out", tmp_path / "never")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr
    assert not (tmp_path / "never").exists()


def said_by(*words):
    """The exit status of `cola-ds`, and the line on stderr."""
    done = cola_ds(*words)
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    return done.returncode, done.stderr


def test_a_run_is_evaluated_on_its_own_dev_and_test(tmp_path):
    """Other rows than those that it learnt from, and cut off alike; unless the command says otherwise."""
    model = save_model(tmp_path / "model")
    config = task_run(model, tmp_path, "sst2", reviews(6), reviews(2), data={"max_length": 40}, run={"seed": 3})
    config["data"] |= {"task": "sst2", "dir": str(tmp_path / "sst2"), "num_train": 20, "num_dev": 9, "num_test": 7}
    config["optim"]["epochs"] = 1
    train_in(tmp_path, config, 1)
    words = ["evaluate", tmp_path / "run", "--task", "sst2", "--dir", tmp_path / "sst2"]
    for name, more in (("same", []), ("other", ["run.seed=4"])):
        assert said_by(*words, "--out", tmp_path / name, *more) == (0, "")
    run, same, other = (
        json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))["facts"]["identity"]["eval"]
        for name in ("run", "same", "other")
    )
    assert run == same != other


def test_a_run_is_evaluated_on_its_own_revision_of_the_hubs_data(tmp_path):
    """But another task is another dataset, and a folder has none."""
    config = run_config(tmp_path / "model", tmp_path / "x", tmp_path / "run")
    config["data"] = {"task": "rte", "revision": "abc", "num_dev": 9}
    (tmp_path / "run").mkdir()
    save_run(tmp_path / "run/run.yaml", config)
    (tmp_path / "run/result.json").write_text("{}", encoding="utf-8")
    recorded(tmp_path / "run")
    found = {
        (task, folder): evaluation_config(str(tmp_path / "run"), "zero-shot", task, folder, None, 1, []).data
        for task, folder in (("rte", None), ("rte", "rows"), ("cb", None))
    }
    assert [data.num_dev for data in found.values()] == [9, 9, 9]
    assert [data.revision for data in found.values()] == ["abc", None, None]


def test_weights_that_are_not_beside_the_config_have_no_fingerprint(tmp_path):
    model = save_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"model has no safetensors beside its config.json; save it as such in a folder"
    ):
        model_fingerprint(ModelConfig(path=str(model)))


def test_a_finished_run_does_not_answer_for_another_model(toy, tmp_path, task):
    """Of other weights, or of the same folder with other links; wherever the same one lies, it does."""
    common = [*task, "--out", tmp_path / "out"]
    first, second = save_model(tmp_path / "a/merged"), save_model(tmp_path / "b/merged", intermediate_size=40)
    assert said_by("evaluate", first, *common) == (0, "")
    before = (tmp_path / "out/result.json").read_bytes()
    status, line = said_by("evaluate", second, *common)
    assert status == 2
    assert f"model.path {second} is not the base model of the run that has finished in {tmp_path / 'out'}" in line
    assert (tmp_path / "out/result.json").read_bytes() == before
    first.rename(tmp_path / "moved")
    assert said_by("evaluate", tmp_path / "moved", *common) == (0, "")

    run = three_links(toy)
    train_in(tmp_path, run, 1)
    common = ["evaluate", tmp_path / "run", *task, "--out", tmp_path / "of-run"]
    assert said_by(*common) == (0, "")
    train_in(tmp_path, {**run, "optim": {**run["optim"], "lr": 2e-2}}, 1, words={"fresh": True})
    status, line = said_by(*common)
    assert status == 2
    assert f"model.links {tmp_path / 'run'} has other links than when the run in {tmp_path / 'of-run'} was" in line
    assert said_by(*common, "--fresh") == (0, "")


def test_the_default_folder_is_of_the_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/seed=0").mkdir(parents=True)
    names = {"a/seed=0": "a-seed-0", f"{tmp_path}/a/seed=0": "a-seed-0", "org/model": "org-model", ".": tmp_path.name}
    for target, name in names.items():
        folder = evaluation_config(target, "icl", "cb", None, None, 1, []).run.dir
        assert folder.startswith("runs/evaluate/")
        assert folder.endswith(f"{name}/cb-icl")


@pytest.mark.parametrize("text", [QUESTIONS, 'prompt: "{prompt}"\ncandidates: ["1", "2 3"]\nlabel: gold\n'])
def test_outputs_that_are_not_finite_have_no_score(toy, tmp_path, task, text):
    """The first candidate would win, or the first word."""
    from safetensors.torch import load_file, save_file

    (tmp_path / "sums.yaml").write_text(text, encoding="utf-8")
    for split in ("train", "validation"):
        lines = [json.dumps({**row, "gold": 0}) for row in rows(tmp_path / f"{split}.jsonl")]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = save_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = cola_ds("evaluate", model, *task, "--out", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert "cola-ds: training failed: the model's outputs are not finite on 2 of 2 dev examples" in done.stderr
    assert not (tmp_path / "out/result.json").exists()


# -- from other folders ------------------------------------------------------------------------------------------------


def test_a_run_is_used_from_another_folder(toy, tmp_path, task, monkeypatch, capsys):
    """Started with relative paths in one folder, and moved, it is evaluated, exported and looked at in another; so is a model
    with the default DeepSpeed JSON."""
    from cola_ds.cli import main

    here, there = tmp_path / "here", tmp_path / "there"
    (here / "configs").mkdir(parents=True)
    there.mkdir()
    (here / "model").symlink_to(toy[0])
    (here / "train.jsonl").write_bytes(toy[1].read_bytes())
    (here / "configs/engine.json").write_text(
        json.dumps(
            {"zero_optimization": {"stage": 2}, "csv_monitor": {"enabled": True, "output_path": str(here / "csv")}}
        ),
        encoding="utf-8",
    )
    config = run_config("model", "train.jsonl", "runs/a", deepspeed="configs/engine.json", optim={"max_steps": 2})
    save_run(here / "run.yaml", config)
    statuses, said = run_job(
        tmp_path / "train", ["train", "run.yaml"], world_size=1, sabotage=work_in, arguments=(here,)
    )
    assert statuses == [0], said
    (here / "runs/a").rename(there / "moved")
    (here / "configs/engine.json").unlink()
    for target, stage in (("moved", 2), (str(toy[0]), "auto")):
        words = ["evaluate", target, *task, "--out", "out", "--fresh", "model.dtype=fp32"]
        statuses, said = run_job(tmp_path / "evaluate", words, world_size=1, sabotage=work_in, arguments=(there,))
        assert statuses == [0], said
        kept = json.loads((there / "out/deepspeed.json").read_text(encoding="utf-8"))
        assert kept["zero_optimization"]["stage"] == stage
        assert "csv_monitor" not in kept
    monkeypatch.chdir(there)
    for words in (["inspect", "moved"], ["report", "moved"], ["export", "moved", "--to", "peft", "--out", "adapter"]):
        assert main(words) == 0, capsys.readouterr().err
    words = ["train", here / "run.yaml", f"data.train={here / 'train.jsonl'}", f"model.path={toy[0]}", "run.dir=moved"]
    statuses, said = run_job(
        tmp_path / "again",
        [*words, "deepspeed=moved/deepspeed.json"],
        world_size=1,
        sabotage=work_in,
        arguments=(there,),
    )
    assert (statuses, "this run is finished already: moved" in said) == ([0], True), said


def work_in(rank, folder):
    import os

    os.chdir(folder)
