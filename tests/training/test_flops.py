"""Training FLOPs: the estimate of Hugging Face's trainer, and the count of DeepSpeed's profiler."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cola_ds.config.loading import load_config
from cola_ds.training.prepare import prepare
from tests.support.toys import run_config, save_run

TOKENS = [1000, 700, 0]


def prepared(toy, tmp_path, **sections):
    model, train, _ = toy
    options = {"lora": {"rank": [8, 4]}, "chain": {"length": 2}, "optim": {"micro_batch_size": 1}, **sections}
    return prepare(load_config(save_run(tmp_path / "run.yaml", run_config(model, train, tmp_path, **options))), 1)


def test_the_estimate_is_that_of_the_trainer(toy, tmp_path):
    """What Hugging Face's trainer says of PEFT's LoRA of the same rank, link by link; of the model itself with method full."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer

    from cola_ds.training.flops import training_flops

    def trainers(lora_rank, tokens):
        model = AutoModelForCausalLM.from_pretrained(toy[0])
        if lora_rank:
            model = get_peft_model(model, LoraConfig(r=lora_rank, target_modules=["q_proj", "v_proj"]))
        return Trainer.floating_point_ops(SimpleNamespace(model=model), {"input_ids": torch.zeros(1, tokens)})

    chain = prepared(toy, tmp_path)
    assert training_flops(chain, TOKENS) == trainers(8, 1000) + trainers(4, 700)
    one_link = {"chain": {"length": 1}, "lora": {"rank": 8}}
    assert training_flops(prepared(toy, tmp_path, method="full", **one_link), [1000, 0]) == trainers(None, 1000)
    zero_shot = prepared(toy, tmp_path, method="zero-shot", data={"eval": str(toy[2])}, **one_link)
    assert training_flops(zero_shot, [0]) == 0


@pytest.mark.parametrize(("second", "saved"), [(6, 3.60e11), (4, 7.20e11), (2, 1.08e12)])
def test_rank_step_down_saves_what_the_paper_says(second, saved):
    """Of OPT-1.3B on CB: 150 examples, two epochs in the second link, five seeds; at 102 tokens an example, its figures."""
    from transformers import AutoModelForCausalLM, OPTConfig

    from cola_ds.lora.targets import find_targets
    from cola_ds.training.flops import training_flops

    shape = OPTConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, ffn_dim=8192)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(shape)
    targets = find_targets(skeleton, ["q_proj", "v_proj"])

    def of(*lora_ranks):
        config = SimpleNamespace(trains=True, trains_lora=True, lora_ranks=list(lora_ranks))
        tokens = 102 * 150 * 5
        return training_flops(
            SimpleNamespace(skeleton=skeleton, targets=targets, config=config), [3 * tokens, 2 * tokens]
        )

    assert of(8, 8) - of(8, second) == pytest.approx(saved, rel=0.005)


def test_the_profiler_counts_every_matrix_product(toy, tmp_path):
    """Of one example without padding: 2 for each weight and token that meet, of the adapters and the head as well."""
    from cola_ds.training.flops import profiled_flops

    chain = prepared(toy, tmp_path)
    length, answer = chain.train.lengths[0], len(chain.train.collate([0]).positions)
    head = chain.skeleton.get_output_embeddings()
    layers = [layer for layer in chain.skeleton.modules() if isinstance(layer, nn.Linear) and layer is not head]
    products = 2 * length * sum(layer.weight.numel() for layer in layers) + 2 * answer * head.weight.numel()
    adapters = 2 * (32 + 32 + 32 + 16)  # per unit of LoRA rank: two layers, q_proj and v_proj
    found = profiled_flops(chain, [length, 0, 0]), profiled_flops(chain, [0, length, 0])
    assert found[0] - found[1] == 3 * 2 * length * adapters * (8 - 4)
    products += 2 * length * adapters * 8
    attention = 2 * 2 * 2 * length * length * 32  # two layers, scores and values
    assert 3 * (products + attention) <= found[0] <= 1.05 * 3 * (products + attention)
    assert profiled_flops(chain, [3 * length, 0]) == 3 * found[0]


def test_what_a_link_starts_at_is_counted_beside_it(toy, tmp_path):
    from cola_ds.training.flops import profiled_flops

    plain, started = prepared(toy, tmp_path), prepared(toy, tmp_path, lora={"rank": [8, 4], "init": "pissa"})
    length = plain.train.lengths[0]
    adapters = 2 * (32 + 32 + 32 + 16) * 8
    assert profiled_flops(started, [length, 0]) - profiled_flops(plain, [length, 0]) == 3 * 2 * length * adapters


def test_padding_counts_where_there_is_some(toy, tmp_path):
    """Examples of several lengths in a micro batch: varlen computes each alone, other attention all at the longest's length."""
    from cola_ds.distributed.profiler import forward_flops
    from cola_ds.training.flops import profiled_flops

    def of(attention):
        own = {"method": "full", "chain": {"length": 1}, "lora": {"rank": 8}, "optim": {"micro_batch_size": 4}}
        return prepared(toy, tmp_path, **own, model={"path": str(toy[0]), "attention": attention})

    joined, padded = of("varlen"), of("sdpa")
    lengths = [int(length) for length in joined.train.lengths[:4]]
    alone = [joined.train.collate([index]) for index in range(4)]
    expected = sum(forward_flops(joined.skeleton, each.input_ids, each.positions) for each in alone)
    assert profiled_flops(joined, [sum(lengths)], joined=True) == 3 * expected
    more = profiled_flops(padded, [sum(lengths)]) / (3 * expected)
    assert more == pytest.approx(4 * max(lengths) / sum(lengths), rel=0.1)
    assert more > 1.05


@pytest.mark.parametrize("architecture", ["opt", "qwen2", "gpt2"])
def test_the_profiler_takes_every_architecture(tmp_path, toy, architecture):
    from cola_ds.training.flops import profiled_flops
    from tests.support.toys import save_model

    model = save_model(tmp_path / "model", architecture)
    own = {"method": "full", "chain": {"length": 1}, "lora": {"rank": 8}, "model": {"path": str(model)}}
    assert profiled_flops(prepared(toy, tmp_path, **own), [100]) > 6 * 100 * 10_000
