"""Model FLOPs: the work that a step needs, whatever is computed besides, for TFLOP/s and model FLOPs utilisation (MFU).

Counted are matrix products, at 2 for each multiplication with its addition:

    a token, a frozen weight that it is multiplied by      4   2 forward, 2 for the gradient of its input
    a token, a trained weight (A, B; method full: all)     6   2 more for the weight's own gradient
    a pair of positions, one of which sees the other      12   per attention head and its width: scores and values, with gradients

The output head counts where a next token is predicted. Below the first block that is trained a weight counts 2, and a pair 4:
no gradient goes there. Tables of embeddings count nothing, nor do padding, the half of attention that its mask hides, and what
is computed twice to save memory. 6 for frozen weights too would be 1.5 times too much.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy
from torch import nn

from cola_ds.data.batch import StepExamples
from cola_ds.lora.targets import sizes_of
from cola_ds.training.prepared import Described, Prepared


@dataclass(frozen=True)
class LinkWork:
    """What the examples of a link's steps cost, in FLOPs."""

    per_token: int
    per_prediction: int
    """Of the output head."""
    per_pair: dict[int | None, int]
    """Of attention, by the window of its layers (positions that each sees, itself included; None: all before it)."""

    def of(self, examples: StepExamples) -> int:
        """The FLOPs that a step with these examples needs, on all processes together."""
        total = self.per_token * examples.tokens + self.per_prediction * examples.predictions
        return total + sum(cost * pairs(examples.lengths, window) for window, cost in self.per_pair.items())


def pairs(lengths: list[int], window: int | None) -> int:
    """How many pairs causal attention has in texts of these lengths: a position sees itself and those before it, `window` of them
    at most."""
    each = numpy.asarray(lengths, dtype=numpy.int64)
    seen = each if window is None else numpy.minimum(each, window)
    return int((seen * (seen + 1) // 2 + (each - seen) * seen).sum())


def work_of(prepared: Prepared | Described) -> list[LinkWork]:
    """The work of each link, in order. Raises ValueError for a model whose work is not that of a dense transformer."""
    config = prepared.config
    kinds = list(zip(config.lora_ranks, config.lora_trains, strict=True))
    works = {kind: link_work(prepared, *kind, started=config.starts_elsewhere) for kind in {*kinds}}
    return [works[kind] for kind in kinds]


def link_work(prepared: Prepared | Described, lora_rank: int, train: str = "both", started: bool = False) -> LinkWork:
    """The work of a link of that LoRA rank, which trains both, A or B, and may be `started` elsewhere than at zero. Raises
    ValueError as `work_of` does."""
    skeleton, targets = prepared.skeleton, set(prepared.targets)
    config = skeleton.config.get_text_config()
    if getattr(config, "num_experts_per_tok", None):
        raise ValueError("a model with experts: a token is multiplied by some of its weights")
    head, is_full = skeleton.get_output_embeddings(), prepared.config.method == "full"
    block, number = _first_trained_block(prepared, config)
    reached, per_token, per_prediction = is_full, 0, 0
    for name, module in skeleton.named_modules():
        reached = reached or name == block or name in targets  # they come in the order of the forward pass
        if isinstance(module, nn.Embedding):
            continue
        weights = [weight for weight in module.parameters(recurse=False) if weight.ndim > 1]
        if any(weight.ndim > 2 for weight in weights):
            raise ValueError(f"{name} ({type(module).__name__}) has weights that are no matrix")
        cost = sum(weight.numel() for weight in weights) * (6 if is_full else 4 if reached else 2)
        if name in targets:
            factors = dict(zip("AB", sizes_of(module), strict=True))
            cost += lora_rank * sum((6 if train in ("both", each) else 4) * size for each, size in factors.items())
            cost += 4 * lora_rank * sum(factors.values()) if started else 0
        if module is head:
            per_prediction += cost
        else:
            per_token += cost
    return LinkWork(per_token, per_prediction, _attention(config, number))


def _first_trained_block(prepared: Prepared | Described, config: Any) -> tuple[str, int]:
    """The first block that has a target: its name, and its number from 0. The number of blocks where none has; 0 where all is
    trained, or where it cannot be told."""
    for name, module in prepared.skeleton.named_modules():
        if prepared.targets and isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            inside = [target.removeprefix(f"{name}.") for target in prepared.targets if target.startswith(f"{name}.")]
            first = min((int(target.partition(".")[0]) for target in inside), default=len(module))
            return f"{name}.{first}", first
    return "", 0


def _attention(config: Any, first: int) -> dict[int | None, int]:
    """FLOPs of a pair of positions in all layers, by their window; those before layer `first` get no gradient."""
    heads = config.num_attention_heads
    forward = 4 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None)
    usual = "sliding_attention" if window else "full_attention"
    found: Counter[int | None] = Counter()
    for layer, kind in enumerate(getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers):
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"a model with layers of {kind}")
        found[window if kind == "sliding_attention" else None] += forward if layer < first else 3 * forward
    return dict(found)
