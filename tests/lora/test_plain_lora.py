"""A chain of length 1 is plain LoRA, but for the order of its sums: against PEFT, and against the reference."""

import pytest
import torch
from safetensors.torch import load_file

from cola_ds.config.loading import load_config
from tests.support.distributed import process_group, run_distributed
from tests.support.reference import chain_of_lora
from tests.support.toys import rows, run_config, save_model, save_run, save_sums
from tests.training.test_chain import ENGINES

STEPS = 12


def run_here(process, path):
    from cola_ds.checkpoint.decide import ResumeOptions
    from cola_ds.training.prepare import prepare
    from cola_ds.training.run import run_prepared as train

    process_group(process)
    train(prepare(load_config(path), process.world_size), process, ResumeOptions())


def peft_here(process, path):
    """The same run with PEFT's LoRA and torch's AdamW.

    Under ZeRO-3 in an engine of its own, at stage 2 without any, as a plain loop. Padded, and with PyTorch's own loss.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from cola_ds.config.deepspeed_json import complete
    from cola_ds.data.batcher import Batcher
    from cola_ds.distributed.engine import build_engine
    from cola_ds.distributed.loading import load_model
    from cola_ds.distributed.shards import gathered
    from cola_ds.evaluation.loss import loss_sum
    from cola_ds.lora.layers import draw_lora_A
    from cola_ds.training.prepare import prepare

    config = load_config(path)
    prepared = prepare(config, process.world_size)
    engine_config = complete(prepared.engine_json, config, prepared.step_plan)
    sharded = engine_config["zero_optimization"]["stage"] == 3
    process_group(process)
    base = (
        load_model(config.model, engine_config) if sharded else AutoModelForCausalLM.from_pretrained(config.model.path)
    )
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name in prepared.targets:
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = draw_lora_A(0, 1, name, (4, layer.in_features))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=config.optim.lr, weight_decay=0.0
    )
    engine = build_engine(base, engine_config, lambda params: optimizer) if sharded else None
    batcher = Batcher(prepared.train, process.rank, process.world_size)
    for step in range(STEPS):
        examples = batcher.step(step, 0, 8, 8 // process.world_size)
        loss = loss_sum(engine or base, examples.micro_batches[0]) / examples.loss_tokens
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * (1.0 - step / STEPS)
        if engine:
            engine.backward(loss * process.world_size)
            engine.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weights = {}
    for name in prepared.targets:
        layer = model.base_model.model.get_submodule(name)
        for half in ("lora_A", "lora_B"):
            weight = getattr(layer, half)["default"].weight
            with gathered([weight]):
                weights[f"base_model.model.{name}.{half}.weight"] = weight.detach().clone()
    return weights


def reference_here(process, config):
    """In a process with one thread, as the run's: sums split over threads have other last bits."""
    losses, merged = chain_of_lora(config, (STEPS,))
    return losses, merged.state_dict()


@pytest.mark.parametrize(("engine", "world_size"), [("zero3", 1), ("zero3", 2), ("zero2", 1)])
def test_length_one_is_plain_lora(tmp_path, engine, world_size):
    model, data = save_model(tmp_path / "model"), save_sums(tmp_path / "train.jsonl", 40)
    config = run_config(
        model, data, tmp_path / "run", method="lora", chain={"length": 1},
        deepspeed=ENGINES[engine],
        optim={"name": "adamw", "lr": 5e-3, "max_steps": STEPS, "micro_batch_size": 8 // world_size, "max_grad_norm": None},
    )  # fmt: skip
    path = save_run(tmp_path / "run.yaml", config)
    run_distributed(run_here, world_size, path)
    link = load_file(tmp_path / "run/chain/link-0001/adapter_model.safetensors")
    peft = run_distributed(peft_here, world_size, path)[0]
    assert link.keys() == peft.keys()
    for name, tensor in link.items():
        torch.testing.assert_close(tensor, peft[name], rtol=1e-4, atol=2e-6, msg=name)
    assert all(tensor.abs().max() > 1e-3 for name, tensor in link.items() if "lora_B" in name)

    ((losses, merged),) = run_distributed(reference_here, 1, config)
    found = [row["loss"] for row in rows(tmp_path / "run/metrics.jsonl")]
    assert found == pytest.approx(losses, rel=1e-6)
    base = load_file(model / "model.safetensors")
    for name, tensor in merged.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in link:
            assert torch.equal(tensor, base[name])
            continue
        expected = base[name] + 2.0 * (link[f"{key}.lora_B.weight"] @ link[f"{key}.lora_A.weight"])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
