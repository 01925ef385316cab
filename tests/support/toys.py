"""Small models, data and runs that tests are made of."""

import json
import os
import random
from pathlib import Path
from typing import Any

import torch
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
# A folder for each task, with real data, where a machine has it: not part of the project.
REAL_TASKS = Path(os.environ.get("COLA_DS_TASKS", REPOSITORY.parent / "shared/tasks"))

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama-tied": {
        "model_type": "llama",
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True, "dropout": 0.0},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 259 ids, without a pad token; BOS is put in front, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {byte: 3 + index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_metaspace_tokenizer(folder: Path) -> None:
    """A tokenizer as Llama-2's: a text begins with a space, written `▁`, which may belong to its first piece, and BOS is put in
    front. Bytes that it does not know have ids of their own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    pieces += ["▁4", "42", "▁42"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "4"), ("4", "2"), ("▁4", "2")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_model(folder: Path, architecture: str = "llama", **sizes: Any) -> Path:
    """A random causal LM of a known architecture, with a tokenizer, as a model folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        **_SIZES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **ARCHITECTURES[architecture],
        **sizes,
    }
    torch.manual_seed(1)
    config = AutoConfig.for_model(options.pop("model_type", architecture), **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_sums(path: Path, count: int, seed: int = 0) -> Path:
    """Additions as prompt and completion, of unequal length."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(count):
            a, b = draw.randrange(10 ** draw.randint(1, 4)), draw.randrange(100)
            out.write(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n")
    return path


def run_config(model: Path, train: Path, run_dir: Path, /, **sections: Any) -> dict[str, Any]:
    """A run's YAML as a dict: a chain on the toy data in fp32; keyword arguments update its sections.

    Its engine fetches and releases as it would with a large model: adapters and norms stay whole, base weights do not.
    """
    config: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "fp32"},
        "method": "cola",
        "lora": {"rank": 4, "alpha": 8},
        "chain": {"length": 2},
        "data": {"train": str(train), "max_length": 64},
        "optim": {"lr": 2e-3, "max_steps": 6, "global_batch_size": 8, "micro_batch_size": 2},
        "run": {"dir": str(run_dir), "log_every_steps": 1},
        "deepspeed": str(REPOSITORY / "tests/support/zero3_sharded.json"),
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values} if isinstance(values, dict) else values
    return config


TOP_RUNG = {"deepspeed": "auto", "model": {"attention": "varlen"}, "data": {"packing": "best_fit", "max_length": 32}}
"""What a run on text is fastest with: sections for `run_config`. (The loss is fused everywhere.)"""


def thorough(cases: list[Any], of_all: list[Any]) -> list[Any]:
    """A test's cases, and `of_all` too where COLA_DS_ALL is set: variants of a promise that cost minutes of every run of CI."""
    return [*cases, *(of_all if os.environ.get("COLA_DS_ALL") else [])]


def save_run(path: Path, config: dict[str, Any]) -> Path:
    """Write a run's YAML."""
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
