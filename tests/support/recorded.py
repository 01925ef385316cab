"""Run folders that are written by hand."""

from pathlib import Path

from cola_ds.config.inputs import sha256_of
from cola_ds.run.marker import Marker

_FILES = (
    "run.yaml", "environment.json", "deepspeed.json", "result.json",
    "metrics.jsonl", "evals.jsonl", "knots.jsonl", "links.jsonl", "watch.jsonl", "events.jsonl",
)  # fmt: skip


def recorded(folder: Path) -> Path:
    """Write the run.json with which the run in the folder vouches for what is there now."""
    (folder / "run.json").unlink(missing_ok=True)
    marker = Marker(folder)
    marker.begun, marker.wrote = True, {name for name in _FILES if (folder / name).exists()}
    marker.facts = {"config": {}, "base": "", "base_links": None, "links": []}
    if (folder / "result.json").exists():
        marker.facts["result"] = [sha256_of(folder / "result.json")]
    marker.write()
    return folder
