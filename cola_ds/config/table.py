"""The table of keys, generated from the schema: `python -m cola_ds.config.table > launch/KEYS.md`."""

from __future__ import annotations

import json
from typing import Any

from cola_ds.config.keys import by_content, is_fixed, is_free
from cola_ds.config.schema import SECTIONS, RunConfig

_HEAD = """\
# The keys of a run's YAML

Generated from `cola_ds/config/schema.py` by `python -m cola_ds.config.table > launch/KEYS.md`; a test holds it true.
On the command line a key is `section.key=value`. Paths are relative to the working directory.

The last column says what becomes of another value when a run goes on:

- free: it may change; it cannot change a result
- compared: it is refused, unless `--allow-change section.key` lets it through
- content: what it names is compared, wherever that lies: the weights, the examples, what the DeepSpeed JSON says
- fixed: it cannot change within a run, as tied links and the optimizer's state were made with it

A key that the YAML leaves out has its default; `-` means that there is none, and it must be given.
"""
_COLUMNS = ("key", "values", "default", "meaning", "resumed")
_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
_BOUNDLESS = 2**31  # the schema's own bound on what is counted


def key_table() -> str:
    """Markdown: a table a section, with each key's values, default, meaning, and what a resumed run makes of a change."""
    schema = RunConfig.model_json_schema()
    properties = schema["properties"]
    parts = [_HEAD, _table("At the top level", {k: v for k, v in properties.items() if k not in SECTIONS}, "")]
    for name in SECTIONS:
        section = schema["$defs"][properties[name]["$ref"].rpartition("/")[2]]
        parts.append(_table(f"`{name}`", section["properties"], f"{name}."))
        if name == "chain":
            nested = schema["$defs"]["PlateauConfig"]["properties"]
            parts.append(_table("`chain.knots: {plateau: {...}}`", nested, "chain.knots."))
    return "\n".join(parts)


def _table(title: str, properties: dict[str, Any], prefix: str) -> str:
    lines = [f"## {title}", "", _row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    for key, said in properties.items():
        default = f"`{_written(said['default'])}`" if "default" in said else "-"
        meaning = " ".join(said.get("description", "").split())
        lines.append(_row([f"`{key}`", _values(said), default, meaning, _resumed(prefix + key)]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _written(value: Any) -> str:
    """A default as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def _values(said: dict[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "anyOf" in said:
        return " or ".join(map(_values, said["anyOf"]))
    if "enum" in said:
        return ", ".join(f"`{value}`" for value in said["enum"])
    if said["type"] == "array":
        return "a list"
    if said["type"] == "object":
        return "a mapping"
    bounds = [f"{word} {said[bound]}" for bound, word in _BOUNDS.items() if said.get(bound, _BOUNDLESS) != _BOUNDLESS]
    return " ".join([_TYPES[said["type"]], *bounds])


def _resumed(key: str) -> str:
    """The one word of the last column."""
    words = {"free": is_free(key), "fixed": is_fixed(key), "content": by_content(key)}
    return next((word for word, holds in words.items() if holds), "compared")


if __name__ == "__main__":
    print(key_table(), end="")
