"""A run's YAML: read, overridden, checked against the schema, with messages that name key, value and remedy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cola_ds.config.parsing import dump_yaml, parse_yaml, read_text
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError, cut, quoted

_EXPLAINED = 4  # mistakes in one message


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML, apply `section.key=value` overrides in order, and check it.

    Raises UserError, in one line, for a missing file, bad YAML, an unknown key, a wrong type, a value out of range, or
    keys that contradict each other.
    """
    raw = parse_yaml(read_text(path, "the run's YAML"), str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{cut(str(path))} holds no keys; a run's YAML has sections such as model, data and optim")
    return check_config(raw, overrides or [], str(path))


def check_config(raw: dict[str, Any], overrides: list[str], source: str) -> RunConfig:
    """The config that the keys of `source` and the overrides make. Raises UserError, in one line."""
    for override in overrides:
        apply_override(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{cut(source)}: {explain_some(error)}") from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set what `section.key=value` says in a config's keys. Raises UserError for one that does not look like that."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise UserError(f"override {quoted(override)} must look like section.key=value, for example optim.lr=5e-4")
    *sections, key = name.split(".")
    target: Any = raw
    for section in sections:
        inner = target.get(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {cut(name)}: {cut(section)} is a value, not a section")
        target[section] = target = dict(inner)  # an alias may have made it another section, too
    target[key] = parse_yaml(text, f"override {name}")


def explain_some(error: ValidationError) -> str:
    """The first few of a pydantic error's mistakes, and how many there are more."""
    mistakes = list(dict.fromkeys(explain(dict(each)) for each in error.errors(include_url=False)[:_EXPLAINED]))
    more = error.error_count() - _EXPLAINED
    return "; ".join(mistakes) + (f"; and {more} more" if more > 0 else "")


def explain(error: dict[str, Any]) -> str:
    """One pydantic error as a sentence that names the key, the value and the remedy."""
    # Only names of keys stay: pydantic adds the tags of unions and positions in lists.
    names = [cut(str(part), 80) for part in error["loc"]]
    key, kind, message = ".".join(names), error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = keys_of(names[:-1])
        nearest = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*names[:-1], nearest[0]])}?" if nearest else f"known are {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if kind == "missing":
        return f"missing key {key}"
    if not names or (kind == "value_error" and message.startswith(f"{names[0]}.")):
        return message
    value = error["input"]
    if kind == "value_error":
        return f"{key} {message}; it is {quoted(value)}"
    as_text = " (text: write numbers without quotes)" if isinstance(value, str) and "number" in message + kind else ""
    if kind in ("model_type", "dict_type"):
        return f"{key} must be a section, with its keys below it; it is {quoted(value)}"
    message = message.removeprefix("Input ").replace("should be", "must be")
    message = message.replace("a valid integer", "an integer").replace("a valid ", "a ")
    return f"{key} {message}; it is {quoted(value)}{as_text}"


def keys_of(names: list[str]) -> list[str]:
    section: Any = RunConfig
    for name in names:
        field = section.model_fields.get(name)
        section = field.annotation if field else RunConfig
    return list(section.model_fields)


def dump_config(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    return dump_yaml(config.model_dump(exclude_unset=True))
