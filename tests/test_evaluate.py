"""Held-out loss: each example once, the same at every world size, and what transformers itself computes."""

import math

import pytest
import torch

from tests.distributed import run_distributed
from tests.test_chain import make_chain
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
