"""Before the work: that all processes run the same code on the same data, and see the same run folder.

A node with another version of a package, an older copy of the data or a folder of its own gives a number in a table that is
wrong, or a run that cannot go on elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

from cola_ds.config.loading import dump_config
from cola_ds.config.schema import RunConfig
from cola_ds.data.tasks.dataset import TaskData
from cola_ds.data.text import TokenizedData
from cola_ds.distributed import collectives
from cola_ds.errors import UserError, counted
from cola_ds.evaluation.attention import shown_name
from cola_ds.run import lock
from cola_ds.run.environment import version_of
from cola_ds.training.prepared import Prepared

_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "safetensors", "numpy")
SHARED_WITHIN_S = 10.0  # network file systems show a new file to other hosts after a while


def check_ranks_agree(prepared: Prepared) -> None:
    """Raise UserError, on all processes, naming the first one that differs from process 0, and in what. Collective."""
    all_facts = collectives.all_gather_objects(_facts(prepared))
    differing = differences(all_facts, collectives.hosts())
    if differing:
        raise UserError(f"{differing[0]}; make the nodes alike")


def differences(all_facts: list[dict[str, str]], hosts: list[str]) -> list[str]:
    """A sentence for each process whose facts are not those of process 0; facts and hosts are in the order of ranks."""
    expected, sentences = all_facts[0], []
    for rank, theirs in enumerate(all_facts):
        differing = [
            f"{name} {theirs.get(name)} / {expected[name]}" for name in expected if theirs.get(name) != expected[name]
        ]
        if differing:
            sentences.append(
                f"process {rank} on {hosts[rank]} differs from process 0 on {hosts[0]}: {'; '.join(differing)}"
            )
    return sentences


def versions() -> dict[str, str]:
    """What this process runs: Python, the packages that matter, this one and a hash of its code."""
    package = Path(__file__).resolve().parents[1]
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return {
        "Python": platform.python_version(),
        **{name: version_of(name) for name in _PACKAGES},
        "cola_ds": f"{version_of('cola_ds')} ({code.hexdigest()[:8]})",
    }


def config_hashes(config: RunConfig, engine_json: dict[str, Any]) -> dict[str, str]:
    """What tells a resolved config, and its DeepSpeed JSON, from others."""
    return {
        "config": hashlib.sha256(dump_config(config).encode()).hexdigest()[:8],
        "DeepSpeed JSON": hashlib.sha256(json.dumps(engine_json, sort_keys=True).encode()).hexdigest()[:8],
    }


def _facts(prepared: Prepared) -> dict[str, str]:
    return {
        **versions(),
        **config_hashes(prepared.config, prepared.engine_json),
        "attention": shown_name(prepared.attention),
        "kernels": f"Liger's {version_of('liger_kernel')}" if prepared.kernels else "torch's",
        "training data": _describe(prepared.train, prepared.fingerprints["train"]),
        "held-out data": _describe(prepared.held_out, prepared.fingerprints["held_out"]),
        "watched data": _describe(prepared.watched, prepared.fingerprints["watched"]),
        "test data": _describe(prepared.test, prepared.fingerprints["test"]),
    }


def _describe(data: TokenizedData | TaskData | None, fingerprint: str | None) -> str:
    return "none" if data is None or fingerprint is None else f"{counted(len(data), 'example')} ({fingerprint[:8]})"


def check_shared(folder: Path) -> None:
    """Raise UserError, on all processes, where one does not see the lock that process 0 holds in the run folder. Collective."""
    expected = collectives.broadcast_object(lock.held_id())
    deadline = time.monotonic() + SHARED_WITHIN_S
    while not (seen := (lock.holder(folder) or {}).get("id") == expected) and time.monotonic() < deadline:
        time.sleep(0.2)
    hosts = collectives.hosts()
    for rank, sees in enumerate(collectives.all_gather_numbers(float(seen))):
        if not sees:
            raise UserError(
                f"run.dir {folder} on {hosts[rank]} (process {rank}) is not the folder that it is on {hosts[0]} (process 0): "
                "a run that comes back on another node would not find its checkpoints; name a folder on a shared file system"
            )
