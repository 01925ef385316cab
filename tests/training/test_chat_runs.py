"""Runs on conversations, from rows to an export that answers in the same form."""

import json
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.toys import REPOSITORY, rows, run_config, save_run

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def cola_ds(*words):
    done = subprocess.run(
        [sys.executable, "-m", "cola_ds", *map(str, words)], capture_output=True, text=True, timeout=240, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_chat_model_is_trained_and_taken_away(toy, tmp_path):
    talks = [
        {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]}
        for a in range(8)
        for b in range(5)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks), encoding="utf-8")
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    data = {
        "chat_template": str(tmp_path / "chat.jinja"), "eval_fraction": 0.1, "max_length": 64, "packing": "best_fit",
    }  # fmt: skip
    optim = {"global_batch_size": 2, "micro_batch_size": 2, "max_steps": 4}
    config = run_config(toy[0], tmp_path / "train.jsonl", tmp_path / "run", data=data, optim=optim)
    cola_ds("train", save_run(tmp_path / "run.yaml", config))
    said = cola_ds("export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "out")
    assert "wrote" in said
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE

    # What the run found on its held-out conversations is what plain Transformers finds with the export.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    held_out = _held_out(config, tokenizer)
    assert len(held_out) == 4
    total = count = 0
    for messages in held_out:
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=True)["input_ids"]
        whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].float().log_softmax(dim=-1)
        places = range(len(prompt), len(whole))
        total -= sum(float(logits[place - 1, whole[place]]) for place in places)
        count += len(places)
    (found,) = [row["loss"] for row in rows(tmp_path / "run/evals.jsonl")][-1:]
    assert abs(found - total / count) < 1e-4


def _held_out(config, tokenizer):
    """The conversations that the run has held out, read back from their ids."""
    from cola_ds.config.schema import DataConfig
    from tests.support.data import load_splits

    train, held_out = load_splits(DataConfig(**config["data"]), tokenizer)
    texts = [tokenizer.decode(held_out.example(index)[0]) for index in range(len(held_out))]
    assert not set(texts) & {tokenizer.decode(train.example(index)[0]) for index in range(len(train))}
    return [
        [
            {"role": "user", "content": text.split("user: ")[1].split("</s>")[0]},
            {"role": "assistant", "content": text.split("assistant: ")[1].split("</s>")[0]},
        ]
        for text in texts
    ]
