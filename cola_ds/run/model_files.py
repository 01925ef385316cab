"""The files of a model's folder, looked at before anything is built or loaded from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cola_ds.config.parsing import parse_json, read_text
from cola_ds.errors import UserError, first_line, quoted

_MOST_BYTES = 2**26  # of a JSON that describes a model, or lists its weights
_MOST_PARTS = 10_000  # layers or experts: transformers makes a module of each, or a list, before it looks further


def check_folder(folder: Path) -> None:
    """Refuse (UserError) what cannot be a model's folder, by its config.json, its weights' index and headers, its tokenizer."""
    read_config(folder)
    if not weight_files(folder):
        raise UserError(
            f"model.path {folder} has no model.safetensors, nor an index of several; pickled weights are not read: convert them"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises UserError where it describes no model."""
    path = folder / "config.json"
    config = parse_json(read_text(path, "the model's", _MOST_BYTES), str(path))
    if not isinstance(config, dict):
        raise UserError(f"{path} describes no model: it must hold a JSON object; it holds {quoted(config)}")
    for key, value in _entries(config):
        if ("layer" in key or "expert" in key) and isinstance(value, int) and value > _MOST_PARTS:
            raise UserError(f"{path} describes no model that there is: {quoted(key)} is {quoted(value)}")
    if config.get("transformers_weights") is not None:
        raise UserError(
            f"{path} names its weights by transformers_weights; call them model.safetensors, and remove that key"
        )
    return config


def _entries(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """Of an object and the objects in it."""
    inner = [entry for value in config.values() if isinstance(value, dict) for entry in _entries(value)]
    return [*config.items(), *inner]


def weight_files(folder: Path) -> list[Path]:
    """The weights that loading reads, by name, if any: a folder may hold others, such as an adapter or the same ones in another
    layout. Raises UserError for an index that names what is not there, and for what is not safetensors or was cut off.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single] if single.is_file() else _named_by(index) if os.path.lexists(index) else []
    for path in files:
        try:
            with safe_open(path, framework="pt"):  # reads the header, and compares it with the file's size
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged: {first_line(error)}; copy the model anew") from None
    return files


def _named_by(index: Path) -> list[Path]:
    held = parse_json(read_text(index, "the model's", _MOST_BYTES), str(index))
    named = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index} must have a weight_map of tensors' names to files; copy the model anew")
    names = sorted(set(named.values()))
    for name in names:
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {quoted(name)}, which is no safetensors file of that folder")
    if absent := [name for name in names if not os.path.isfile(index.with_name(name))]:
        raise UserError(
            f"{index} names {len(names)} files, of which {len(absent)} are not there, such as {quoted(absent[0])}; "
            "copy the model anew"
        )
    return [index.with_name(name) for name in names]
