"""JSON Schema of a sweep's YAML: `cola-ds schema sweep`, kept as launch/sweep.schema.json."""

from __future__ import annotations

from cola_ds.config import json_schema
from cola_ds.config.json_schema import Schema
from cola_ds.sweep.plan import OWN_KEYS, Sweep

_SEEDS: Schema = {
    "type": "array", "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}, "minItems": 1, "uniqueItems": True,
}  # fmt: skip


def _by_name(what: str) -> Schema:
    """Names, with what differs for each."""
    return {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"anyOf": [{"$ref": f"#/$defs/{what}"}, {"type": "null"}]},
    }


BY_VALIDATORS: dict[str, Schema] = {
    "tasks": {
        "anyOf": [{"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}, _by_name("Overrides")]
    },
    "methods": _by_name("OverridesWithGrid"),
    "grid": {"$ref": "#/$defs/Grid"},
    "seeds": _SEEDS,
    "search_seeds": {"anyOf": [_SEEDS, {"const": "all"}, {"type": "null"}]},
}
"""What a validator of Sweep lets through, and which keys of a run there are."""


def sweep_schema() -> Schema:
    """The schema of a sweep's YAML."""
    return json_schema.sweep_schema(Sweep, BY_VALIDATORS, tuple(OWN_KEYS))
