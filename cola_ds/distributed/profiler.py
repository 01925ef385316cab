"""DeepSpeed's flops profiler."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from deepspeed.profiling.flops_profiler import FlopsProfiler
from torch import Tensor


def forward_flops(model: Any, input_ids: Tensor, positions: Tensor) -> int:
    """What DeepSpeed's profiler counts for one forward pass of a causal LM on the meta device, with ids (B, T) and logits at
    `positions` (K,) only, where the architecture offers that."""
    # With a mask of this shape, transformers asks for no values, and the meta device has none.
    mask = torch.empty(input_ids.shape[0], 1, input_ids.shape[1], input_ids.shape[1], device="meta", dtype=model.dtype)
    inputs: dict[str, Any] = {"input_ids": input_ids.to("meta"), "attention_mask": mask, "use_cache": False}
    known = inspect.signature(model.forward).parameters
    if "position_ids" in known:  # OPT would find them in a mask of another shape
        inputs["position_ids"] = torch.empty_like(input_ids, device="meta")
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = positions.to("meta")
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    try:
        with torch.no_grad():
            model(**inputs)
        return int(profiler.get_total_flops())
    finally:
        profiler.end_profile()
