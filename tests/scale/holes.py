"""Models whose weight files are holes: zeros of any size that take no disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.toys import save_tokenizer

LLAMA_2_70B = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
_FILE_BYTES = 9_900_000_000


def save_holes(folder: Path, sizes: dict[str, Any]) -> Path:
    """A model's folder in bf16, all of its weights zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, weight in model.state_dict().items():
        if sum(2 * each.numel() for each in files[-1].values()) + 2 * weight.numel() > _FILE_BYTES:
            files.append({})
        files[-1][name] = weight
    index = {}
    for number, weights in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _save_file(folder / name, weights)
        index |= dict.fromkeys(weights, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_tokenizer(folder)
    return folder


def _save_file(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """As the safetensors format has it: the length of a JSON header, the header, and the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
