"""A chain of length 1 is plain LoRA, bit for bit: against PEFT under a plain torch loop, and against the reference."""

import pytest
import torch
from safetensors.torch import load_file

from cola_ds.config import load_config
from tests.distributed import run_distributed
from tests.reference import chain_of_lora
from tests.toys import REPOSITORY, rows, run_config, save_model, save_run, save_sums

STEPS = 12


def run_here(process, path):
    from cola_ds.prepare import prepare
    from cola_ds.train import train

    train(prepare(load_config(path), process.world_size), process, fresh=False)


def peft_here(process, path):
    """The same run with PEFT's LoRA on transformers' model, torch's AdamW and its clipping; no engine."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from cola_ds.data.batching import Batcher
    from cola_ds.evaluate import loss_sum
    from cola_ds.lora import draw_lora_A
    from cola_ds.prepare import prepare

    config = load_config(path)
    prepared = prepare(config, 1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(config.model.path),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )
    for name in prepared.targets:
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = draw_lora_A(0, 1, name, (4, layer.in_features))
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.optim.lr, weight_decay=0.0)
    batcher, losses = Batcher(prepared.train, 0, 1, 0), []
    for step in range(STEPS):
        examples = batcher.step(step, 0, 8, 8)
        loss = loss_sum(model.base_model.model, examples.micro_batches[0]) / examples.loss_tokens
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * (1.0 - step / STEPS)
        optimizer.step()
        losses.append(loss.item())
    weights = {}
    for name in prepared.targets:
        layer = model.base_model.model.get_submodule(name)
        for half in ("lora_A", "lora_B"):
            weights[f"base_model.model.{name}.{half}.weight"] = getattr(layer, half)["default"].weight.detach()
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize("engine", ["zero3", "zero2"])
def test_length_one_is_plain_lora_bit_for_bit(tmp_path, engine):
    model, data = save_model(tmp_path / "model"), save_sums(tmp_path / "train.jsonl", 40)
    config = run_config(
        model, data, tmp_path / "run", method="lora", chain={"length": 1}, deepspeed=str(REPOSITORY / f"ds_configs/{engine}.json"),
        optim={"name": "adamw", "lr": 5e-3, "max_steps": STEPS, "micro_batch_size": 8, "max_grad_norm": None},
    )  # fmt: skip
    path = save_run(tmp_path / "run.yaml", config)
    run_distributed(run_here, 1, path)
    losses = [row["loss"] for row in rows(tmp_path / "run/metrics.jsonl")]
    link = load_file(tmp_path / "run/chain/link-0001/adapter_model.safetensors")

    (peft,) = run_distributed(peft_here, 1, path)
    assert losses == peft["losses"]
    assert link.keys() == peft["weights"].keys()
    for name, tensor in link.items():
        assert torch.equal(tensor, peft["weights"][name]), name
    assert all(tensor.abs().max() > 1e-3 for name, tensor in link.items() if "lora_B" in name)

    # The reference computes the loss on all positions; the logits, and so the weights, are the same.
    config["optim"]["max_grad_norm"] = 1e9
    reference_losses, merged = chain_of_lora(config, (STEPS,))
    assert losses == pytest.approx(reference_losses, rel=1e-6)
    base = load_file(model / "model.safetensors")
    for name, tensor in merged.state_dict().items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in link:
            expected = base[name] + 2.0 * (link[f"{key}.lora_B.weight"] @ link[f"{key}.lora_A.weight"])
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor, base[name])
