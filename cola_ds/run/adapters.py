"""A PEFT adapter of others, read as a link: model.adapter. What it holds that a link cannot is refused by its name.

A link has one LoRA rank and one scaling for all its layers. Where the adapter has several (rank_pattern, alpha_pattern), A and B
are filled up with zeros, and B takes up, in fp32, what its layer's scaling is to the link's.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cola_ds.config.parsing import parse_json, read_text
from cola_ds.errors import UserError, cut, first_line, quoted, some_of
from cola_ds.run.peft_files import BASE, bias_name, lora_names

_FILE = "adapter_model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors has them
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+?)\.(?P<kind>lora_A\.weight|lora_B\.weight|base_layer\.bias|bias)")
# Of adapter_config.json: what is read; and what says nothing of the change that A and B are, but of training or of opening it.
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"}
_ELSE = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "eva_config", "runtime_config",
}  # fmt: skip
_OF_THE_BASE = {True, False, None, "gaussian", "eva", "orthogonal"}
"""Ways to draw A and B that leave the base as it is; pissa, olora, corda and loftq take their start out of it."""
_MOST = 1e9  # of a rank or an alpha
_PLAIN = re.compile(r"[\w.^$\\-]{1,500}")


@dataclass(frozen=True)
class Adapter:
    """An adapter, without its values."""

    folder: Path
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """By layer, of A (r, in) and B (out, r)."""
    biases: dict[str, tuple[int, ...]]
    """By layer, of trained biases (out,)."""
    scalings: dict[str, float]
    """By layer."""
    names: dict[str, str]
    """By the name that a link's tensor has, its key in the file."""
    base: str | None
    """The fingerprint of its base model, where cola-ds export wrote it."""
    links: int
    """How many links it is made of, where cola-ds export wrote that; 1 elsewhere."""
    transposed: bool
    """Whether its layers' weights are (in, out) (fan_in_fan_out)."""

    @property
    def lora_rank(self) -> int:
        """The largest of its layers."""
        return max(of_A[0] for of_A, _ in self.shapes.values())

    @property
    def scaling(self) -> float:
        """The largest of its layers."""
        return max(self.scalings.values())

    def tensors(self) -> dict[str, Tensor]:
        """As a link of one rank and one scaling has them. Raises UserError for values that are not finite."""
        found: dict[str, Tensor] = {}
        with safe_open(self.folder / _FILE, framework="pt") as opened:
            for name, key in self.names.items():
                found[name] = opened.get_tensor(key)
                if not torch.isfinite(found[name].float()).all():  # fp64 holds more than a model does
                    raise UserError(f"model.adapter {self.folder}: {key} has values that are not finite in fp32")
        for layer, scaling in self.scalings.items():
            A, B = lora_names(layer)
            if scaling != self.scaling:
                found[B] = found[B].float() * (scaling / self.scaling)
            room = self.lora_rank - len(found[A])
            found[A] = torch.nn.functional.pad(found[A], (0, 0, 0, room))
            found[B] = torch.nn.functional.pad(found[B], (0, room))
        return found


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter's config, names and shapes. Raises UserError for a folder that is none, and for what a link cannot be."""
    said = _config(folder)
    shapes = _shapes(folder)
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    names: dict[str, str] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None or (match["kind"].endswith("bias") and said["bias"] != "lora_only"):
            raise UserError(
                f"model.adapter {folder} holds {cut(key)}, which is no A or B of a layer, nor its bias: a link changes neither "
                "embeddings nor norms nor whole weights; merge the adapter with peft, and train that model"
            )
        layer, kind = match["layer"], match["kind"]
        layers.setdefault(layer, {})[kind.removeprefix("base_layer.")] = shape
        A, B = lora_names(layer)
        names[{"lora_A.weight": A, "lora_B.weight": B}.get(kind, bias_name(layer))] = key
    for layer, held in layers.items():
        of_A, of_B = held.get("lora_A.weight", ()), held.get("lora_B.weight", ())
        if len(of_A) != 2 or len(of_B) != 2 or of_A[0] != of_B[1] or 0 in (*of_A, *of_B):
            raise UserError(
                f"model.adapter {folder}: A of {cut(layer)} has the shape {of_A or None}, B {of_B or None}; they must be (r, in) "
                "and (out, r)"
            )
    if not layers:
        raise UserError(f"model.adapter {folder} holds no A and B")
    return Adapter(
        folder,
        {layer: (held["lora_A.weight"], held["lora_B.weight"]) for layer, held in layers.items()},
        {layer: held["bias"] for layer, held in layers.items() if "bias" in held},
        {layer: _scaling(folder, said, layer, held["lora_A.weight"][0]) for layer, held in layers.items()},
        names,
        *_made_of(folder),
        bool(said.get("fan_in_fan_out")),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(
            f"model.adapter {cut(str(folder))} has no adapter_config.json: name the folder of a PEFT adapter"
        )
    said = parse_json(read_text(path, "the adapter's"), str(path))
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        held = said.get("peft_type") if isinstance(said, dict) else said
        raise UserError(f"{path} is of no LoRA adapter: its peft_type is {quoted(held)}, not 'LORA'")
    init = said.get("init_lora_weights", True)
    if not isinstance(init, (bool, str, type(None))) or init not in _OF_THE_BASE:
        raise UserError(
            f"{path}: init_lora_weights {quoted(init)} takes the adapter's start out of the base's weights, so that it is a "
            "change of others; convert it (PEFT: path_initial_model_for_weight_conversion)"
        )
    if wrong := [key for key, value in said.items() if value and key not in _READ | _ELSE]:
        each = [f"{cut(key, 40)} {quoted(said[key], 40)}" for key in wrong]
        raise UserError(
            f"{path}: {some_of(each)}: a link cannot have that; merge the adapter with peft, and train that model"
        )
    said.setdefault("bias", "none")
    if said["bias"] not in ("none", "lora_only"):
        raise UserError(f"{path}: bias {quoted(said['bias'])} is not supported: a link's biases are none or lora_only")
    if not isinstance(said.get("use_rslora", False), bool):
        raise UserError(f"{path}: use_rslora is {quoted(said['use_rslora'])}; it must be true or false")
    for key in ("r", "lora_alpha"):
        _positive(path, key, said.get(key))
    for key in ("rank_pattern", "alpha_pattern"):
        said[key] = said.get(key) or {}
        if not isinstance(said[key], dict):
            raise UserError(f"{path}: {key} {quoted(said[key])} must be a mapping of layers' names")
        for name, value in said[key].items():
            _positive(path, f"{key} of {cut(name, 60)}", value)
            if not _PLAIN.fullmatch(name) or not _compiles(name):
                raise UserError(
                    f"{path}: {key} {quoted(name)} is more than a layer's name, or the end of one; name the layers"
                )
    return said


def _positive(path: Path, key: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < _MOST:
        raise UserError(f"{path}: {key} is {quoted(value)}; it must be a positive number below {_MOST:g}")


def _made_of(folder: Path) -> tuple[str | None, int]:
    """The fingerprint of the base, and how many links it is, where that is written beside."""
    said = parse_json(read_text(folder / BASE, "the adapter's"), BASE) if (folder / BASE).is_file() else {}
    said = said if isinstance(said, dict) else {}
    links = said.get("links", 1)
    return (str(said["base"]) if "base" in said else None), links if isinstance(links, int) and links > 0 else 1


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor, by its key."""
    path = folder / _FILE
    if not path.is_file():
        beside = (folder / "adapter_model.bin").exists()
        why = ": adapter_model.bin is a pickle, which is not read; save it as safetensors" if beside else ""
        raise UserError(f"model.adapter {cut(str(folder))} has no {_FILE}{why}")
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            for key, each in slices.items():
                if each.get_dtype() not in _DTYPES:
                    raise UserError(f"{path}: {cut(key)} is {each.get_dtype()}; A and B are {', '.join(_DTYPES)}")
            return {key: tuple(each.get_shape()) for key, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}; copy the adapter anew") from None


def _scaling(folder: Path, said: Mapping[str, Any], layer: str, lora_rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), of a layer. Its rank is that of its A, which adapter_config.json must agree with."""
    of = partial(_by_pattern, layer)
    asked = of(said["rank_pattern"], said["r"])
    if asked != lora_rank:
        raise UserError(
            f"model.adapter {folder}: A of {cut(layer)} has {lora_rank} rows, and adapter_config.json says r {quoted(asked)}"
        )
    alpha = of(said["alpha_pattern"], said["lora_alpha"])
    return float(alpha / (lora_rank**0.5 if said.get("use_rslora") else lora_rank))


def _compiles(name: str) -> bool:
    with contextlib.suppress(re.error):
        return bool(re.compile(name))
    return False


def _by_pattern(layer: str, pattern: Mapping[str, float], otherwise: float) -> float:
    """As PEFT finds it: by the first key that is the layer's name, or its end."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return otherwise
