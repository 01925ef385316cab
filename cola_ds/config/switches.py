"""Which switches of a chain's links are not as the paper (arXiv 2401.04151) has them."""

from __future__ import annotations

from typing import Any

from cola_ds.config.schema import RunConfig


def switches(config: RunConfig) -> list[str]:
    """What of the links of a chain, or of LoRA, is not as the paper has it: a few words each; none where all is."""
    lora, chain, found = config.lora, config.chain, []
    if lora.init != "gaussian":
        found.append(f"lora.init {lora.init}")
    if lora.scaling != "alpha/r":
        found.append(f"lora.scaling {lora.scaling}")
    if set(config.lora_trains) != {"both"}:
        found.append(f"lora.train {_said(lora.train)}")
    if config.optim.lr_ratio != 1:
        found.append(f"B's learning rate {config.optim.lr_ratio:g} times A's")
    if config.tied_weights != [1.0] * chain.length:
        found.append(f"chain.merge_weight {_said(chain.merge_weight)}")
    if chain.optimizer_at_knot != "reset":
        found.append(f"chain.optimizer_at_knot {_said(chain.optimizer_at_knot)}")
    return found


def _said(value: Any) -> str:
    """A key's value as a YAML has it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_said(each)}' for key, each in value.items())}}}"
    return f"[{', '.join(map(_said, value))}]" if isinstance(value, list) else str(value)
