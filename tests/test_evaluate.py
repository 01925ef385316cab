"""Held-out loss: each example once, the same at every world size, and what transformers itself computes. `cola-ds evaluate`: a
model, or what a run has learnt."""

import hashlib
import json
import math

import pytest
import torch

from tests.distributed import run_distributed
from tests.runs import three_links, train_in
from tests.test_chain import make_chain
from tests.test_cli import cola_ds
from tests.toys import run_config, save_model, save_run, save_sums


def evaluate_here(process, path):
    from cola_ds.evaluate import held_out_loss

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
    from tests.toys import rows

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
    from cola_ds import zero

    chain, found = make_chain(process, path), {}
    for name, param in chain.engine.module.named_parameters():
        with zero.gathered([param]):
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

    from cola_ds.export import export

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
        ([tmp_path / "unfinished"], "has no result.json: the run has not finished"),
        ([tmp_path / "run", f"model.path={model}"], "belongs to another base model"),
        ([tmp_path / "run", "method=cola"], "method cola contradicts model.links"),
        ([tmp_path / "nothing/here/at/all"], "is not a folder, and cannot be a name on the Hugging Face hub"),
    ):
        done = cola_ds("evaluate", *words, *task, "--out", tmp_path / "never")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr
    assert not (tmp_path / "never").exists()
