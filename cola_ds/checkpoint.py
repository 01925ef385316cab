"""Checkpoints of a chain: what cannot be derived from the base model, the data and the config, in a few megabytes.

RUN_DIR/checkpoints/
  step-00000123/               after 123 steps
    state.json                 counters, config, fingerprints of base and data, knots (SavedState)
    trained-00001.safetensors  whole fp32 masters and moments of the current link's A and B (method full: of every weight)
    link-0001.safetensors      the tied links, as chain/ has them
    random.safetensors         the random generators of every process
    manifest.json              size and SHA-256 of each of these, and its own
  latest, best                 the names of two of them, for people and tools

Nothing of it depends on the number of processes but the random generators. A folder appears whole or not at all: it is
written beside, flushed to the disk, and renamed. Which one a run goes on from is decided by what verifies, not by `latest`.
Of what lies there, only the files that the run itself wrote are ever removed: run.json names them (marker.py).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cola_ds.errors import UserError, cut, first_line
from cola_ds.files import publish, sha256_of, sync_folder, write_atomically, write_synced
from cola_ds.marker import CHECKPOINT_FILE
from cola_ds.rundir import RunFolder

_STEP = re.compile(r"step-(\d{8,})")
_HASHED_AGAIN = 2**30  # bytes of a checkpoint up to which keeping it is decided by its hashes, not by sizes alone


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Counters(_Saved):
    """ChainState without its remainders. A best loss of null: there was no evaluation yet."""

    link: int = Field(ge=1, le=9999)
    step: int = Field(ge=0)
    step_in_link: int = Field(ge=0)
    examples_seen: int
    link_tokens: list[int]
    skipped_steps: int
    skipped_in_link: int
    skipped_in_a_row: int
    evaluated_step: int
    best_step: int
    best: float | None
    no_better: int
    ended_step: int | None
    change_square: float
    link_hashes: list[str]


class Unlogged(_Saved):
    """What the next row of metrics.jsonl has gathered so far."""

    loss: list[float]
    """One per process."""
    losses: int
    steps: int
    tokens: int
    seconds: float


class Rows(_Saved):
    """How many rows there were in each file."""

    metrics: int
    evals: int
    knots: int


class SavedState(_Saved):
    """state.json."""

    format: Literal[1] = 1
    config: dict[str, Any]
    """The run's config with every default spelled out."""
    engine: dict[str, Any]
    """The DeepSpeed JSON, without what cannot change a result."""
    model: str
    train: str
    eval: str | None
    """Fingerprints (fingerprint.py)."""
    versions: dict[str, str]
    world_size: int
    knots: list[int]
    chain: Counters
    scalars: dict[str, float]
    """The optimizer's step counts."""
    loss_scale: dict[str, float]
    journal: Unlogged
    rows: Rows
    elapsed_s: float
    """Seconds that the run has taken, over all its starts."""


class Checkpoint:
    """A checkpoint on disk that has been verified: its manifest's sizes and hashes hold, and every file is its own."""

    def __init__(self, path: Path, state: SavedState, files: list[str]):
        self.path, self.state, self.files = path, state, files

    @property
    def step(self) -> int:
        return self.state.chain.step

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Names such as `master/NAME`, and whole fp32 tensors, one at a time."""
        for name in sorted(file for file in self.files if file.startswith("trained-")):
            with safe_open(self.path / name, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield key, tensors.get_tensor(key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained tensors, without reading their values."""
        found: dict[str, tuple[int, ...]] = {}
        for name in sorted(self.files):
            if name.startswith("trained-"):
                with safe_open(self.path / name, framework="pt") as tensors:
                    found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        return found

    def link_path(self, link: int) -> Path:
        """A tied link's tensors, named as in chain/."""
        return self.path / f"link-{link:04d}.safetensors"

    def random_states(self) -> list[Tensor]:
        """One per process of the run that wrote it."""
        with safe_open(self.path / "random.safetensors", framework="pt") as tensors:
            return [tensors.get_tensor(f"{rank:05d}") for rank in range(self.state.world_size)]


class DamagedError(ValueError):
    """A checkpoint that is not what was written: which file, and how."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify and open a checkpoint. Raises DamagedError, before any tensor is read, for a file that is missing, not a plain file,
    of another size or hash, or not of this format."""
    try:
        return _read(path)
    except OSError as error:
        raise DamagedError(f"{error.filename or path} cannot be read: {error.strerror}") from None


