"""Which layers of a model can have a link, and how their weights lie. Plain torch, no collectives.

    nn.Linear             weight (out, in)
    Conv1D (GPT-2)        weight (in, out): the same layer, its weight transposed
    FalconLinear          an nn.Linear that adds its bias in an operation of its own

Projections that a model has fused (qkv_proj, query_key_value, gate_up_proj, c_attn) are such layers. Experts that are fused into
weights of three dimensions are none, nor are the routers in front of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cola_ds.errors import UserError, some_of


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight is (in, out): a Conv1D's, whether it has a link or not."""
    return bool(getattr(layer, "transposed", _is_conv1d(layer)))


def any_transposed(model: nn.Module, names: list[str]) -> bool:
    """Whether a layer of these is: an adapter's fan_in_fan_out. (PEFT corrects that itself where layers differ.)"""
    return any(is_transposed(model.get_submodule(name)) for name in names)


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """in and out of a layer that a link can be on, with one or without."""
    found: Any = layer
    return (found.nx, found.nf) if _is_conv1d(layer) else (found.in_features, found.out_features)


def is_linear(layer: nn.Module) -> bool:
    """Whether a link can be on that layer. Not on others that are made from nn.Linear, such as Llama 4's router: what they do
    with their weight may be anything."""
    return type(layer) is nn.Linear or _is_conv1d(layer) or _is_of_transformers(layer, "FalconLinear")


def _is_conv1d(layer: nn.Module) -> bool:
    return _is_of_transformers(layer, "Conv1D")


def _is_of_transformers(layer: nn.Module, name: str) -> bool:
    # By name: importing the class takes seconds, and where a model has such a layer somebody has.
    return type(layer).__name__ == name and type(layer).__module__.startswith("transformers.")


def find_targets(model: Any, targets: str | list[str]) -> list[str]:
    """Names of the layers that `targets` selects: suffixes such as q_proj or mlp.down_proj, or all-linear.

    all-linear means every linear layer (`is_linear`) but the output head. Of a model that sees or hears, too, its language model
    alone is looked at: no gradient of a text reaches the rest. Raises UserError for a suffix that matches nothing (the
    message lists what there is), a match that is not linear, all-linear in a model whose experts are fused, and an output head
    whose weight is the input embedding.
    """
    modules = _of_language(model)
    linear = {name: module for name, module in modules.items() if is_linear(module)}
    if targets == "all-linear":
        return _all_linear(model, modules, linear)
    known = sorted({name.rpartition(".")[2] for name in linear})
    for suffix in targets:
        _check_suffix(modules, suffix, f"this model's linear layers are {', '.join(known) or 'none'}")
    names = [name for name in linear if any(_matches(name, suffix) for suffix in targets)]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for name in names:
        if embedding is not None and linear[name].weight is embedding.weight:
            raise UserError(f"lora.targets matches {name}, whose weight is also the input embedding; leave it out")
    return names


def _matches(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _of_language(model: Any) -> dict[str, nn.Module]:
    """The modules by name that text goes through: all of them, or the language model's and the output head."""
    modules = dict(model.named_modules())
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return modules
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = next(name for name, module in modules.items() if module is decoder)
    return {name: module for name, module in modules.items() if name.startswith(f"{inside}.") or module is head}


def _all_linear(model: Any, modules: dict[str, nn.Module], linear: dict[str, nn.Module]) -> list[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [name for name, module in linear.items() if module is not head]
    if not names:
        raise UserError(
            "lora.targets all-linear matches no layer: this model has no linear layer besides its output head"
        )
    experts = _fused_experts(modules)
    if experts:  # most of the model: nobody who asked for all of it wants it left out without a word
        name, weight = next(iter(experts.items()))
        others = sorted({each.rpartition(".")[2] for each in names})
        raise UserError(
            f"lora.targets all-linear: {_what(name, weight)}, and cannot have a link; name the layers that shall have one, of "
            f"{some_of(others, ', ')}"
        )
    return names


def _check_suffix(modules: dict[str, nn.Module], suffix: str, known: str) -> None:
    matched = [(name, module) for name, module in modules.items() if _matches(name, suffix)]
    experts = _fused_experts(modules)
    for name, weight in experts.items():
        if _matches(name, suffix) or _matches(name.rpartition(".")[0], suffix):
            # down_proj of Llama 4: a layer of the shared expert's, and the name of the others' weight
            layers = sorted({".".join(each.split(".")[-2:]) for each, module in matched if is_linear(module)})
            remedy = f"{', '.join(layers)} can: name that" if layers else known
            raise UserError(f"lora.targets {suffix}: {_what(name, weight)}, and cannot have a link; {remedy}")
    if not matched:  # it may be a name that an expert's matrix has in the files, or had before they were fused
        why = f"; {_what(*next(iter(experts.items())))}" if experts else ""
        raise UserError(f"lora.targets {suffix} matches no layer; {known}{why}")
    for name, module in matched:
        if not is_linear(module):
            raise UserError(
                f"lora.targets {suffix} matches {name}, a {type(module).__name__} and not an nn.Linear or Conv1D, which is all "
                f"that is supported; {known}"
            )


def _fused_experts(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """By name, the weights that hold a matrix of each of several experts. (A convolution's have three dimensions, too.)"""
    return {
        f"{name}.{part}": weight
        for name, module in modules.items()
        if not isinstance(module, _ConvNd)
        for part, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and weight.shape[0] > 1
    }


def _what(name: str, weight: Tensor) -> str:
    count, *_ = weight.shape
    return f"{name} is no layer but {count} experts' matrices in one weight {tuple(weight.shape)}"
