"""Models of other families: a chain on each, whole, and what others make of what it leaves. What a model cannot do is refused by
the name of the layer."""

import pytest
import torch

from cola_ds.cli import main
from cola_ds.commands.export import export
from cola_ds.config.dtypes import DTYPES
from cola_ds.errors import UserError
from cola_ds.lora.targets import find_targets
from tests.support import runs
from tests.support.distributed import run_distributed
from tests.support.toys import run_config, save_model, save_run, save_sums, thorough

GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "head_dim": 8, "sliding_window": 16}
NEOX = {"intermediate_size": 48}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {
    **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "decoder_sparse_step": 1,
}  # fmt: skip
LLAMA_3 = {
    **GROUPED, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
LLAMA_4 = {**EXPERTS, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 32}
VISION = {
    "text_config": {**WINDOW, "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "vision_config": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 28,
        "patch_size": 14,
    },
}  # fmt: skip
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
    "pad_token_id": None,
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FAMILIES = {
    "llama-2": ("llama", {**GROUPED, "tie_word_embeddings": False}, "all-linear"),
    "llama-3": ("llama", LLAMA_3, ["q_proj", "v_proj"]),
    "llama-4": ("llama4_text", LLAMA_4, ATTENTION),
    "mistral": ("mistral", WINDOW, "all-linear"),
    "qwen2": ("qwen2", {**GROUPED, "tie_word_embeddings": True}, ["q_proj", "v_proj"]),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 8}, "all-linear"),
    "gemma2": ("gemma2", WINDOW, "all-linear"),
    "gemma3": ("gemma3_text", WINDOW, "all-linear"),
    "gemma3-vision": ("gemma3", VISION, "all-linear"),
    "phi3": ("phi3", {"intermediate_size": 48}, ["qkv_proj", "gate_up_proj"]),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, "all-linear"),
    "gpt2": ("gpt2", {}, "all-linear"),
    "gpt_neox": ("gpt_neox", NEOX, ["query_key_value", "dense"]),
    "falcon": ("falcon", {"bias": True, "new_decoder_architecture": False}, "all-linear"),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, ["query_key_value"]),
    "mixtral": ("mixtral", EXPERTS, ["q_proj", "v_proj"]),
    "qwen2_moe": ("qwen2_moe", QWEN_MOE, ATTENTION),
    "qwen3_moe": ("qwen3_moe", QWEN_MOE, ATTENTION),
}


def stopped_across_the_knot(process, path):
    return runs.run_once(process, path, ("step", 4))


def engine_logits(process, path, ids):
    """Train to the end, as another start of the same run. Returns what the engine makes of ids (B, T) then, and its weights."""
    from cola_ds.distributed.engine import evaluating
    from tests.training.test_chain import whole_weights

    chains, keep = [], runs._keep_the_chain
    runs._keep_the_chain = lambda: chains.append(keep()) or chains[0]
    runs.run_once(process, path)
    (chain,) = chains[0]
    with evaluating(chain.engine):
        logits = chain.engine(input_ids=torch.tensor(ids), use_cache=False).logits.float().clone()
    return logits, whole_weights(chain)


@torch.no_grad()
def logits_of(folder, ids, dtype, adapters=()):
    """What Transformers makes of ids, with PEFT where there are adapters: one beside the weights, several merged in order."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for number, adapter in enumerate(adapters, start=1):
        model = PeftModel.from_pretrained(model, adapter)
        model = model if number == len(adapters) else model.merge_and_unload()
    return model.eval()(input_ids=torch.tensor(ids)).logits.float()


SHARDED = ["gpt2", "mixtral", "gemma3"]
OFTEN = ["llama-4", "gemma3-vision", "phi3", "gpt2", "gpt_neox", "falcon", "qwen2_moe"]  # one of each kind
CASES = [(name, "fp32", 1) for name in thorough(OFTEN, [name for name in FAMILIES if name not in OFTEN])]
CASES += [(name, "bf16", 2) for name in thorough(SHARDED, [name for name in FAMILIES if name not in SHARDED])]


@pytest.mark.parametrize(("family", "dtype", "world_size"), CASES)
def test_a_chain_is_what_others_open(tmp_path, family, dtype, world_size):
    """Trained, stopped after its first knot, started again, exported: Transformers and PEFT make of it what the engine makes of
    it. In fp32 to 1e-5; in bf16 the merged model has the engine's bits, and an adapter beside the base differs by the rounding
    of the base's weights, which it does not change."""
    kind, sizes, targets = FAMILIES[family]
    model = save_model(tmp_path / "model", "llama", **{"model_type": kind, **sizes})
    lora = {"targets": targets, "bias": "lora_only" if kind in ("opt", "gpt2", "falcon", "qwen2") else "none"}
    config = run_config(
        model, save_sums(tmp_path / "train.jsonl", 20), tmp_path / "run", model={"dtype": dtype}, lora=lora,
        optim={"lr": 1e-2, "max_steps": 5, "global_batch_size": 4}, chain={"knots": {"steps": [2]}},
    )  # fmt: skip
    path, run = str(save_run(tmp_path / "run.yaml", config)), tmp_path / "run"
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1)).tolist()
    assert run_distributed(stopped_across_the_knot, world_size, path) == ["stopped"] * world_size
    engine, weights = run_distributed(engine_logits, world_size, path, ids)[0]
    torch_dtype = getattr(torch, DTYPES[dtype].torch_name)

    def close(logits, rounding=0.0):
        torch.testing.assert_close(logits, engine, rtol=1e-5, atol=max(1e-5, rounding))

    with pytest.raises(AssertionError):
        close(logits_of(model, ids, torch_dtype), 0.05)  # what is compared has learnt something
    merged = export(run, "hf", tmp_path / "hf")
    close(logits_of(merged, ids, torch_dtype), 0.01 if dtype == "bf16" else 0.0)
    check_weights(merged, weights, torch_dtype)
    rounding = 0.02 if dtype == "bf16" else 0.0
    close(logits_of(model, ids, torch_dtype, [export(run, "peft", tmp_path / "peft")]), rounding)
    close(logits_of(model, ids, torch_dtype, sorted(export(run, "links", tmp_path / "links").iterdir())), rounding)


