"""The store of a run's checkpoints: written file by file, shown whole, and tidied."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor

from cola_ds.checkpoint.format import (
    STEP,
    Checkpoint,
    DamagedError,
    SavedState,
    hashes_of,
    manifest,
    read_checkpoint,
    verify,
)
from cola_ds.run.atomic import publish, sync_path, write_atomically, write_synced
from cola_ds.run.folder import RunDir

_HASHED_AGAIN = 2**30  # bytes of a checkpoint up to which keeping it is decided by its hashes, not by sizes alone


class CheckpointFolder:
    """The checkpoints of a run. Process 0 alone has one."""

    def __init__(self, folder: RunDir):
        self.folder, self.path = folder, folder.path / "checkpoints"

    def steps(self) -> list[Path]:
        """Every checkpoint but those set aside, the newest first, verified or not."""
        aside = self.folder.marker.aside if self.folder.marker else set()
        found = [p for p in self.path.glob("step-*") if STEP.fullmatch(p.name) and self._name(p) not in aside]
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
            verify(path, hashes_of if size <= _HASHED_AGAIN else None)
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

    def add_files(self, files: dict[str, dict[str, Any]]) -> None:
        """Files that other processes have written here, as `write_shards` says of them. OSError if one of them is not here."""
        for name, entry in files.items():
            path = self.scratch / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise OSError(errno.EIO, f"{name} is not here as its process wrote it")
        self.files |= files

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
        write_synced(self.scratch / "manifest.json", manifest(self.files))
        sync_path(self.scratch)
        self.checkpoints.show(self.scratch, self.checkpoints.at(self.step), [*self.files, "manifest.json"])
        return sum(entry["bytes"] for entry in self.files.values())

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _add(self, name: str, content: bytes) -> None:
        self.files[name] = _written(self.scratch / name, content)


def write_shards(scratch: Path, files: Iterable[tuple[str, bytes]]) -> dict[str, dict[str, Any]]:
    """Write a process's shard files into the folder of a CheckpointWriter, and say what they are. May raise OSError."""
    return {name: _written(scratch / name, content) for name, content in files}


def _written(path: Path, content: bytes) -> dict[str, Any]:
    """The file's entry in a manifest."""
    write_synced(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
