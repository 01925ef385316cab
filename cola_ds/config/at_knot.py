"""What a knot does beside the tie as the paper has it: the values of chain.optimizer_at_knot and chain.merge_weight."""

from __future__ import annotations

from typing import Any

from cola_ds.errors import quoted


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def moments_of_next_link(value: Any) -> Any:
    """The value of chain.optimizer_at_knot, checked. Raises ValueError."""
    if value in ("reset", "keep"):
        return value
    if isinstance(value, dict) and set(value) == {"prune"} and _is_number(value["prune"]) and 0 < value["prune"] < 1:
        return {"prune": float(value["prune"])}
    raise ValueError("must be reset, keep or {prune: 0.9} with a share between 0 and 1")


def weights_of_links(value: Any) -> Any:
    """The value of chain.merge_weight, checked. Raises ValueError."""
    weights = value if isinstance(value, list) else [value]
    if weights and all(_is_number(weight) and 0 < weight <= 1 for weight in weights):
        return value
    raise ValueError("must be a number above 0, to 1, or one such number per link, like [1.0, 0.5]")


def check_at_knot(config: Any) -> None:
    """Raise ValueError where a run (a RunConfig) cannot do at its knots what it says."""
    chain, weight, optimizer = config.chain, config.chain.merge_weight, config.chain.optimizer_at_knot
    if isinstance(weight, list) and len(weight) != chain.length:
        raise ValueError(
            f"chain.merge_weight {quoted(weight)} names {len(weight)} links, but chain.length is {chain.length}"
        )
    if config.method != "cola" and weight not in (1, [1]):
        raise ValueError(f"chain.merge_weight {quoted(weight)} is for a chain: method {config.method} takes 1.0")
    if optimizer == "reset":
        return
    said = f"chain.optimizer_at_knot {quoted(optimizer)}"
    if config.method != "cola" or chain.length == 1:
        raise ValueError(f"{said} needs a link after the first: set method=cola and chain.length=2 or more, or reset")
    if len(set(config.lora_ranks)) > 1:
        raise ValueError(
            f"{said} needs links of one LoRA rank, whose moments have one shape, and lora.rank is {quoted(config.lora.rank)}; "
            "use one rank, or reset"
        )
    if len(set(config.lora_trains)) > 1:
        raise ValueError(
            f"{said} needs links that train the same factors, and lora.train is {quoted(config.lora.train)}; use one value, or "
            "reset"
        )
    if config.optim.name == "sgd":
        raise ValueError(f"{said} has nothing to keep: optim.name sgd has no moments; use adamw or adagrad, or reset")
