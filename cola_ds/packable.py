"""Whether a model can take an example's candidates in one row (data/packing.py)."""

from __future__ import annotations

import inspect
from typing import Any

from cola_ds.errors import UserError


def check_packable(model: Any, max_length: int | None = None) -> None:
    """Refuse (UserError) a causal LM in which a row of candidates would not be what each candidate is alone.

    It must take an attention mask and position ids of ours, and let them decide. A sliding window that no text of at most
    `max_length` ids fills decides nothing.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else [])) - {"full_attention"}
    if window and max_length and max_length <= window:
        layers.discard("sliding_attention")
    if config._attn_implementation not in ("eager", "sdpa"):
        why = f"its attention is {config._attn_implementation}, which takes no such mask; load it with sdpa or eager"
    elif layers:
        why = f"it has layers with {', '.join(sorted(layers))}" + (f" (a window of {window} ids)" if window else "")
    elif getattr(model, "_is_stateful", False):
        why = "it is recurrent"
    elif "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        why = "it takes no position_ids"
    else:
        return
    raise UserError(f"{type(model).__name__} cannot take an example's candidates in one row, as a task needs it: {why}")
