"""Which weight of a model a tensor in its files is, as Transformers' loader says. Nothing here imports deepspeed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import version
from typing import Any

from cola_ds.errors import UserError


def transformers_piece(module: str, name: str) -> Any:
    """What Transformers promises nobody. Raises UserError where it is gone."""
    try:
        return getattr(import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError):
        raise UserError(
            f"Transformers {version('transformers')} has no {module}.{name} as 5.24.0 has; pip install transformers==5.24.0"
        ) from None


def names_in_model(model: Any, keys: Iterable[str], mapping: list[Any]) -> dict[str, str | None]:
    """By key in the files, the name in the model; None where that weight is converted from what lies in the files. `mapping` are
    Transformers' conversions for the model. A name that the model does not know is that of a weight which it does not use."""
    kinds = ("WeightRenaming", "WeightConverter")
    renamings, converters = (
        [entry for entry in mapping if isinstance(entry, transformers_piece("core_model_loading", kind))]
        for kind in kinds
    )
    rename_source_key = transformers_piece("core_model_loading", "rename_source_key")
    known = dict(model.state_dict(keep_vars=True))
    found = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        found[key] = name if converted is None else None
    return found
