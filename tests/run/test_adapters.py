"""PEFT adapters of others, as links: what is read, and what is refused by its name."""

import json

import pytest
import torch

from cola_ds.errors import UserError
from cola_ds.run.adapters import open_adapter

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def adapter(folder, tensors=None, **said):
    """An adapter's folder: of q_proj with rank 4 and of v_proj with rank 2, unless `tensors` says otherwise."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    held = {
        f"{Q}.lora_A.weight": torch.ones(4, 8), f"{Q}.lora_B.weight": torch.ones(6, 4),
        f"{V}.lora_A.weight": torch.ones(2, 8), f"{V}.lora_B.weight": torch.ones(5, 2),
    }  # fmt: skip
    held |= tensors or {}
    save_file(
        {f"base_model.model.{k}": v for k, v in held.items() if v is not None}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {}, **said}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def change(found, layer):
    """What an adapter adds to a layer's weight."""
    held = found.tensors()
    return found.scaling * held[f"{layer}.lora_B.weight"] @ held[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize(
    ("said", "of_q", "of_v"),
    [
        ({}, 8 / 4, 8 / 2),
        ({"use_rslora": True}, 8 / 2, 8 / 2**0.5),
        ({"alpha_pattern": {"layers.0.self_attn.v_proj": 3}}, 8 / 4, 3 / 2),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 12}}, 12 / 4, 8 / 2),
        ({"alpha_pattern": {"proj": 12}}, 8 / 4, 8 / 2),  # no layer's name ends so, at a dot
        ({"rank_pattern": {f"{Q}": 4, "self_attn.v_proj": 2}, "r": 64}, 8 / 4, 8 / 2),
    ],
)
def test_scalings(tmp_path, said, of_q, of_v):
    """alpha / r of each layer: one rank and one scaling for all, and the same change."""
    found = open_adapter(adapter(tmp_path / "a", **said))
    assert (found.scalings[Q], found.scalings[V], found.lora_rank) == (of_q, of_v, 4)
    held = found.tensors()
    assert [tuple(held[f"{V}.lora_{half}.weight"].shape) for half in "AB"] == [(4, 8), (5, 4)]
    torch.testing.assert_close(change(found, Q), torch.full((6, 8), 4 * of_q))
    torch.testing.assert_close(change(found, V), torch.full((5, 8), 2 * of_v))


@pytest.mark.parametrize("name", ["bias", "base_layer.bias"])
def test_biases_by_either_name(tmp_path, name):
    found = open_adapter(adapter(tmp_path / "a", {f"{Q}.{name}": torch.arange(6.0)}, bias="lora_only"))
    assert found.biases == {Q: (6,)}
    assert found.tensors()[f"{Q}.base_layer.bias"].tolist() == [0, 1, 2, 3, 4, 5]


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
REFUSED = {
    "DoRA": ({}, {"use_dora": True}, "use_dora True: a link cannot have that; merge the adapter with peft"),
    "modules_to_save": (
        {},
        {"modules_to_save": ["lm_head"]},
        r"modules_to_save \['lm_head'\]: a link cannot have that",
    ),
    "a key that is not known": ({}, {"use_magic": 1}, "use_magic 1: a link cannot have that"),
    "tokens": ({}, {"trainable_token_indices": [1]}, r"trainable_token_indices \[1\]: a link"),
    "another kind": ({}, {"peft_type": "IA3"}, "its peft_type is 'IA3', not 'LORA'"),
    "pissa": (
        {},
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights 'pissa_niter_4' takes the adapter's start out",
    ),
    "init of a list": ({}, {"init_lora_weights": ["x"]}, "takes the adapter's start out"),
    "all biases": ({}, {"bias": "all"}, "bias 'all' is not supported"),
    "a bias that is not announced": (
        {f"{Q}.bias": torch.ones(6)},
        {},
        r"holds base_model\.model\..*q_proj\.bias, which is no A or",
    ),
    "an embedding": (
        {"model.embed_tokens.lora_embedding_A": torch.ones(4, 9)},
        {},
        "embed_tokens.lora_embedding_A, which is no A or B",
    ),
    "magnitudes": ({f"{Q}.lora_magnitude_vector": torch.ones(6)}, {}, "lora_magnitude_vector, which is no A or B"),
    "no B": ({B: None}, {}, r"q_proj has the shape \(4, 8\), B None; they must be"),
    "ranks that differ": ({B: torch.ones(6, 3)}, {}, r"A of .*q_proj has the shape \(4, 8\), B \(6, 3\)"),
    "a rank of nothing": ({A: torch.ones(0, 8), B: torch.ones(6, 0)}, {}, "they must be"),
    "another rank than it says": ({}, {"r": 8}, r"A of .*q_proj has 4 rows, and adapter_config\.json says r 8"),
    "alpha": ({}, {"lora_alpha": -1}, "lora_alpha is -1; it must be a positive number"),
    "no r": ({}, {"r": None}, "r is None; it must be a positive number"),
    "an expression": ({}, {"alpha_pattern": {"(a+)+": 1}}, r"alpha_pattern '\(a\+\)\+' is more than a layer's name"),
    "half an expression": (
        {},
        {"rank_pattern": {"q_proj\\": 2}},
        r"rank_pattern 'q_proj.*' is more than a layer's name",
    ),
    "whole numbers": ({A: torch.ones(4, 8, dtype=torch.int8)}, {}, r"lora_A\.weight is I8; A and B are F64, F32"),
    "a pattern of another kind": ({}, {"alpha_pattern": [1]}, r"alpha_pattern \[1\] must be a mapping"),
    "infinite": ({A: torch.full((4, 8), torch.inf)}, {}, r"q_proj\.lora_A\.weight has values that are not finite"),
    "infinite in fp32": (
        {A: torch.full((4, 8), 1e300, dtype=torch.float64)},
        {},
        r"lora_A\.weight has values that are not finite in fp32",
    ),
    "an alpha without end": (
        {},
        {"lora_alpha": 1e308},
        r"lora_alpha is 1e\+308; it must be a positive number below 1e\+09",
    ),
    "a word for a truth": ({}, {"use_rslora": "yes"}, "use_rslora is 'yes'; it must be true or false"),
    "the head": (
        {"lm_head.base_layer.weight": torch.ones(9, 4)},
        {},
        "nor its bias: a link changes neither embeddings nor norms",
    ),
    "nothing": (dict.fromkeys((A, B, f"{V}.lora_A.weight", f"{V}.lora_B.weight")), {}, "holds no A and B"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    tensors, said, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        open_adapter(adapter(tmp_path / "a", tensors, **said)).tensors()
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    """A pickle is not opened, whatever is in it."""
    folder = adapter(tmp_path / "a")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
        open_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle, which is not read; save it as safetensors"):
        open_adapter(folder)
    for content, message in ((b"[1]", "is of no LoRA adapter"), (b"{", "is not valid JSON"), (b"\xff", "is not UTF-8")):
        config.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_adapter(folder)
    config.unlink()
    with pytest.raises(UserError, match=r"has no adapter_config\.json: name the folder of a PEFT adapter"):
        open_adapter(folder)
