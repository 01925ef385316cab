"""What people's files hold: text, YAML and JSON, read with bounds on time and memory, whatever is in them.

All refusals are UserErrors of one line. What is read here is written by hand, or describes a model: a device, a pipe, a gigabyte,
a thousand brackets, or a few aliases that stand for a million values are none of that.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from cola_ds.errors import UserError, cut, first_line, quoted

_MOST_BYTES = 2**18
_MOST_VALUES = 50_000  # of a YAML, with every alias written out
_DEEPEST = 50
_LONGEST_NUMBER = 400  # characters: the time to read one grows with their square


def read_text(path: str | Path, what: str, most_bytes: int = _MOST_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises UserError: `cannot read WHAT PATH: ...`."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would be waited for
            raise ValueError("it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device; name a file")
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ValueError(f"it has more than {most_bytes:,} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"its byte {error.start} is not UTF-8; save it as such"
    except (OSError, ValueError) as error:  # the latter for a path that can be none
        reason = getattr(error, "strerror", None) or first_line(error)
    raise UserError(f"cannot read {what} {cut(str(path))}: {reason}")


class _Refused(yaml.MarkedYAMLError):
    """What YAML allows, and no file of a person says."""

    def __init__(self, problem: str, mark: yaml.Mark | None):
        super().__init__(problem=problem, problem_mark=mark)


# YAML as people write it: 5e-4 is a number (YAML 1.2; PyYAML's YAML 1.1 reads it as text), and a key given twice is an error.
class _Loader(yaml.SafeLoader):
    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._measured: dict[yaml.Node, tuple[int, int]] = {}
        """Of each node that is whole: its values with every alias written out, and how deep they lie in each other."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML does, within bounds of depth and size."""
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        if self._depth == _DEEPEST:
            raise _Refused(f"more than {_DEEPEST} levels lie in each other", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias and node not in self._measured:
            raise _Refused("an alias stands for what it is a part of", mark)
        if not is_alias:
            self._measured[node] = self._measure(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):  # as PyYAML's constructors fail
            kind = node.tag.rpartition(":")[2].replace("timestamp", "date")
            raise _Refused(f"{quoted(node.value)} cannot be read as {kind}", node.start_mark) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put in front what `<<` brings in, the first of several last: of a key that comes again, the last one counts.

        PyYAML 6.0.4 takes the first, where what is brought in has a `<<` of its own.
        """
        brought, own = [], []
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                own.append((key, value))
                continue
            for source in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                if not isinstance(source, yaml.MappingNode):
                    raise _Refused("<< takes a mapping, or a list of mappings", value.start_mark)
                self.flatten_mapping(source)
                brought += source.value
        node.value = brought + own

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
            return 1, 1
        inner = node.value
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            inner = [each for pair in node.value for each in pair]
        values = 1 + sum(self._measured[each][0] for each in inner)
        depth = 1 + max((self._measured[each][1] for each in inner), default=0)
        if values > _MOST_VALUES:
            raise _Refused(f"its aliases written out, it has more than {_MOST_VALUES:,} values", node.start_mark)
        if depth > _DEEPEST:
            raise _Refused(f"its aliases written out, more than {_DEEPEST} levels lie in each other", node.start_mark)
        return values, depth


def _check_scalar(node: yaml.ScalarNode) -> None:
    if re.search("[\x00\ud800-\udfff]", node.value):
        raise _Refused("a text holds what is no character", node.start_mark)
    if len(node.value) > _LONGEST_NUMBER and node.tag.endswith((":int", ":float")):
        raise _Refused(f"a number has {len(node.value):,} digits", node.start_mark)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:  # as they stand in the text: what << brings in gives way to what is said here
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise _Refused(f"key {cut(key.value)} is given twice", key.start_mark)
            seen.add((key.tag, key.value))


class _Dumper(yaml.SafeDumper):
    """Quotes the text that _Loader would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
        list("-+.0123456789"),
    )

_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)  # "=" is a text


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML says. Raises UserError that names `source`, also for what is too large or too deep to be meant."""
    if len(text) > _MOST_BYTES:
        raise UserError(f"{source} is not valid YAML: it has more than {_MOST_BYTES:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(cut(part) for part in (error.context, error.problem) if part)
        reason = f"line {mark.line + 1}: {said}" if mark else said
    except yaml.reader.ReaderError as error:
        reason = f"character {error.position + 1} is #x{error.character:04x}, which YAML does not allow"
    except yaml.YAMLError as error:
        reason = cut(str(error))
    raise UserError(f"{cut(source)} is not valid YAML: {reason}")


def dump_yaml(content: Any) -> str:
    """What `parse_yaml` reads back to the same."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def parse_json(text: str, source: str, by_hand: bool = False) -> Any:
    """What a JSON says. Raises UserError that names `source`, also for what is too deep to be meant; in a file that was written
    `by_hand`, also for a key that is given twice, and for NaN and Infinity, which JSON does not have."""
    try:
        value = json.loads(
            text,
            parse_int=_whole_number,
            parse_float=_finite if by_hand else float,
            parse_constant=_finite if by_hand else None,
            object_pairs_hook=_no_duplicates if by_hand else None,
        )
        if _is_deep(value):
            raise RecursionError
        return value
    except RecursionError:
        reason = f"more than {_DEEPEST} levels lie in each other"
    except ValueError as error:
        reason = first_line(error)
    raise UserError(f"{cut(source)} is not valid JSON: {reason}")


def _whole_number(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{cut(text, 40)} is not a finite number")
    return float(text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"a key is given twice: {quoted(key)}")
        found[key] = value
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [each for held in level if isinstance(held, (dict, list)) for each in _parts(held)]
    return bool(level)


def _parts(held: dict[str, Any] | list[Any]) -> Any:
    return held.values() if isinstance(held, dict) else held
