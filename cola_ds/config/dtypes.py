"""The dtypes that a model is stored and computed in, by the names that model.dtype has for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """What others call a dtype, and what it takes."""

    torch_name: str
    """Its name in torch, and in a model's config.json."""
    element_bytes: int
    engine_sections: tuple[str, ...] = ()
    """The sections of a DeepSpeed JSON that turn it on; DeepSpeed computes in fp32 where none does."""


DTYPES = {
    "fp32": Dtype("float32", 4),
    "bf16": Dtype("bfloat16", 2, ("bf16", "bfloat16")),
    "fp16": Dtype("float16", 2, ("fp16",)),
}
