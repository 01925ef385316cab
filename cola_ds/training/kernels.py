"""Kernels: Liger's (arXiv 2410.10989), written in Triton, for what a model does between its matrix products."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

from cola_ds.config.schema import ModelConfig
from cola_ds.distributed import accelerator
from cola_ds.errors import UserError

_WANTED = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True, "layer_norm": True}
_UNWANTED = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""The loss is evaluation/fused_loss.py's: its head may be in shards, and its labels are where logits are wanted."""


def check_kernels(config: ModelConfig, model: Any) -> bool:
    """Whether a run gets Liger's kernels. `model` may be on the meta device. Raises UserError for kernels that were asked for and
    cannot be had."""
    if config.kernels == "torch":
        return False
    why = _why_not(model)
    if config.kernels == "liger" and why is not None:
        raise UserError(f"model.kernels liger is not for this run: {why}; use torch")
    return why is None and not (config.kernels == "auto" and config.dtype == "fp32")  # there for its last bits


def _why_not(model: Any) -> str | None:
    if accelerator.kind() != "cuda":
        return f"Liger's kernels are not for {accelerator.kind()}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install 'cola_ds[kernels]'"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has none for {model.config.model_type}"
    return None


def use_kernels(model: Any) -> None:
    """Give a loaded model Liger's norms, rotary embeddings and gated MLPs; its parameters stay where they are."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    patch = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    known = inspect.signature(patch).parameters
    patch(model=model, **{name: value for name, value in (_WANTED | _UNWANTED).items() if name in known})
