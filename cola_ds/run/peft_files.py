"""PEFT adapter files: a link as others open it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from cola_ds.config.schema import RunConfig

_PEFT_PREFIX = "base_model.model."


def adapter_files(
    config: RunConfig, lora_rank: int, alpha: float, layers: list[str], tensors: dict[str, Tensor]
) -> dict[str, bytes]:
    """A and B of the named layers as the files of a PEFT adapter of the run's base model."""
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "revision": config.model.revision,
        "r": lora_rank,
        "lora_alpha": alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": layers,
        "bias": config.lora.bias,
        "inference_mode": True,
    }
    named = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    return {
        "adapter_model.safetensors": save(named, metadata={"format": "pt"}),
        "adapter_config.json": (json.dumps(adapter_config, indent=2) + "\n").encode(),
    }


def read_link(path: Path) -> dict[str, Tensor]:
    """A tied link's tensors, under the names that `write_link` was given."""
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in load_file(path).items()}
