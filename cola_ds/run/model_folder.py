"""A model as a Hugging Face folder: where its files lie, and a trained one written as its base is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cola_ds import notices
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.schema import ModelConfig
from cola_ds.errors import UserError

# What describes a model beside its weights: config, tokenizer, templates, its own code, licence.
_KEPT = (
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip
_LEFT_OUT = ("*.index.json", "adapter_config.json", "trainer_state.json", "all_results.json", "*_results.json")


def model_folder(config: ModelConfig) -> Path:
    """The local folder of a model; for a hub name, where the hub's cache keeps that revision."""
    if Path(config.path).is_dir():
        return Path(config.path)
    from transformers.utils import cached_file

    return Path(cached_file(config.path, "config.json", revision=config.revision)).parent


def check_is_there(config: ModelConfig, whose: str) -> None:
    """Raise UserError where a model was a folder that is gone."""
    if Path(config.path).is_absolute() and not Path(config.path).is_dir():
        raise UserError(
            f"model.path {config.path}, {whose}, is not there any more; where it lies now, say by model.path=FOLDER"
        )


def check_no_adapter(config: ModelConfig) -> None:
    """Raise UserError for a model with an adapter's config beside its own: where peft is installed, Transformers would apply that
    adapter in silence, and where it is not, it would not."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(config.path, revision=config.revision) is not None:
        raise UserError(
            f"model.path {config.path} holds adapter_config.json: whether that adapter is a part of the model would depend on "
            "whether peft is installed; merge it into a model of its own, or, if that is done, move adapter_config.json away"
        )


def write_model_folder(model: nn.Module, base: ModelConfig, out: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a model that was made from `base`, in its dtype, as a folder that opens wherever the base's does: its weights, and
    every other file as the base has it. Saved anew they would be in the installed Transformers' own format, which other versions
    refuse or, worse, read otherwise. Collective at no time: `state` has whole weights, where the model has shards.
    """
    from transformers import GenerationConfig

    bare: Any = model
    said = bare.generation_config
    bare.generation_config = GenerationConfig()  # the base's may be one that cannot be saved
    try:
        with notices.of_transformers("writing the model", "file"):
            bare.save_pretrained(out, state_dict=state)
    finally:
        bare.generation_config = said
    for name in ("config.json", "generation_config.json"):
        (out / name).unlink(missing_ok=True)
    copy_description(base, out)
    for path in out.glob("*.safetensors"):  # safetensors 0.8 lets nobody else read what it writes, whatever the umask
        path.chmod((out / "config.json").stat().st_mode)


def copy_description(base: ModelConfig, out: Path) -> None:
    """Copy what describes a model beside its weights, and have it say the dtype of these."""
    source = _all_files(base)
    for path in sorted({path for pattern in _KEPT for path in source.glob(pattern)}):
        if path.is_file() and not any(path.match(pattern) for pattern in _LEFT_OUT):
            target = out / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    _set_dtype(out / "config.json", DTYPES[base.dtype].torch_name)


def _all_files(base: ModelConfig) -> Path:
    """The base's folder with all that is kept of it, and its card: of a hub name, loading has fetched only what it needed."""
    if Path(base.path).is_dir():
        return Path(base.path)
    from huggingface_hub import snapshot_download

    with notices.waiting(f"fetching {base.path}"):
        return Path(snapshot_download(base.path, revision=base.revision, allow_patterns=[*_KEPT, "README.md"]))


def _set_dtype(path: Path, name: str) -> None:
    """Have a config.json say what its weights are stored in; nothing else of it changes."""
    said = json.loads(path.read_text(encoding="utf-8"))
    keys = [key for key in ("torch_dtype", "dtype") if key in said]
    keys = keys or ["torch_dtype"]  # the name that all versions read
    if any(said.get(key) != name for key in keys):
        said |= dict.fromkeys(keys, name)
        path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
