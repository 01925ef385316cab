"""Marker, run.json: what proves that a folder is a run's, which files in it are the run's own, and what the run has learnt.

    run      32 random hex digits: the run's identity. Scratch files and folders have it in their names
    wrote    the files that the run has written, by their paths in the folder: nothing else is ever removed or renamed
    aside    checkpoints that it no longer goes on from, until the next one is complete
    begun    whether the folder holds a run; false while one that was there is being removed
    facts    what the run is: config, fingerprints of base and data, each link as it was tied (see learnt.py)
    sha256   of all that

A folder is not taken for a run's by the names of what is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cola_ds.config.parsing import parse_json, read_text
from cola_ds.errors import UserError
from cola_ds.run.atomic import scratch_beside, write_atomically

NAME = "run.json"
LOG = "log.txt"
_VERSION = 1
_MOST_BYTES = 2**26
CHECKPOINT_FILE = re.compile(r"(state|manifest)\.json|(trained-\d{5}|shard-\d{5}-\d{5}|link-\d{4}|random)\.safetensors")
_OWN = re.compile(
    r"(run\.yaml|log\.txt|(environment|result|deepspeed)\.json|(metrics|evals|knots|links|watch|events)\.jsonl"
    r"|(chain|earlier)/link-\d{4}/adapter_(config\.json|model\.safetensors)"
    rf"|checkpoints/(latest|best|step-\d{{8,}}/({CHECKPOINT_FILE.pattern}))"
    r"|model/(?!\.\.?(/|$))[^/\0]+(/[^/\0]+\.jinja)?)"
)
"""What a run may call its own, whatever run.json says."""


class _Link(BaseModel):
    """A link, as it was tied."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    link: int = Field(ge=1, le=9999)
    lora_rank: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    layers: list[str] = Field(min_length=1)
    sha256: str
    config_sha256: str


class _EarlierLink(_Link):
    """A link that was tied before the run's own."""

    stands_for: int = Field(default=1, ge=1)
    """Links that were drawn for it."""


class _Identity(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    engine: dict[str, Any] = {}
    train: str = ""
    eval: str | None = None
    watch: str | None = None


class _Facts(BaseModel):
    """What a run says of itself; nothing before it has begun."""

    model_config = ConfigDict(extra="forbid", strict=True)

    config: dict[str, Any] = {}
    base: str = ""
    base_links: list[str] | None = None
    """SHA-256 of what is tied to the base before the run's own links, as it lay where the config named it."""
    earlier: list[_EarlierLink] = []
    """The run's own copies of that; an evaluation has none."""
    identity: _Identity = _Identity()
    links: list[_Link] = []
    model: dict[str, str] = {}
    chat_template: str | None = None
    """What conversations were rendered by, where it was not the tokenizer's own."""
    result: list[str] = []


class Marker:
    """run.json of a folder, as it is now on the disk."""

    def __init__(self, folder: Path, identity: str | None = None):
        """A new one, for a run that begins; it is written with the first change."""
        self.folder, self.id = folder, identity or uuid.uuid4().hex
        self.wrote: set[str] = set()
        self.aside: set[str] = set()
        self.begun = False
        self.facts: dict[str, Any] = _Facts().model_dump()

    @classmethod
    def read(cls, folder: Path) -> Marker | None:
        """The folder's marker; None where it has none. Raises UserError for a run.json that is no marker, or has changed."""
        path = folder / NAME
        if not os.path.lexists(path):
            return None
        try:
            held = parse_json(read_text(path, "the run's", _MOST_BYTES), NAME)
            body = {key: value for key, value in held.items() if key != "sha256"}
            if held["sha256"] != _digest(body) or body["cola_ds"] != _VERSION:
                raise ValueError("its own hash does not hold")
            marker = cls(folder, body["run"])
            marker.wrote, marker.aside = set(body["wrote"]), set(body["aside"])
            marker.begun, marker.facts = body["begun"], _Facts.model_validate(body["facts"]).model_dump()
            if not re.fullmatch("[0-9a-f]{32}", marker.id) or not all(map(_OWN.fullmatch, marker.wrote)):
                raise ValueError("it names what no run writes")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = str(error) if type(error) is ValueError else "it cannot be read"
            raise UserError(
                f"{path} is not what a run wrote ({said}), so nothing in this folder is taken for a run's; name another folder"
            ) from None
        return marker

    def write(self) -> None:
        """Replace run.json. May raise OSError."""
        self.aside = {name for name in self.aside if (self.folder / name).exists()}
        body = {
            "cola_ds": _VERSION, "run": self.id, "begun": self.begun, "wrote": sorted(self.wrote),
            "aside": sorted(self.aside), "facts": self.facts,
        }  # fmt: skip
        content = json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False)
        write_atomically(self.folder / NAME, content.encode(), self.id)

    def own(self, names: Iterable[str], facts: Mapping[str, Any] | None = None) -> None:
        """Files that the run is about to write: they are its own from now on; and `facts` that they come with. Raises
        FileExistsError where one is somebody else's. May raise OSError."""
        coming = {name for name in names if name not in self.wrote}
        for name in coming:
            assert _OWN.fullmatch(name), name
            if os.path.lexists(self.folder / name) or not self._is_inside(name):
                raise FileExistsError(17, "it is there, and this run did not write it", str(self.folder / name))
        if coming or facts is not None:
            self.wrote |= coming
            self.facts |= facts or {}
            self.write()

    def owns_below(self, folder: str) -> bool:
        """Whether the run has written a file in that folder of its own."""
        return any(name.startswith(f"{folder}/") for name in self.wrote)

    def remove(self, below: str = "") -> None:
        """Remove the run's own files whose names begin so, and the folders that are empty then. A checkpoint's manifest goes
        first: what is left is none. May raise OSError. The next `write` writes it down."""
        doomed = {name for name in self.wrote if name.startswith(below)}
        for name in sorted(doomed, key=lambda name: (not name.endswith("manifest.json"), name)):
            path = self.folder / name
            if self._is_inside(name) and os.path.lexists(path) and not (path.is_dir() and not path.is_symlink()):
                path.unlink()
        folders = {parent for name in doomed for parent in Path(name).parents if str(parent) != "."}
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            with contextlib.suppress(OSError):  # somebody else's files are in it
                (self.folder / folder).rmdir()
        self.wrote -= doomed

    def _is_inside(self, name: str) -> bool:
        """Whether no link leads out of the folder on the way to that file."""
        return not any((self.folder / parent).is_symlink() for parent in Path(name).parents if str(parent) != ".")

    def scratch(self, parent: Path) -> Path:
        """A name in a folder for what is not complete yet."""
        return scratch_beside(parent / "x", self.id)

    def clear_scratch(self) -> None:
        """Remove what was being written when a process died."""
        for parent in (self.folder, *(self.folder / name for name in ("checkpoints", "chain", "earlier"))):
            for path in () if parent != self.folder and parent.is_symlink() else parent.glob(f".{self.id}-*"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
