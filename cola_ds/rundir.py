"""The run's folder: what a run leaves. Process 0 alone writes.

RUN_DIR/
  run.yaml           the config, as load_config reads it
  environment.json   versions, git revision, hosts, world size
  metrics.jsonl      a row a logged step
  evals.jsonl        a row an evaluation on held-out data
  knots.jsonl        a row a knot
  events.jsonl       what happened to the run: started, resumed, checkpoints, skipped updates, stopped
  checkpoints/       step-00000123/ and so on: see checkpoint.py
  chain/link-0001/   each tied link as a PEFT adapter
  model/             method full alone: the trained model as a Hugging Face folder
  result.json        written last
  lock.json          while a run goes on: whose folder this is (see lock.py)
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from cola_ds.config import RunConfig, dump_config, is_task_file, load_config
from cola_ds.errors import UserError

ROWS = ("metrics.jsonl", "evals.jsonl", "knots.jsonl")
_LEFT = ("run.yaml", *ROWS, "events.jsonl", "result.json", "chain", "model", "checkpoints", "environment.json")
_PEFT_PREFIX = "base_model.model."
_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "numpy")


class RunFolder:
    """A run's folder, to write or to read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._unwritten: dict[str, list[str]] = {}
        self._whole: set[str] = set()
        """Files whose last row is known to be whole."""

    def check_inputs(self, inputs: list[str]) -> None:
        """Raise UserError for a folder that cannot be written, or that holds one of the run's inputs (paths)."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.dir {self.path} is not a folder")
        for path in inputs:
            if self.path.resolve() in Path(path).resolve().parents:
                raise UserError(f"run.dir {self.path} holds {path}, which the run reads; name a folder of its own")
        parent = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK):
            raise UserError(f"run.dir {self.path} cannot be written: no permission to write in {parent}")

    def check_is_free(self, fresh: bool) -> None:
        """Raise UserError when the folder already holds a run, unless `fresh`: then `create` removes what that run left."""
        left = self.left()
        if left and not fresh:
            raise UserError(
                f"run.dir {self.path} already holds a run ({left[0]}); name another, or start it anew with --fresh"
            )
        self.check_is_a_run()

    def check_is_a_run(self) -> None:
        """Raise UserError when the folder holds what a run leaves, but no run left it."""
        left = self.left()
        if left and not (self.path / "environment.json").exists():  # every run has it, and nothing else does
            raise UserError(f"run.dir {self.path} holds {left[0]}, but no run left it there; name another folder")

    def check_space(self, needed: int) -> None:
        """Raise UserError when the file system has not so many bytes left, beside what the run's links and checkpoints take
        already. The folder must exist."""
        taken = [path for name in ("chain", "checkpoints") for path in (self.path / name).rglob("*") if path.is_file()]
        free = shutil.disk_usage(self.path).free
        if free < needed - sum(path.stat().st_size for path in taken):
            raise UserError(
                f"run.dir {self.path}: {free / 2**20:,.0f} MiB are free there, and the run's links and checkpoints take up to "
                f"{needed / 2**20:,.0f} MiB; make room, name another run.dir, or lower checkpoint.keep"
            )

    def create(self, config: RunConfig, environment: dict[str, Any]) -> None:
        """Make the folder anew, with run.yaml and environment.json. Raises UserError when it cannot be written."""
        try:
            if (self.path / "checkpoints").exists():  # at once: a run that is half removed must not be gone on with
                (self.path / "checkpoints").rename(self.path / f"removed-{uuid.uuid4().hex}")
            for old in (
                *self.path.glob("removed-*"),
                *map(self.path.joinpath, self.left()),
            ):  # environment.json is the last
                _remove(old)
        except OSError as error:
            raise UserError(f"run.dir {self.path} cannot be written: {error.strerror}") from None
        self.describe(config, environment)

    def describe(self, config: RunConfig, environment: dict[str, Any]) -> None:
        """Write run.yaml and environment.json. Raises UserError when they cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("environment.json", environment)
            write_atomically(self.path / "run.yaml", dump_config(config).encode())
        except OSError as error:
            raise UserError(f"run.dir {self.path} cannot be written: {error.strerror}") from None

    def left(self) -> list[str]:
        """What there is of what a run leaves."""
        return [name for name in _LEFT if (self.path / name).exists()]

    def config(self) -> RunConfig:
        """The run's config. Raises UserError when this is no run's folder."""
        if not (self.path / "run.yaml").is_file():
            raise UserError(f"{self.path} is no run's folder: it has no run.yaml")
        return load_config(self.path / "run.yaml")

    def result(self) -> dict[str, Any]:
        """result.json. Raises UserError when the run has not finished."""
        path = self.path / "result.json"
        if not path.is_file():
            raise UserError(f"{self.path} has no result.json: the run has not finished")
        return json.loads(path.read_text(encoding="utf-8"))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a .jsonl file; none if the run wrote none. What a killed run left of its last row is no row."""
        return [json.loads(line) for line in self._lines(name)]

    def _lines(self, name: str) -> list[str]:
        path = self.path / name
        if not path.is_file():
            return []
        lines = path.read_bytes().split(b"\n")  # the last is what follows the last line's end
        return [line.decode() for line in lines[:-1]]

    def row_counts(self) -> dict[str, int]:
        """How many rows there are in each of the files that a resumed run goes on with."""
        return {name.removesuffix(".jsonl"): len(self._lines(name)) for name in ROWS}

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to a .jsonl file. A number that is not finite becomes null: JSON has no other word for it.

        Where the disk is full, the row waits for the next one, and the first time a line says so.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        waiting = self._unwritten.setdefault(name, [])
        waiting.append(json.dumps(finite, allow_nan=False) + "\n")
        try:
            self._write_waiting(name)
        except OSError as error:
            if len(waiting) == 1:
                path = self.path / name
                print(
                    f"cola-ds: {path} cannot be written ({error.strerror}); its rows wait", file=sys.stderr, flush=True
                )

    def _write_waiting(self, name: str) -> None:
        path, waiting = self.path / name, self._unwritten[name]
        with open(path, "ab") as out:
            if name not in self._whole:  # what a process that was killed left of its last row
                os.truncate(path, sum(len(line.encode()) + 1 for line in self._lines(name)))
                self._whole.add(name)
            size = path.stat().st_size
            try:
                out.write("".join(waiting).encode())
                out.flush()
            except OSError:
                os.truncate(path, size)
                raise
        waiting.clear()

    def flush_rows(self) -> None:
        """Have all rows on the disk before this returns. OSError where they do not fit."""
        for name in self._unwritten:
            self._write_waiting(name)
            with open(self.path / name, "rb") as held:
                os.fsync(held.fileno())

    def event(self, what: str, **facts: Any) -> None:
        """Add a row to events.jsonl: what happened to the run, and when."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.append("events.jsonl", {"time": now, "event": what, **facts})

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        write_atomically(self.path / name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def link_path(self, link: int) -> Path:
        """Where a tied link lies."""
        return self.path / "chain" / f"link-{link:04d}"

    def tied_links(self) -> list[Path]:
        """The folders of a finished run's links. Raises UserError where one is missing, or is not the one that the run tied."""
        hashes = self.result()["link_sha256"]
        paths = [self.link_path(link) for link in range(1, len(hashes) + 1)]
        for path, digest in zip(paths, hashes, strict=True):
            file = path / "adapter_model.safetensors"
            if not file.is_file():
                raise UserError(f"{self.path} lacks {path.relative_to(self.path)}: a link of the chain is missing")
            if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                raise UserError(
                    f"{path} is not the link that the run tied: it has changed; its checkpoints hold a copy"
                )
        return paths

    def read_link(self, link: int) -> dict[str, Tensor]:
        """A tied link's tensors, under the names that `write_link` was given."""
        return read_link(self.link_path(link) / "adapter_model.safetensors")

    def write_link(self, config: RunConfig, link: int, layers: list[str], tensors: dict[str, Tensor]) -> str:
        """Write a link of the named layers as a PEFT adapter: its folder appears whole or not at all. Returns its SHA-256."""
        lora_rank, alpha = config.lora_ranks[link - 1], config.lora.alpha
        return write_adapter(self.link_path(link), config, lora_rank, alpha, layers, tensors)

    def forget_result(self) -> None:
        """The run is no longer finished: the first thing to be written down when it goes back."""
        if (self.path / "result.json").exists():
            (self.path / "result.json").unlink()
            sync_folder(self.path)

    def go_back(self, counts: Mapping[str, int]) -> None:
        """Forget the rows after the first so many of each file, and all tied links: a run that was stopped had gone further than
        its checkpoint, which holds the links that stand."""
        for name in ROWS:
            lines = self._lines(name)
            if (self.path / name).exists():
                kept = lines[: counts[name.removesuffix(".jsonl")]]
                write_atomically(self.path / name, "".join(f"{line}\n" for line in kept).encode())
        for name in ("chain", "model"):
            _remove(self.path / name)


def write_adapter(
    target: Path, config: RunConfig, lora_rank: int, alpha: float, layers: list[str], tensors: dict[str, Tensor]
) -> str:
    """Write A and B of the named layers as a PEFT adapter of the run's base model: the folder appears whole or not at all.
    Returns the SHA-256 of its tensors' file."""
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "revision": config.model.revision,
        "r": lora_rank,
        "lora_alpha": alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": layers,
        "bias": config.lora.bias,
        "inference_mode": True,
    }
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    named = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    content = save(named, metadata={"format": "pt"})
    write_synced(scratch / "adapter_model.safetensors", content)
    write_synced(scratch / "adapter_config.json", (json.dumps(adapter_config, indent=2) + "\n").encode())
    sync_folder(scratch)
    scratch.rename(target)
    sync_folder(target.parent)
    return hashlib.sha256(content).hexdigest()


