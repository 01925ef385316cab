"""JSON Schema (draft 2020-12) of a run's YAML, for editors: `cola-ds schema run`, kept as launch/run.schema.json.

It follows from the pydantic schema. What a validator written in Python asks of a key is said here once more, as JSON Schema has
it. What keys say of each other, and whether 2.0 is a whole number (for JSON Schema it is), load_config alone knows.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cola_ds.config.fields import LIMIT
from cola_ds.config.keys import names_file
from cola_ds.config.schema import SECTIONS, RunConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

_COUNT: Schema = {"type": "integer", "minimum": 1, "exclusiveMaximum": LIMIT}
_NAME: Schema = {"type": "string", "minLength": 1}
_NULL: Schema = {"type": "null"}
_WEIGHT: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_SOURCES: Schema = {
    "anyOf": [_NAME, {"type": "array", "minItems": 1, "items": {"anyOf": [_NAME, {"$ref": "#/$defs/SourceConfig"}]}}, _NULL]
}  # fmt: skip


def _one_or_one_a_link(value: Schema) -> Schema:
    return {"anyOf": [value, {"type": "array", "items": value, "minItems": 1}]}


def _one_key(properties: Schema) -> list[Schema]:
    """Mappings of one key each."""
    return [
        {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}
        for key, value in properties.items()
    ]


_AT: Schema = {"type": "array", "items": _COUNT, "minItems": 1, "uniqueItems": True}
BY_VALIDATORS: dict[str, dict[str, Schema]] = {
    "LoraConfig": {
        "rank": _one_or_one_a_link(_COUNT),
        "train": _one_or_one_a_link({"enum": ["both", "A", "B"]}),
        "targets": {"anyOf": [{"const": "all-linear"}, {"type": "array", "items": _NAME, "minItems": 1}]},
    },
    "ChainConfig": {
        "knots": {
            "anyOf": [
                {"const": "even"},
                *_one_key({"epochs": _AT, "steps": _AT, "plateau": {"$ref": "#/$defs/PlateauConfig"}}),
            ]
        },
        "merge_weight": _one_or_one_a_link(_WEIGHT),
        "optimizer_at_knot": {
            "anyOf": [
                {"enum": ["reset", "keep"]},
                *_one_key({"prune": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}}),
            ]
        },
    },
    "DataConfig": {
        "train": _SOURCES,
        "eval": _SOURCES,
        "watch": _SOURCES,
        "tools": {"anyOf": [_NAME, {"type": "array", "items": {"type": "object"}, "minItems": 1}, _NULL]},
    },
    "EvalConfig": {"every": {"anyOf": [{"enum": ["epoch", "link", "end"]}, _COUNT]}},
}
"""By section and key, what a BeforeValidator of the schema lets through."""


def run_schema() -> Schema:
    """The schema of a run's YAML."""
    return _document("A run of cola_ds", RunConfig, BY_VALIDATORS)


def sweep_schema(sweep: type[BaseModel], by_validators: Schema, own_keys: tuple[str, ...]) -> Schema:
    """The schema of a sweep's YAML: `sweep`, its keys and, as overrides `section.key`, those of a run but for `own_keys`, which
    the sweep sets by itself."""
    run = run_schema()
    schema = _document("A sweep of cola_ds", sweep, {sweep.__name__: by_validators})
    overrides = {key: value for key, value in _flat(run).items() if key not in own_keys}
    closed = {"type": "object", "additionalProperties": False}
    deeper: Schema = {"^chain\\.(knots|optimizer_at_knot)\\.": True, "^data\\.tools\\.": True}
    referred = {key: {"$ref": f"#/$defs/Overrides/properties/{key}"} for key in overrides}
    lists: Schema = {
        key: {"type": "array", "items": value, "minItems": 1, "maxItems": 1000, "uniqueItems": True}
        for key, value in referred.items()
        if not names_file(key)  # a point of a grid is named by its values
    }
    lists["optim.lr"] = {"anyOf": [lists["optim.lr"], {"const": "paper"}]}
    with_grid = {**referred, "grid": {"$ref": "#/$defs/Grid"}}
    schema["$defs"] = {
        **{name: value for name, value in run["$defs"].items() if name in ("PlateauConfig", "SourceConfig")},
        "Overrides": {**closed, "properties": overrides, "patternProperties": deeper},
        "Grid": {**closed, "properties": lists},
        "OverridesWithGrid": {**closed, "properties": with_grid, "patternProperties": deeper},
    }
    return schema


def written(schema: Schema) -> str:
    """As the file of it has it."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _document(title: str, model: type[BaseModel], by_validators: dict[str, Any]) -> Schema:
    _, found = models_json_schema([(model, "validation")], ref_template="#/$defs/{model}")
    definitions = copy.deepcopy(found["$defs"])
    for name, keys in by_validators.items():
        for key, allowed in keys.items():
            said = definitions[name]["properties"][key]
            kept = {word: said[word] for word in ("default", "description") if word in said}
            definitions[name]["properties"][key] = {**copy.deepcopy(allowed), **kept}
    for definition in definitions.values():
        _tidy(definition)
    top = definitions.pop(model.__name__)
    return {"$schema": DRAFT, "title": title, **top, "$defs": definitions}


def _tidy(definition: Schema) -> None:
    """Without what says nothing: titles that are the keys again, defaults of whole sections, line ends in descriptions."""
    definition.pop("title", None)
    for said in (definition, *definition.get("properties", {}).values()):
        said.pop("title", None)
        if "$ref" in said:
            said.pop("default", None)
        if "description" in said:
            said["description"] = " ".join(said["description"].split())


def _flat(run: Schema) -> Schema:
    """The keys of a run as section.key, each with its schema, without its default: what no override says, the base does."""
    flat: Schema = {}
    for name, said in run["properties"].items():
        inner = run["$defs"][said["$ref"].rpartition("/")[2]]["properties"] if name in SECTIONS else {"": said}
        for key, value in inner.items():
            flat[f"{name}.{key}".rstrip(".")] = {word: held for word, held in value.items() if word != "default"}
    return flat
