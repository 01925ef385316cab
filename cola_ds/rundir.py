"""The run's folder: what a run leaves. Process 0 alone writes.

RUN_DIR/
  run.yaml           the config, as load_config reads it
  environment.json   versions, git revision, hosts, world size
  metrics.jsonl      a row a logged step
  evals.jsonl        a row an evaluation on held-out data
  knots.jsonl        a row a knot
  chain/link-0001/   each tied link as a PEFT adapter
  model/             method full alone: the trained model as a Hugging Face folder
  result.json        written last
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cola_ds.config import RunConfig, dump_config, load_config
from cola_ds.errors import UserError

_FILES = ("run.yaml", "environment.json", "metrics.jsonl", "evals.jsonl", "knots.jsonl", "result.json")
_FOLDERS = ("chain", "model")
_PEFT_PREFIX = "base_model.model."
_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "numpy")


class RunFolder:
    """A run's folder, to write or to read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def check_is_free(self, fresh: bool, inputs: list[str]) -> None:
        """Raise UserError when the folder already holds a run, unless `fresh`: then `create` removes what that run left.

        Whatever `fresh` says, the run's inputs (paths) may not lie in it, and it must be possible to write there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.dir {self.path} is not a folder")
        for path in inputs:
            if self.path.resolve() in Path(path).resolve().parents:
                raise UserError(f"run.dir {self.path} holds {path}, which the run reads; name a folder of its own")
        parent = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK):
            raise UserError(f"run.dir {self.path} cannot be written: no permission to write in {parent}")
        left = self._left()
        if left and not fresh:
            raise UserError(
                f"run.dir {self.path} already holds a run ({left[0].name}); name another, or start it anew with --fresh"
            )
        if left and not (self.path / "environment.json").exists():  # every run has it, and nothing else does
            raise UserError(f"run.dir {self.path} holds {left[0].name}, but no run left it there; name another folder")

    def create(self, config: RunConfig, environment: dict[str, Any]) -> None:
        """Make the folder anew, with run.yaml and environment.json. Raises UserError when it cannot be written."""
        try:
            for old in self._left():
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("environment.json", environment)
            _write_atomically(self.path / "run.yaml", dump_config(config))
        except OSError as error:
            raise UserError(f"run.dir {self.path} cannot be written: {error.strerror}") from None

    def _left(self) -> list[Path]:
        return [self.path / name for name in (*_FILES, *_FOLDERS) if (self.path / name).exists()]

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
        """The rows of metrics.jsonl, evals.jsonl or knots.jsonl; none if the run wrote none."""
        path = self.path / name
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to a .jsonl file. A number that is not finite becomes null: JSON has no other word for it."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.path / name, "a", encoding="utf-8") as out:
            out.write(json.dumps(finite, allow_nan=False) + "\n")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        _write_atomically(self.path / name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def link_path(self, link: int) -> Path:
        """Where a tied link lies."""
        return self.path / "chain" / f"link-{link:04d}"

    def read_link(self, link: int) -> dict[str, Tensor]:
        """A tied link's tensors, under the names that `write_link` was given."""
        tensors = load_file(self.link_path(link) / "adapter_model.safetensors")
        return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}

    def write_link(self, config: RunConfig, link: int, layers: list[str], tensors: dict[str, Tensor]) -> None:
        """Write a link of the named layers as a PEFT adapter: its folder appears whole or not at all."""
        adapter_config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": config.model.path,
            "revision": config.model.revision,
            "r": config.lora_ranks[link - 1],
            "lora_alpha": config.lora.alpha,
            "lora_dropout": config.lora.dropout,
            "target_modules": layers,
            "bias": config.lora.bias,
            "inference_mode": True,
        }
        target = self.link_path(link)
        scratch = target.with_name(target.name + ".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        named = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()}
        save_file(named, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_atomically(scratch / "adapter_config.json", json.dumps(adapter_config, indent=2) + "\n")
        scratch.rename(target)


def _write_atomically(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def describe_environment(hosts: list[str], accelerator: str) -> dict[str, Any]:
    """environment.json: what would be needed to run this again. No environment variables: they hold secrets."""
    source = Path(__file__).resolve().parent
    git = (
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True)
        if shutil.which("git")
        else None
    )
    return {
        "cola_ds": importlib.metadata.version("cola_ds"),
        "git_revision": git.stdout.strip() if git and git.returncode == 0 else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "accelerator": accelerator,
        "world_size": len(hosts),
        "hosts": sorted(set(hosts)),
    }