def _read(path: Path) -> Checkpoint:
    files = _verify(path, hashes=True)
    try:
        state = SavedState.model_validate_json((path / "state.json").read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedError(f"state.json is not of this version's format: {where}: {first['msg']}") from None
    links = {f"link-{link:04d}.safetensors": link for link in range(1, state.chain.link)}
    missing = sorted((links.keys() | {"random.safetensors", "trained-00001.safetensors"}) - files.keys())
    if missing:
        raise DamagedError(f"{missing[0]} is not in its manifest")
    if not _STEP.fullmatch(path.name) or int(path.name[5:]) != state.chain.step:
        raise DamagedError(f"state.json is of step {state.chain.step}")
    if state.chain.link > len(state.knots) or len(state.chain.link_hashes) != len(links):
        raise DamagedError("state.json does not agree with itself about its links")
    for name, link in links.items():
        if files[name] != state.chain.link_hashes[link - 1]:
            raise DamagedError(f"{name} is not the link that was tied")
    for name in files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(path / name, framework="pt"):
                    pass
            except SafetensorError as error:
                raise DamagedError(f"{name} is not a safetensors file: {first_line(error)}") from None
    return Checkpoint(path, state, list(files))


def _verify(path: Path, hashes: bool) -> dict[str, str]:
    """The files of a checkpoint's manifest and their SHA-256; DamagedError where one of them does not hold."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise DamagedError("it is not a folder of its own, but a link or a file")
    try:
        content = _own_file(path, "manifest.json").read_bytes()
        files = json.loads(content)["files"]
        good = content == _manifest(files)
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError("manifest.json is not a manifest") from None
    if not good:
        raise DamagedError("manifest.json does not match its own hash")
    for name, size, digest in entries:
        if not CHECKPOINT_FILE.fullmatch(name) or name == "manifest.json":
            raise DamagedError(f"manifest.json names {name!r}, which is no file of a checkpoint")
        file = _own_file(path, name)
        if file.stat().st_size != size:
            raise DamagedError(f"{name} has {file.stat().st_size} bytes instead of {size}")
        if hashes and sha256_of(file) != digest:
            raise DamagedError(f"{name} has changed: its SHA-256 does not hold")
    if "state.json" not in files:
        raise DamagedError("state.json is not in its manifest")
    return {name: digest for name, _, digest in entries}


def _own_file(path: Path, name: str) -> Path:
    try:
        mode = os.lstat(path / name).st_mode
    except OSError:
        raise DamagedError(f"{name} is missing") from None
    if not stat.S_ISREG(mode):
        raise DamagedError(f"{name} is not a plain file")
    return path / name


def _manifest(files: dict[str, Any]) -> bytes:
    body = json.dumps(files, sort_keys=True)
    return json.dumps({"files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1).encode()


class CheckpointFolder:
    """The checkpoints of a run. Process 0 alone has one."""

    def __init__(self, folder: RunFolder):
        self.folder, self.path = folder, folder.path / "checkpoints"

    def steps(self) -> list[Path]:
        """Every checkpoint but those set aside, the newest first, verified or not."""
        aside = self.folder.marker.aside if self.folder.marker else set()
        found = [p for p in self.path.glob("step-*") if _STEP.fullmatch(p.name) and self._name(p) not in aside]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)

    def _name(self, path: Path) -> str:
        return f"checkpoints/{path.name}"

    def at(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def is_own(self, path: Path) -> bool:
        """Whether the run of this folder wrote it; another's may have been put here."""
        return self.folder.mine.owns_below(self._name(path)) and not path.is_symlink()

    def pointer(self, name: Literal["latest", "best"]) -> str | None:
        """What `latest` or `best` says; None without it."""
        try:
            return (self.path / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def ever_written(self) -> bool:
        """Whether there is any trace of a complete checkpoint, even if none is left."""
        noted = any(row.get("event") == "checkpoint" for row in self.folder.rows("events.jsonl", skip_damaged=True))
        return noted or any((self.path / name).exists() for name in ("latest", "best")) or bool(self.steps())

    def sound(self, path: Path) -> bool:
        """Whether a checkpoint is there and holds; a very large one by its sizes alone."""
        try:
            size = sum(file.stat().st_size for file in path.iterdir())
            _verify(path, hashes=size <= _HASHED_AGAIN)
        except (OSError, DamagedError):
            return False
        return self._name(path) not in self.folder.mine.aside

    def set_aside(self, later_than: int) -> None:
        """Go on from none of the run's own after a step: they are damaged, or of a run that went on from an earlier step.

        The next checkpoint that is complete removes them.
        """
        marker = self.folder.mine
        marker.aside |= {
            self._name(path) for path in self.steps() if int(path.name[5:]) > later_than and self.is_own(path)
        }
        marker.write()
        marker.remove("checkpoints/latest")
        marker.remove("checkpoints/best")

    def tidy(self, step: int, keep: int, best_step: int) -> None:
        """After the checkpoint of `step` is complete: remove what is neither new nor the best, and point to it.

        At least `keep` checkpoints that verify are kept, whatever else there is. Nothing depends on the pointers, or on this
        being done at all: where the disk is full, the next checkpoint does it.
        """
        marker, kept, doomed = self.folder.mine, 0, set()
        with contextlib.suppress(OSError):
            for path in filter(self.is_own, self.steps()):
                if kept < keep and (int(path.name[5:]) == step or self.sound(path)):
                    kept += 1
                elif path != self.at(best_step):
                    doomed.add(self._name(path))
            if doomed:  # a half-removed one is never taken for one
                marker.aside |= doomed
                marker.write()
            for name in sorted(marker.aside):
                marker.remove(f"{name}/")
            self._point("latest", self.at(step))
        self.mark_best(best_step)

    def take_in(self, found: Checkpoint) -> Checkpoint:
        """A copy of another run's checkpoint, as one of this run's."""
        self.path.mkdir(parents=True, exist_ok=True)
        scratch = self.folder.mine.scratch(self.path)
        scratch.mkdir()
        files = [*found.files, "manifest.json"]
        for name in files:
            shutil.copyfile(found.path / name, scratch / name)
        self.show(scratch, self.path / found.path.name, files)
        return read_checkpoint(self.path / found.path.name)

    def show(self, scratch: Path, target: Path, files: list[str]) -> None:
        """Let a complete checkpoint appear under its name. May raise OSError, also where a file there is not the run's."""
        marker, name = self.folder.mine, self._name(target)
        marker.remove(f"{name}/")  # what is there does not verify, or was set aside
        marker.aside.discard(name)
        marker.own((f"{name}/{file}" for file in files), {})
        publish(scratch, target, last="manifest.json")

    def mark_best(self, step: int) -> None:
        """Point `best` to the checkpoint of a step, if there is one."""
        if step and self.at(step).exists():
            with contextlib.suppress(OSError):
                self._point("best", self.at(step))

    def _point(self, name: str, target: Path) -> None:
        self.folder.mine.own([f"checkpoints/{name}"])
        write_atomically(self.path / name, f"{target.name}\n".encode(), self.folder.mine.id)


class CheckpointWriter:
    """Writes one checkpoint file by file; it appears with `finish`. Any of it may raise OSError."""

    def __init__(self, checkpoints: CheckpointFolder, step: int):
        self.checkpoints, self.step = checkpoints, step
        marker = checkpoints.folder.mine
        self.scratch = marker.scratch(checkpoints.path)
        self.files: dict[str, dict[str, Any]] = {}
        self.pieces = 0
        marker.clear_scratch()
        self.scratch.mkdir(parents=True)

    def add_trained(self, tensors: dict[str, Tensor]) -> None:
        """A piece of the masters and moments."""
        self.pieces += 1
        self._add(f"trained-{self.pieces:05d}.safetensors", save(tensors))

    def add_link(self, link: int, path: Path, digest: str) -> None:
        """A tied link: a copy of its own, so that one damage cannot reach all checkpoints. OSError if it has changed since."""
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise OSError(errno.EIO, f"{path} is not the link that was tied: it has changed")
        self._add(f"link-{link:04d}.safetensors", content)

    def finish(self, state: SavedState, random_states: list[Tensor]) -> int:
        """Write the rest, and let the checkpoint appear. Returns its size in bytes."""
        self._add("random.safetensors", save({f"{rank:05d}": held for rank, held in enumerate(random_states)}))
        self._add("state.json", state.model_dump_json(indent=1).encode())
        write_synced(self.scratch / "manifest.json", _manifest(self.files))
        sync_folder(self.scratch)
        self.checkpoints.show(self.scratch, self.checkpoints.at(self.step), [*self.files, "manifest.json"])
        return sum(entry["bytes"] for entry in self.files.values())

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _add(self, name: str, content: bytes) -> None:
        write_synced(self.scratch / name, content)
        self.files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def explain_damage(path: Path, error: DamagedError) -> str:
    """One line that names the checkpoint and what is wrong with it."""
    return f"checkpoint {path} is damaged: {error}"


def open_or_refuse(path: Path) -> Checkpoint:
    """A checkpoint that was asked for by name. Raises UserError when it is not there or does not verify."""
    if not os.path.isdir(path):
        raise UserError(f"--resume {cut(str(path))} is not a checkpoint's folder")
    try:
        return read_checkpoint(path)
    except DamagedError as error:
        raise UserError(f"{explain_damage(path, error)}; it is not loaded") from None