def read_link(path: Path) -> dict[str, Tensor]:
    """A tied link's tensors, under the names that `write_link` was given."""
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in load_file(path).items()}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that was not there, and have it on the disk before this returns."""
    with open(path, "xb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def sync_folder(path: Path) -> None:
    """Have a folder's entries on the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Write or replace a file, whole or not at all."""
    scratch = path.with_name(path.name + ".partial")
    scratch.unlink(missing_ok=True)
    write_synced(scratch, content)
    os.replace(scratch, path)
    sync_folder(path.parent)


def own_version() -> str:
    """This package's; where it is found by PYTHONPATH alone, nobody has written it down."""
    try:
        return importlib.metadata.version("cola_ds")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_environment(hosts: list[str], accelerator: str) -> dict[str, Any]:
    """environment.json: what would be needed to run this again. No environment variables: they hold secrets."""
    source = Path(__file__).resolve().parent
    git = (
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True)
        if shutil.which("git")
        else None
    )
    return {
        "cola_ds": own_version(),
        "git_revision": git.stdout.strip() if git and git.returncode == 0 else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "accelerator": accelerator,
        "world_size": len(hosts),
        "hosts": sorted(set(hosts)),
    }


def freeze(config: RunConfig, folder: Path) -> Path:
    """Write a run's config, its DeepSpeed JSON and its own task's YAML to a new folder, for a job that waits in a queue or comes
    back. Returns the config's path. Relative paths in it stay relative to where the command runs. Raises UserError."""
    try:
        folder.mkdir(parents=True)
        engine = folder.resolve() / "deepspeed.json"
        shutil.copyfile(config.deepspeed, engine)
        frozen = config.model_copy(update={"deepspeed": str(engine)})
        if config.data.task is not None and is_task_file(config.data.task):
            task = folder.resolve() / "task" / Path(config.data.task).name  # its name is the task's
            task.parent.mkdir()
            shutil.copyfile(config.data.task, task)
            frozen = frozen.model_copy(update={"data": config.data.model_copy(update={"task": str(task)})})
        write_atomically(folder / "run.yaml", dump_config(frozen).encode())
    except OSError as error:
        raise UserError(f"--freeze {folder}: {error.filename or folder}: {error.strerror}") from None
    return folder / "run.yaml"
