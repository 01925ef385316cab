"""Kernels: Liger's (arXiv 2410.10989), written in Triton, for what a model does between its matrix products."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from typing import Any

from torch import Tensor

from cola_ds.config.schema import ModelConfig
from cola_ds.distributed import accelerator
from cola_ds.errors import UserError, first_line

_ROPE = "apply_rotary_pos_emb"
_WANTED = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True, "layer_norm": True}
_UNWANTED = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""The loss is evaluation/fused_loss.py's: its head may be in shards, and its labels are where logits are wanted."""


def check_kernels(config: ModelConfig, model: Any) -> bool:
    """Whether a run gets Liger's kernels. `model` may be on the meta device. Raises UserError for kernels that were asked for and
    cannot be had."""
    if config.kernels == "torch":
        return False
    if config.kernels == "auto" and config.dtype == "fp32":  # fp32 is there for its last bits
        return False
    why = "model.compile compiles what they do" if config.compile else _why_not(model)
    if config.kernels == "liger" and why is not None:
        raise UserError(f"model.kernels liger is not for this run: {why}; use torch")
    return why is None


def _why_not(model: Any) -> str | None:
    if accelerator.kind() != "cuda":
        return f"Liger's kernels are not for {accelerator.kind()}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install 'cola_ds[kernels]'"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:  # one that does not go with this torch or Transformers
        return f"liger-kernel cannot be imported here ({first_line(error)})"
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has none for {model.config.model_type}"
    return None


def use_kernels(model: Any) -> None:
    """Give a loaded model Liger's norms, rotary embeddings and gated MLPs; its parameters stay where they are.

    Liger puts its classes into the model's module too, where later models of the process would be made of them: only the rotary
    embedding stays there, for what is on a GPU.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it warns of each backend that is not there
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    known = inspect.signature(patch).parameters
    module = vars(sys.modules[type(model).__module__])
    before = dict(module)
    patch(model=model, **{name: value for name, value in (_WANTED | _UNWANTED).items() if name in known})
    fast, plain = module.get(_ROPE), before.get(_ROPE)
    module.update(before)
    if fast is not plain and not hasattr(plain, "on_gpus"):
        module[_ROPE] = _by_device(fast, plain)


def _by_device(fast: Any, plain: Any) -> Any:
    def rope(
        query: Tensor, *args: Any, **words: Any
    ) -> Any:  # the model without weights that FLOPs are counted on has no memory
        return (fast if query.is_cuda else plain)(query, *args, **words)

    rope.on_gpus = fast  # type: ignore[attr-defined]
    return rope
