"""Merging a run's links into its base: whole, or from the base's files into others, a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cola_ds import notices
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.schema import ModelConfig
from cola_ds.distributed.weight_names import names_in_model, transformers_piece
from cola_ds.lora.layers import add_link, as_weight_lies, delta_weight
from cola_ds.lora.targets import is_transposed
from cola_ds.run.peft_files import PREFIX, bias_name, layers_of, lora_names
from cola_ds.run.tensor_files import FLOATS, write_tensors


@torch.no_grad()
def tie_saved_links(model: torch.nn.Module, links: list[dict[str, Tensor]], scalings: list[float], exact: bool) -> None:
    """Merge: W <- W + scaling * B A for each layer and link in order, by the arithmetic of the run's knots (lora/tie.py) on whole
    weights; trained biases are put in place."""
    for layer in dict.fromkeys(layer for link in links for layer in layers_of(link)):
        A, B = lora_names(layer)
        held = [(link[A], link[B], scaling) for link, scaling in zip(links, scalings, strict=True) if A in link]
        _tie(model.get_parameter(f"{layer}.weight"), held, exact, is_transposed(model.get_submodule(layer)))
        for link in links:
            if bias_name(layer) in link:  # the last one's stays
                model.get_parameter(f"{layer}.bias").copy_(link[bias_name(layer)])


def _tie(weight: Tensor, factors: Iterable[tuple[Tensor, Tensor, float]], exact: bool, transposed: bool) -> None:
    """All links of a layer, in place; `factors` are A, B and scaling of each. `transposed`: the weight is (in, out)."""
    remainder = torch.zeros(())
    for lora_A, lora_B, scaling in factors:
        delta = delta_weight(*as_weight_lies(lora_A, lora_B, transposed), scaling)
        remainder = add_link(weight, delta, remainder, exact)


class Merged:
    """What a weight of the base becomes, by links that are read from their files (`safe_open`) a layer at a time.
    `transposed`: the layers whose weights are (in, out)."""

    def __init__(self, links: Sequence[Any], scalings: Sequence[float], exact: bool, transposed: Container[str] = ()):
        self.links, self.scalings, self.exact, self.transposed = links, scalings, exact, transposed
        self.keys = [set(link.keys()) for link in links]

    def fits(self, weights: Mapping[str, str]) -> bool:
        """Whether all that the links change is among a base's weights: by key, the name in the model."""
        names = [key.removeprefix(PREFIX) for key in set().union(*self.keys)]
        changed = {f"{layer}.weight" for layer in layers_of(names)}
        changed |= {f"{layer}.bias" for layer in layers_of(names) if bias_name(layer) in names}
        return changed <= set(weights.values())

    @torch.no_grad()
    def of(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight of that name in the model, in the run's dtype; the tensor itself stays as it is."""
        layer, _, kind = name.rpartition(".")
        A, B, bias = (PREFIX + each for each in (*lora_names(layer), bias_name(layer)))
        if kind == "weight" and (having := self._having(A)):
            weight = tensor.to(dtype, copy=True)
            factors = ((link.get_tensor(A), link.get_tensor(B), scaling) for link, scaling in having)
            _tie(weight, factors, self.exact, layer in self.transposed)
            return weight
        if kind == "bias" and (having := self._having(bias)):
            return having[-1][0].get_tensor(bias).to(dtype)
        return tensor.to(dtype)

    def _having(self, key: str) -> list[tuple[Any, float]]:
        """The links that have it, and their scalings: those of earlier runs may be of other layers."""
        each = zip(self.links, self.scalings, self.keys, strict=True)
        return [(link, scaling) for link, scaling, keys in each if key in keys]


def lying_weights(base: ModelConfig, files: list[Path]) -> dict[str, str] | None:
    """By key in the files, the parameter that it is, of those that the model uses; "" of those that lie beside it, where it is a
    part of what the base is.

    None where a parameter is not what lies there in the run's dtype: where Transformers fuses it, or keeps it in fp32; where it
    is a buffer, quantised, or of a model that cannot be made without its weights.
    """
    try:
        model = _without_weights(base)
    except Exception:  # whatever its code raises; loading it whole says what is wrong, if anything is
        return None
    if model._get_dtype_plan(getattr(torch, DTYPES[base.dtype].torch_name)):
        return None
    held: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held |= {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    mapping = transformers_piece("conversion_mapping", "get_model_conversion_mapping")(model)
    names = names_in_model(model, held, mapping)
    known = set(model.state_dict())
    used = {key: name for key, name in names.items() if name is None or name in known}
    params = dict(model.named_parameters(remove_duplicate=False))
    beside = {} if is_whole(model, base) else dict.fromkeys(held.keys() - used.keys(), "")
    if all(name in params for name in used.values()) and all(held[key] in FLOATS for key in (*used, *beside)):
        return {key: name for key, name in used.items() if name is not None} | beside
    return None


def is_whole(model: Any, base: ModelConfig) -> bool:
    """Whether a model is all that its base's config describes: of one with a vision tower, Llama 4's say, Transformers opens the
    language model alone."""
    from transformers import AutoConfig

    options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    return type(AutoConfig.from_pretrained(base.path, **options)) is type(model.config)


def transposed_layers(base: ModelConfig) -> set[str]:
    """The layers of a base that has `lying_weights` whose weights are (in, out)."""
    return {name for name, module in _without_weights(base).named_modules() if is_transposed(module)}


def _without_weights(base: ModelConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    config = AutoConfig.from_pretrained(base.path, **options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=base.trust_remote_code)


def write_merged(files: list[Path], weights: Mapping[str, str], dtype: str, merged: Merged, out: Path) -> None:
    """Write the merged weights as files of the base's names, with an index where the base has several. One weight is held at a
    time; of the file that is read, what the kernel keeps."""
    kind = next(name for name, held in FLOATS.items() if held == getattr(torch, dtype))
    weight_map: dict[str, str] = {}
    size = 0
    with notices.Progress("exporting", "B", sum(file.stat().st_size for file in files)) as progress:
        passed = _Passed(progress)
        for file in files:
            with safe_open(file, framework="pt") as opened:
                slices = {key: opened.get_slice(key) for key in opened.keys() if key in weights}  # noqa: SIM118
                kinds = {key: (kind, list(held.get_shape())) for key, held in slices.items()}
                read: Callable[[str], Tensor] = partial(_read, opened, weights, merged, FLOATS[kind], passed)
                size += write_tensors(out / file.name, kinds, read)
                weight_map |= dict.fromkeys(kinds, file.name)
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


class _Passed:
    """Counts the bytes of the base's weights that have been merged."""

    def __init__(self, progress: notices.Progress):
        self.progress, self.bytes = progress, 0

    def add(self, count: int) -> None:
        self.bytes += count
        self.progress.at(self.bytes)


def _read(
    opened: Any, weights: Mapping[str, str], merged: Merged, dtype: torch.dtype, passed: _Passed, key: str
) -> Tensor:
    held = opened.get_tensor(key)
    passed.add(held.nbytes)
    return merged.of(weights[key], held, dtype)
