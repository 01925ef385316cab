"""Checkpoints of a chain: what cannot be derived from the base model, the data and the config, in a few megabytes.

RUN_DIR/checkpoints/
  step-00000123/               after 123 steps
    state.json                 counters, config, fingerprints of base and data, knots (SavedState)
    trained-00001.safetensors  whole fp32 masters and moments of the current link's A and B
    trained-0000N.safetensors  the last of these, where there are any: its factors that are not trained, as `frozen/NAME`
    link-0001.safetensors      the tied links, as chain/ has them
    random.safetensors         the random generators of every process
    shard-00003-00001.safetensors
                               method full, instead of trained-*: what process 3 keeps of masters and moments (shards.py)
    manifest.json              size and SHA-256 of each of these, and its own
  latest, best                 the names of two of them, for people and tools

Nothing of it depends on the number of processes but the random generators, and into which files method full's state is cut; any
number of processes reads them. (Method full once wrote whole tensors, too; such checkpoints are still read.)

A folder appears whole or not at all: it is written beside, flushed to the disk, and renamed. Each process hashes the shards that
it writes; process 0 writes all else, and the manifest last. Which one a run goes on from is decided by what verifies, not by
`latest`. Of what lies there, only the files that the run itself wrote are ever removed: run.json names them (marker.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cola_ds.checkpoint.shards import SHARD, first_of, read_header
from cola_ds.config.inputs import sha256_of
from cola_ds.errors import UserError, cut, first_line
from cola_ds.run.marker import CHECKPOINT_FILE

STEP = re.compile(r"step-(\d{8,})")
Hashing = Callable[[list[Any]], list[str | None]]
"""Gives the SHA-256 of the files at some paths, as text; None for one that cannot be read."""


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Counters(_Saved):
    """ChainState without what tying the links again gives back. A best loss of null: there was no evaluation yet."""

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
    decided: list[int] = []
    link_losses: list[float] = []
    window_loss: float = 0.0
    window_steps: int = 0
    """These four are not in checkpoints of before the loss could place knots."""


class Unlogged(_Saved):
    """What the next row of metrics.jsonl has gathered so far."""

    loss: list[float]
    """One per process."""
    losses: int
    steps: int
    tokens: int
    seconds: float
    waited_s: float = 0.0
    flops: float | None = None
    """Needed per device; null where that is not known. Neither is in checkpoints of before it was measured."""


class Rows(_Saved):
    """How many rows there were in each file."""

    metrics: int
    evals: int
    knots: int
    links: int = 0
    watch: int = 0
    """Neither is in checkpoints of before these files were."""


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
    watch: str | None = None
    """Fingerprints (fingerprint.py)."""
    base_links: list[str] | None = None
    """SHA-256 of what was tied to the base before the run's own links; of none such, and in older checkpoints, null."""
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

    @property
    def shards(self) -> list[str]:
        """The shard files' names; none where the trained tensors are whole ones."""
        return sorted(filter(SHARD.fullmatch, self.files))

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Names such as `master/NAME`, and whole tensors, one at a time: fp32, or as the model has what is frozen."""
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


def read_checkpoint(path: Path, hashing: Hashing | None = None) -> Checkpoint:
    """Verify and open a checkpoint. `hashing` may share the work out. Raises DamagedError, before any tensor is read, for a file
    that is missing, not a plain file, of another size or hash, or not of this format."""
    try:
        return _read(path, hashing or hashes_of)
    except OSError as error:
        raise DamagedError(f"{error.filename or path} cannot be read: {error.strerror}") from None


def hashes_of(paths: list[Any]) -> list[str | None]:
    """A Hashing by this process alone."""
    return list(map(hash_of, paths))


def hash_of(path: str | Path) -> str | None:
    """SHA-256 of a file; None where it cannot be read."""
    try:
        return sha256_of(Path(path))
    except OSError:
        return None


def _read(path: Path, hashing: Hashing) -> Checkpoint:
    files = verify(path, hashing)
    try:
        state = SavedState.model_validate_json((path / "state.json").read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedError(f"state.json is not of this version's format: {where}: {first['msg']}") from None
    links = {f"link-{link:04d}.safetensors": link for link in range(1, state.chain.link)}
    trained = {"trained-00001.safetensors"}
    if any(map(SHARD.fullmatch, files)):
        trained = {first_of(rank) for rank in range(state.world_size)}
    missing = sorted((links.keys() | {"random.safetensors"} | trained) - files.keys())
    if missing:
        raise DamagedError(f"{missing[0]} is not in its manifest")
    if not STEP.fullmatch(path.name) or int(path.name[5:]) != state.chain.step:
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
                if SHARD.fullmatch(name):
                    read_header(path / name)
            except SafetensorError as error:
                raise DamagedError(f"{name} is not a safetensors file: {first_line(error)}") from None
            except ValueError as error:
                raise DamagedError(f"{name} is not a shard: {error}") from None
    return Checkpoint(path, state, list(files))


def verify(path: Path, hashing: Hashing | None) -> dict[str, str]:
    """The files of a checkpoint's manifest and their SHA-256; DamagedError where one of them does not hold. Without `hashing`
    their sizes decide."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise DamagedError("it is not a folder of its own, but a link or a file")
    try:
        content = _own_file(path, "manifest.json").read_bytes()
        files = json.loads(content)["files"]
        good = content == manifest(files)
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError("manifest.json is not a manifest") from None
    if not good:
        raise DamagedError("manifest.json does not match its own hash")
    for name, size, _ in entries:
        if not CHECKPOINT_FILE.fullmatch(name) or name == "manifest.json":
            raise DamagedError(f"manifest.json names {name!r}, which is no file of a checkpoint")
        file = _own_file(path, name)
        if file.stat().st_size != size:
            raise DamagedError(f"{name} has {file.stat().st_size} bytes instead of {size}")
    seen = hashing([path / name for name in files]) if hashing else []
    for (name, _, digest), found in zip(entries, seen, strict=bool(hashing)):
        if found != digest and sha256_of(path / name) != digest:  # another process may see another folder there
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


def manifest(files: dict[str, Any]) -> bytes:
    body = json.dumps(files, sort_keys=True)
    return json.dumps({"files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1).encode()


def explain_damage(path: Path, error: DamagedError) -> str:
    """One line that names the checkpoint and what is wrong with it."""
    return f"checkpoint {path} is damaged: {error}"


def open_or_refuse(path: Path, hashing: Hashing | None = None) -> Checkpoint:
    """A checkpoint that was asked for by name. Raises UserError when it is not there or does not verify."""
    if not os.path.isdir(path):
        raise UserError(f"--resume {cut(str(path))} is not a checkpoint's folder")
    try:
        return read_checkpoint(path, hashing)
    except DamagedError as error:
        raise UserError(f"{explain_damage(path, error)}; it is not loaded") from None
