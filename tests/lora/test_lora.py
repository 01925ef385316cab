"""Adapters in plain torch: the layer, injection, targets, and the match with PEFT."""

import pytest
import torch
from torch import nn

from cola_ds.errors import UserError
from cola_ds.lora.layers import LoRALinear, delta_weight, draw_lora_A, inject, lora_layers, start_link
from cola_ds.lora.targets import find_targets
from tests.support.toys import save_model

CPU = torch.device("cpu")


def model_of(folder, architecture="llama"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(save_model(folder / architecture, architecture))


def test_layer_computes_what_its_docstring_says():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(5, 7), dropout=0.0, train_bias=False)
    layer.reset(torch.randn(3, 5), scaling=2.0, device=CPU)
    layer.lora_B.data.normal_()
    x = torch.randn(4, 5)
    merged = layer.weight + delta_weight(layer.lora_A, layer.lora_B, layer.scaling)
    torch.testing.assert_close(layer(x), x @ merged.T + layer.bias)


def test_injection_keeps_outputs_names_and_parameters(tmp_path):
    model = model_of(tmp_path)
    ids = torch.randint(300, (2, 9))
    before, names = model(ids).logits, set(model.state_dict())
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    inject(model, find_targets(model, ["q_proj", "v_proj"]), dropout=0.0, train_bias=False)
    start_link(model, 1, 4, 8, seed=0, device=CPU)
    assert torch.equal(model(ids).logits, before)
    assert model.get_submodule("model.layers.0.self_attn.q_proj").weight is weight
    added = set(model.state_dict()) - names
    assert {name.rpartition(".")[2] for name in added} == {"lora_A", "lora_B"}
    assert names <= set(model.state_dict())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added


def test_a_is_drawn_from_seed_link_and_layer_alone():
    draw = draw_lora_A(3, 1, "layers.0.q_proj", (8, 576))
    assert torch.equal(draw, draw_lora_A(3, 1, "layers.0.q_proj", (8, 576)))
    torch.manual_seed(123)  # the global stream plays no part, and is not moved
    state = torch.get_rng_state()
    assert torch.equal(draw, draw_lora_A(3, 1, "layers.0.q_proj", (8, 576)))
    assert torch.equal(state, torch.get_rng_state())
    for other in ((4, 1, "layers.0.q_proj"), (3, 2, "layers.0.q_proj"), (3, 1, "layers.1.q_proj")):
        assert not torch.allclose(draw, draw_lora_A(*other, (8, 576)))
    assert draw.std().item() == pytest.approx((3 * 576) ** -0.5, rel=0.05)


def test_bias_lora_only_trains_the_layers_own_biases(tmp_path):
    model = model_of(tmp_path, "opt")
    inject(model, find_targets(model, ["q_proj"]), dropout=0.0, train_bias=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.bias" for name in lora_layers(model)}
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("architecture", "targets", "count"),
    [
        ("llama", ["q_proj", "v_proj"], 4),
        ("llama", ["self_attn.q_proj"], 2),
        ("llama", ["layers.1.mlp.down_proj"], 1),
        ("llama", "all-linear", 14),  # 7 a layer; not lm_head
        ("opt", "all-linear", 12),
        ("qwen2", ["o_proj"], 2),
        ("gpt2", ["c_attn"], 2),
        ("gpt2", "all-linear", 8),  # each a Conv1D
    ],
)
def test_targets(tmp_path, architecture, targets, count):
    assert len(find_targets(model_of(tmp_path, architecture), targets)) == count


@pytest.mark.parametrize(
    ("architecture", "targets", "message"),
    [
        (
            "llama",
            ["q_prj"],
            "lora.targets q_prj matches no layer; this model's linear layers are down_proj, gate_proj, k_proj",
        ),
        ("llama", ["proj"], "lora.targets proj matches no layer"),  # a suffix of names, not of letters
        ("llama", ["mlp"], "matches model.layers.0.mlp, a LlamaMLP and not an nn.Linear"),
        ("gpt2", ["attn"], "matches transformer.h.0.attn, a GPT2Attention and not an nn.Linear or Conv1D"),
        ("llama-tied", ["lm_head"], "matches lm_head, whose weight is also the input embedding"),
    ],
)
def test_targets_that_are_refused(tmp_path, architecture, targets, message):
    with pytest.raises(UserError) as caught:
        find_targets(model_of(tmp_path, architecture), targets)
    assert message in str(caught.value)


def test_forward_equals_peft_bit_for_bit(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, peft_model = model_of(tmp_path), model_of(tmp_path)
    inject(model, find_targets(model, ["q_proj", "v_proj"]), dropout=0.0, train_bias=False)
    start_link(model, 1, 4, 8, seed=0, device=CPU)
    peft_model = get_peft_model(peft_model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name, layer in lora_layers(model).items():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        peft_layer = peft_model.base_model.model.get_submodule(name)
        peft_layer.lora_A["default"].weight.data.copy_(layer.lora_A)
        peft_layer.lora_B["default"].weight.data.copy_(layer.lora_B)
        delta = delta_weight(layer.lora_A, layer.lora_B, layer.scaling)
        assert torch.equal(delta, peft_layer.get_delta_weight("default"))
    ids = torch.randint(300, (2, 9))
    assert torch.equal(model(ids).logits, peft_model(ids).logits)
