"""What a key of the config, named section.key, means for a run that is resumed, read or swept: answered by the schema's marks."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_jsonable_python

from cola_ds.config.fields import Mark
from cola_ds.config.schema import SECTIONS, RunConfig

_MAPPINGS = ("chain.knots", "chain.optimizer_at_knot")
"""Keys whose value may be a mapping."""


def flat_keys(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dumped config by section.key."""
    flat: dict[str, Any] = {}
    for key, inner in config.items():
        if isinstance(inner, dict) and f"{prefix}{key}" not in _MAPPINGS:
            flat |= flat_keys(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def default_of(key: str) -> Any:
    """What section.key is where a YAML leaves it out, as a dump has it; None where it must be said."""
    section, _, name = key.rpartition(".")
    fields = RunConfig.model_fields[section].annotation.model_fields if section else RunConfig.model_fields  # type: ignore[union-attr]
    field = fields[name]
    return None if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))


def _read_marks() -> dict[str, frozenset[Mark]]:
    """The marks of each section, and of each key with those of its section."""
    marks = {}
    for name, field in RunConfig.model_fields.items():
        own = marks[name] = frozenset(mark for mark in field.metadata if isinstance(mark, Mark))
        section: Any = field.annotation
        for key, inner in section.model_fields.items() if name in SECTIONS else ():
            its = frozenset(mark for mark in inner.metadata if isinstance(mark, Mark))
            marks[f"{name}.{key}"] = (own - _CHANGE if its & _CHANGE else own) | its
    return marks


_CHANGE = {Mark.FREE, Mark.FIXED, Mark.CONTENT}  # how a change is taken: a key's own word stands before its section's
_MARKS = _read_marks()


def _has(mark: Mark, key: str) -> bool:
    """Whether a key has a mark; of one that the schema does not know, but an older run recorded, its section decides."""
    return mark in _MARKS.get(key, _MARKS.get(key.partition(".")[0], frozenset()))


def is_free(key: str) -> bool:
    """Whether a key cannot change a result."""
    return _has(Mark.FREE, key)


def is_fixed(key: str) -> bool:
    """Whether a key cannot change within a run, whatever --allow-change says."""
    return _has(Mark.FIXED, key)


def by_content(key: str) -> bool:
    """Whether what a key names is compared when a run goes on, and not its value."""
    return _has(Mark.CONTENT, key)


def is_place(key: str) -> bool:
    """Whether a key says where something lies that may lie elsewhere when the run is read: its fingerprint was recorded."""
    return _has(Mark.PLACE, key)


def names_file(key: str) -> bool:
    """Whether a key names a file, or something ready-made (see inputs.named_file)."""
    return _has(Mark.FILE, key)


def is_per_run(key: str) -> bool:
    """Whether each run of a sweep has its own value."""
    return _has(Mark.PER_RUN, key)
