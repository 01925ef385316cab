"""PEFT adapter files: a link as others open it, and the names of what is in it.

A link's tensors have PEFT's names without the prefix that stands before all of them in a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from cola_ds.config.schema import RunConfig

PREFIX = "base_model.model."
"""What stands before the names in a file."""
BASE = "cola_ds.json"
"""A file beside an exported adapter: the fingerprint of its base model, whose name may be anything."""
_A, _B, _BIAS = ".lora_A.weight", ".lora_B.weight", ".base_layer.bias"


def lora_names(layer: str) -> tuple[str, str]:
    """The names of a layer's A (r, in) and B (out, r)."""
    return layer + _A, layer + _B


def bias_name(layer: str) -> str:
    """The name of a layer's bias (out,), which a link has where biases are trained."""
    return layer + _BIAS


def is_bias(name: str) -> bool:
    """Whether that is the name of a bias."""
    return name.endswith(_BIAS)


def layers_of(names: Iterable[str]) -> list[str]:
    """The layers that a link's tensors are of, by their names and in their order."""
    return [name.removesuffix(_A) for name in names if name.endswith(_A)]


def adapter_files(
    config: RunConfig, lora_rank: int, alpha: float, layers: list[str], tensors: dict[str, Tensor], transposed: bool = False,
    bias: str | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """The files of a PEFT adapter of the run's base model, by name: A, B and trained biases of the layers. `transposed`: their
    weights are (in, out), as GPT-2's Conv1D has them. `bias`: what is said of the biases, where it is not the config's."""
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "revision": config.model.revision,
        "r": lora_rank,
        "lora_alpha": alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": layers,
        "bias": config.lora.bias if bias is None else bias,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
    named = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    return {
        "adapter_model.safetensors": save(named, metadata={"format": "pt"}),
        "adapter_config.json": (json.dumps(adapter_config, indent=2) + "\n").encode(),
    }


def read_link(path: Path) -> dict[str, Tensor]:
    """A tied link's tensors, from the safetensors file of its adapter, under the names that `adapter_files` was given."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
