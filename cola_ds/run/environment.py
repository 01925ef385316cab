"""The environment of a run: versions, git revision, hosts. No environment variables: they hold secrets."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

_GIT_WITHIN_S = 10
_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "numpy")


def describe_environment(hosts: list[str], accelerator: str) -> dict[str, Any]:
    """environment.json: what would be needed to run this again."""
    return {
        "cola_ds": version_of("cola_ds"),
        "git_revision": _git_revision(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "accelerator": accelerator,
        "world_size": len(hosts),
        "hosts": sorted(set(hosts)),
    }


def version_of(package: str) -> str:
    """The package's version; "unknown" where its metadata are missing: it may have been put on the path by hand."""
    try:
        return str(importlib.metadata.version(package) or "unknown")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git_revision(source: Path) -> str | None:
    """The commit that the code is of, where git can tell, and does so at once."""
    try:
        # Whether this file is in that commit is asked as well: an installed package may lie in a repository of its user's.
        command = ["git", "-C", str(source), "rev-parse", "HEAD", f"HEAD:./{Path(__file__).name}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_GIT_WITHIN_S)
    except (OSError, subprocess.SubprocessError):  # there is none, or it hangs: on a network file system, say
        return None
    said = re.match(r"([0-9a-f]{40,64})\n", done.stdout.decode(errors="replace"))
    return said[1] if done.returncode == 0 and said else None