def check_weights(merged, weights, dtype):
    """Bit for bit."""
    from transformers import AutoModelForCausalLM

    found = dict(AutoModelForCausalLM.from_pretrained(merged, dtype=dtype).named_parameters())
    assert found.keys() == {name for name in weights if "lora_" not in name}
    for name, weight in found.items():
        assert torch.equal(weight.float(), weights[name]), name


TOLD = ["llama-4", "gemma3", "gemma3-vision", "phi3", "gpt2", "falcon", "mixtral"]


@pytest.mark.parametrize("family", thorough(TOLD, [name for name in FAMILIES if name not in TOLD]))
def test_what_is_said_beforehand(tmp_path, family, capsys):
    """Without weights: the dry run of each, and the plan of all but Falcon's, whose attention looks at values."""
    kind, sizes, targets = FAMILIES[family]
    model = save_model(tmp_path / "model", "llama", **{"model_type": kind, **sizes})
    config = run_config(
        model, save_sums(tmp_path / "train.jsonl", 20), tmp_path / "run", model={"dtype": "bf16"}, lora={"targets": targets}
    )  # fmt: skip
    path = str(save_run(tmp_path / "run.yaml", config))
    assert main(["train", path, "--dry-run"]) == 0
    assert f"cola, {len(find_targets(without_weights(family), targets))} target layers" in capsys.readouterr().out
    planned = main(["plan", path, "--gpus", "2"])
    said = capsys.readouterr()
    if kind == "falcon":
        assert planned == 2 and "FalconForCausalLM cannot be planned" in said.err
    else:
        assert planned == 0 and ("computing is not known" in said.out) == (
            "num_experts_per_tok" in sizes or "vision_config" in sizes
        )


# -- what is refused ---------------------------------------------------------------------------------------------------


def without_weights(family, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes, _ = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**SIZES, **sizes, **more})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


EXPERTS_ARE = "layers.0.mlp.experts.gate_up_proj is no layer but 4 experts' matrices in one weight (4, "
NO_LINK = "and cannot have a link"


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        ("mixtral", "all-linear", [EXPERTS_ARE, NO_LINK, "of k_proj, o_proj, q_proj, v_proj"]),
        ("qwen2_moe", "all-linear", [EXPERTS_ARE, NO_LINK, "shared_expert_gate"]),
        ("qwen3_moe", "all-linear", [EXPERTS_ARE, NO_LINK]),
        ("llama-4", "all-linear", ["layers.0.feed_forward.experts.gate_up_proj is no layer but 4 experts'", NO_LINK]),
        ("mixtral", ["q_proj", "experts"], ["lora.targets experts", EXPERTS_ARE, NO_LINK]),
        ("mixtral", ["gate_up_proj"], ["lora.targets gate_up_proj", EXPERTS_ARE, NO_LINK]),
        ("mixtral", ["w1"], ["w1 matches no layer", EXPERTS_ARE]),
        ("qwen2_moe", ["down_proj"], ["experts.down_proj is no layer", "shared_expert.down_proj can: name that"]),
        ("mixtral", ["gate"], ["matches model.layers.0.mlp.gate, a MixtralTopKRouter and not"]),
        ("llama-4", ["router"], ["matches model.layers.0.feed_forward.router, a Llama4Router and not"]),
        ("gemma2", ["lm_head"], ["matches lm_head, whose weight is also the input embedding"]),
    ],
)
def test_what_is_refused_by_name(family, targets, said):
    with pytest.raises(UserError) as caught:
        find_targets(without_weights(family), targets)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("qwen2_moe", ["shared_expert.down_proj"], ["mlp.shared_expert.down_proj"]),
        ("phi3", "all-linear", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
        ("falcon", ["query_key_value"], ["self_attention.query_key_value"]),
        ("gpt2", "all-linear", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ],
)
def test_what_can_have_a_link(family, targets, names):
    found = find_targets(without_weights(family), targets)
    assert [name.partition(".0.")[2] for name in found if ".0." in name] == names


def test_layers_that_text_never_reaches_are_no_targets():
    """Gemma 3's vision tower has layers of the same names."""
    model = without_weights("gemma3-vision")
    names = {name for name, _ in model.named_modules()}
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj" in names
    for targets, count in ((["q_proj", "v_proj"], 4), ("all-linear", 14)):
        found = find_targets(model, targets)
        assert len(found) == count and all(name.startswith("model.language_model.layers.") for name in found)
    with pytest.raises(UserError, match="fc1 matches no layer"):
        find_targets(model, ["fc1"])
