"""Links that are tied to the base before the run's own: whether they fit, and the tie."""

from __future__ import annotations

from functools import partial
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from cola_ds.config.schema import RunConfig
from cola_ds.distributed import collectives
from cola_ds.errors import UserError, cut, first_line, some_of
from cola_ds.lora.remainders import Remainder
from cola_ds.lora.targets import is_linear, sizes_of
from cola_ds.lora.tie import put_bias, tie_saved
from cola_ds.run.earlier import Earlier, EarlierLink, find_earlier
from cola_ds.run.peft_files import bias_name, lora_names


def check_earlier(config: RunConfig, skeleton: nn.Module, earlier: Earlier | None) -> None:
    """Raise UserError for links of another base, naming the modules that differ, or of a run that ties otherwise."""
    if earlier is None:
        return
    wrong = [said for link in earlier.links for said in _misfits(skeleton, link)]
    if wrong:
        raise UserError(
            f"{earlier.named} is for another base than model.path {config.model.path}: "
            f"{some_of(list(dict.fromkeys(wrong)), '; ')}"
        )
    theirs = earlier.config
    if theirs is None or not config.trains:
        return
    if theirs.model.dtype != config.model.dtype:
        raise UserError(
            f"{earlier.named} was tied in {theirs.model.dtype}, and model.dtype is {config.model.dtype}; set "
            f"model.dtype={theirs.model.dtype}"
        )
    if theirs.chain.merge != config.chain.merge and config.model.dtype != "fp32":
        raise UserError(
            f"{earlier.named} was tied with {theirs.chain.merge} merges, and chain.merge is {config.chain.merge}; set "
            f"chain.merge={theirs.chain.merge}"
        )


def _misfits(skeleton: Any, link: EarlierLink) -> list[str]:
    """What of a link does not fit the model, module by module."""
    modules, found = dict(skeleton.named_modules()), []
    embedding = skeleton.get_input_embeddings()
    for layer, ((_, columns), (rows, _)) in link.shapes.items():
        module = modules.get(layer)
        if module is None:
            found.append(f"it has no {cut(layer)}")
        elif not is_linear(module):
            found.append(f"its {layer} is a {type(module).__name__} and not an nn.Linear or Conv1D")
        elif sizes_of(module) != (columns, rows):
            found.append(f"its {layer} is {sizes_of(module)[::-1]}, the link's {(rows, columns)}")
        elif module.weight is embedding.weight:
            found.append(f"the weight of its {layer} is also the input embedding")
        elif layer in link.biases and (module.bias is None or tuple(module.bias.shape) != link.biases[layer]):
            found.append(f"its {layer} has no bias of shape {link.biases[layer]}")
    return found


def tie_earlier(
    model: nn.Module, config: RunConfig, base: str, targets: list[str], remainders: dict[str, Remainder], reads: bool
) -> tuple[int, Earlier | None]:
    """Tie the links that come before the run's own, in order, to the base, whose fingerprint is `base`. Collective; they are
    those that process 0, which alone `reads`, finds. Before the engine is built.

    `remainders` takes up, for the layers that the run itself trains, what rounding keeps out of their weights: its own links are
    added to the sum, as if one run had tied all. Returns how many links were drawn for them; and on process 0 what they are.

    Raises UserError for links that are not there any more, have changed, or belong to another base model.
    """
    found: list[Earlier] = []
    facts = collectives.on_rank_0(lambda: _facts(config, base, found))
    earlier = found[0] if found else None
    for number, link in enumerate(facts["links"]):
        tensors: dict[str, Tensor] = {}
        collectives.on_rank_0(partial(_read, earlier if reads else None, number, tensors))
        # An evaluation ties nothing more: of it nothing is kept.
        last = not config.trains and link is facts["links"][-1]
        for layer, (of_A, of_B) in link["shapes"].items():
            lora_A, lora_B = (
                collectives.broadcast_tensor(tensors.get(key), shape[0] * shape[1]).view(shape)
                for key, shape in zip(lora_names(layer), (of_A, of_B), strict=True)
            )
            factors = (lora_A, lora_B, link["scaling"])
            tie_saved(model, layer, factors, remainders, facts["local"], facts["exact"], last)
        for layer, (size,) in link["biases"].items():
            put_bias(model.get_submodule(layer), collectives.broadcast_tensor(tensors.get(bias_name(layer)), size))
    for layer in remainders.keys() - (set(targets) if config.trains else set()):
        del remainders[layer]
    return facts["drawn"], earlier


def _read(earlier: Earlier | None, number: int, into: dict[str, Tensor]) -> None:
    assert earlier is not None
    try:
        into.update(earlier.links[number].read())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{earlier.links[number].folder} is damaged: {first_line(error)}; copy it anew") from None


def _facts(config: RunConfig, base: str, found: list[Earlier]) -> dict[str, Any]:
    earlier = find_earlier(config, verified=True)
    assert earlier is not None
    if earlier.base is not None and earlier.base != base:
        raise UserError(
            f"{earlier.named} belongs to another base model: its fingerprint is {earlier.base[:16]}, model.path's {base[:16]}"
        )
    found.append(earlier)
    # An evaluation ties as the run did whose links they are, whatever its own config says of chains.
    by = config if config.trains or earlier.config is None else earlier.config
    links = []
    for link in earlier.links:
        r = link.lora_rank  # with which all layers are read
        shapes = {layer: ((r, of_A[1]), (of_B[0], r)) for layer, (of_A, of_B) in link.shapes.items()}
        links.append({"shapes": shapes, "biases": link.biases, "scaling": link.scaling})
    drawn = sum(link.stands_for for link in earlier.links)
    return {"links": links, "drawn": drawn, "local": by.chain.tie == "local", "exact": by.chain.merge == "exact"}
