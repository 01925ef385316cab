"""Attention: which kernel a model runs with, and varlen, which takes the examples of a micro batch end to end in one row.

With varlen nothing is padded and no mask is made: attention gets the places where examples begin (cu_seq_lens, as Transformers'
flash attention does) and computes each by itself. On CUDA that is torch.nn.attention.varlen, which comes with torch; on the CPU
a product for each example. A pass that brings a mask and no such places (candidates of one example, generation) goes through
SDPA.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from cola_ds.config.dtypes import DTYPES
from cola_ds.config.schema import ModelConfig
from cola_ds.data.batch import PackedBatch
from cola_ds.data.candidates import without_full_attention
from cola_ds.distributed import accelerator
from cola_ds.distributed.compilation import mark_dynamic
from cola_ds.errors import UserError
from cola_ds.evaluation.each_alone import each_alone

VARLEN = "cola_ds_varlen"
"""Its name in Transformers' attention interface."""
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
"""What configs call the dropout of attention's weights, which varlen and flex have not."""
_OTHERWISE = {"auto": None, "varlen": None, "flex": "flex_attention"}


def transformers_name(attention: str) -> str | None:
    """What Transformers calls a model.attention; None where it chooses, or where ours is not registered yet."""
    return _OTHERWISE.get(attention, attention)


def shown_name(attention: str | None) -> str:
    """What people call an attention that `choose_attention` has returned."""
    return {VARLEN: "varlen", None: "Transformers' choice"}.get(attention, str(attention))


def attention_of(model: Any) -> str:
    """What people call the attention that a model runs with."""
    return shown_name(model.config.get_text_config()._attn_implementation)


def choose_attention(config: ModelConfig, model: Any, max_length: int, is_text: bool) -> str | None:
    """Transformers' name of the attention that a run gets; None where Transformers chooses. `model` may be on the meta device.

    auto is varlen where the model, the device and the data can have it. Of a task, whose candidates need a mask, varlen is what
    Transformers chooses. Raises UserError for a varlen that was asked for and cannot be had.
    """
    if config.attention == "flex":
        _check_flex(model, accelerator.kind())
    if not is_text or config.attention not in ("auto", "varlen"):
        return transformers_name(config.attention)
    why = _why_not_varlen(config, model, max_length)
    if why is None:
        _register()
        return VARLEN
    if config.attention == "varlen":
        raise _no_varlen(model, why)
    return None


def check_anywhere(config: ModelConfig, model: Any, max_length: int, is_text: bool) -> str | None:
    """The attention of a run on a device that can do all, as `choose_attention` names it. Raises UserError for what no device
    makes good."""
    if config.attention == "flex":
        _check_flex(model, "")
    if not is_text or config.attention not in ("auto", "varlen"):
        return transformers_name(config.attention)
    why = _why_never_varlen(model, max_length)
    if why is not None and config.attention == "varlen":
        raise _no_varlen(model, why)
    return VARLEN if why is None else None


def _no_varlen(model: Any, why: str) -> UserError:
    return UserError(f"model.attention varlen is not for {type(model).__name__} here: {why}; use auto")


def _check_flex(model: Any, device: str) -> None:
    inner = model.config.get_text_config()
    dropouts = [f"it has {name} {getattr(inner, name)}" for name in _DROPOUTS if getattr(inner, name, None)]
    cpu = ["torch's flex attention has no gradients on the CPU"] if device == "cpu" else []
    for why in cpu + dropouts:
        raise UserError(f"model.attention flex is not for {type(model).__name__} here: {why}; use auto")


def _why_never_varlen(model: Any, max_length: int) -> str | None:
    """Why a model can have varlen on no device; None: it may. `model` may be on the meta device."""
    inner = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False) or not getattr(model, "_supports_sdpa", False):
        return "its code does not take attention from Transformers' interface"
    if why := without_full_attention(model, max_length):
        return why
    if getattr(inner, "v_head_dim", None):
        return "its values may have heads of another size than its keys"
    for name in (*_DROPOUTS, "attn_logit_softcapping"):
        if getattr(inner, name, None):
            return f"it has {name} {getattr(inner, name)}"
    return None


def _why_not_varlen(config: ModelConfig, model: Any, max_length: int) -> str | None:
    if why := _why_never_varlen(model, max_length):
        return why
    if accelerator.kind() == "cpu":
        return None
    if accelerator.kind() != "cuda":
        return f"torch's varlen is not for {accelerator.kind()}"
    if (has := accelerator.capability()) is not None and has < (8, 0):
        return f"torch's varlen needs compute capability 8.0, and the device has {has[0]}.{has[1]}"
    inner = model.config.get_text_config()
    head = getattr(inner, "head_dim", None) or inner.hidden_size // inner.num_attention_heads
    if DTYPES[config.dtype].torch_name == "float32":
        return "torch's varlen needs model.dtype bf16 or fp16"
    if head > 256 or head % 8:
        return f"torch's varlen has no heads of {head}"
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def packed_inputs(model: Any, batch: PackedBatch) -> dict[str, Any]:
    """What a model with varlen or flash attention is told of where examples begin; nothing for others."""
    name = model.config.get_text_config()._attn_implementation
    if name != VARLEN and not name.startswith("flash_attention"):
        return {}
    mark_dynamic(batch.cu_seq_lens)
    places = {"cu_seq_lens_q": batch.cu_seq_lens, "cu_seq_lens_k": batch.cu_seq_lens}
    inputs: dict[str, Any] = {**places, "max_length_q": batch.longest, "max_length_k": batch.longest}
    if name == VARLEN:  # a mask of four dimensions is passed on as it is: none is made, and none is looked at
        inputs["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=batch.input_ids.device)
    return inputs


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # (B, heads, T, D), (B, key heads, T, D) twice -> (B, T, heads, D)
    """Causal attention within each of the stretches [cu_seq_lens_q[i], cu_seq_lens_q[i + 1]) of the rows, laid end to end.

    Raises RuntimeError for dropout, which it has not: where a config calls that by a name that nobody knew.
    """
    if options.get("dropout"):
        raise RuntimeError(f"varlen has no dropout, and {type(module).__name__} asks for {options['dropout']}")
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))  # (B T, heads, D)
    if query.device.type == "cpu":
        found = each_alone(q, k, v, cu_seq_lens_q, scaling)
    else:
        assert max_length_q is not None
        found = _flash(q, k, v, cu_seq_lens_q, max_length_q, scaling)
    return found.view(len(query), -1, *found.shape[1:]), None


@torch.compiler.assume_constant_result
def _varlen_options() -> list[str]:
    from torch.nn.attention.varlen import varlen_attn

    return list(inspect.signature(varlen_attn).parameters)


def repeats_keys() -> bool:
    """Whether this torch's varlen wants as many heads of keys and values as of queries: 2.11 does."""
    return "enable_gqa" not in _varlen_options()


def _flash(query: Tensor, key: Tensor, value: Tensor, places: Tensor, longest: int, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    known = _varlen_options()
    if "window_size" not in known:  # torch 2.10
        options = {"is_causal": True}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not repeats_keys():
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    return cast(Tensor, varlen_attn(query, key, value, places, places, longest, longest, scale=scaling, **options))
