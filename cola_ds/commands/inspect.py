"""`cola-ds inspect`: the state of a run at a glance, from its folder alone. Nothing is loaded but small files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from cola_ds.checkpoint.format import DamagedError, read_checkpoint
from cola_ds.checkpoint.store import CheckpointFolder
from cola_ds.config.inputs import sha256_of
from cola_ds.config.loading import load_config
from cola_ds.errors import UserError, counted
from cola_ds.run import lock
from cola_ds.run.folder import RunDir
from cola_ds.run.learnt import read_learnt, run_config, run_marker
from cola_ds.run.marker import Marker
from cola_ds.run.scores import loss_objective, score_objective


def inspect(run: str) -> str:
    """Lines for people: how far a run is, its links, its best score, and which of its checkpoints hold.

    Raises UserError for a folder that no run left.
    """
    marker = run_marker(Path(run))
    folder = RunDir(run)
    damage = _damage(folder, marker)
    config, checkpoints = load_config(folder.path / "run.yaml"), CheckpointFolder(folder)
    found = {path.name: _state(path) for path in checkpoints.steps()}
    good = [state for state in found.values() if not isinstance(state, str)]
    metrics, evaluations, events = (folder.rows(f"{name}.jsonl") for name in ("metrics", "evals", "events"))
    last = metrics[-1] if metrics else {"step": 0, "link": 1}
    total = f" of {good[0].knots[-1]}" if good else ""
    lines = [
        f"run          {folder.path}",
        f"method       {config.method}, {config.model.path} ({config.model.dtype})",
        f"status       {_status(folder, events)}",
        *([f"DAMAGED      {damage}"] if damage else []),
        f"steps        {last['step']}{total} logged"
        + (f", loss {last['loss']:.4f}" if last.get("loss") is not None else ""),
    ]
    skipped = [row for row in events if row["event"] == "skipped" and "step" in row]
    if skipped:
        lines.append(
            f"skipped      {counted(len({row['step'] for row in skipped}), 'update')}, the last at step {skipped[-1]['step']}"
        )
    losses = [row for row in evaluations if row.get("loss") is not None]
    if losses:
        best = min(losses, key=lambda row: loss_objective(row["loss"]))
        lines.append(f"best         held-out loss {best['loss']:.4f} at step {best['step']}")
    on_dev = [row for row in evaluations if row.get("split") == "dev" and {"score", "metric"} <= row.keys()]
    if on_dev:
        best = min(on_dev, key=lambda row: score_objective(row["score"]))
        lines.append(f"best         {best['metric']} {best['score']:.4f} on dev at step {best['step']}")
    if config.trains_lora:
        most = "at most " if config.chain.plateau else ""
        earlier = len(marker.facts["earlier"])
        after = f", after {earlier} of {config.model.links or config.model.adapter}" if earlier else ""
        lines.append(f"links        {_count_links(folder)} of {most}{config.chain.length} tied{after}")
    for row in folder.rows("knots.jsonl"):
        at = f"  link {row['link']}     step {row['step']}, LoRA rank {row['lora_rank']}, |delta| {row['delta_norm']:.4g}"
        lines.append(at + (f", rounding error {row['rounding_error']:.2%}" if row.get("rounding_error") else ""))
    if words := _replay(folder, damage):
        lines.append(f"replay       {shlex.join(words)}")
    lines.append(f"checkpoints  {len(found) or 'none'}")
    marks = {"latest": checkpoints.pointer("latest"), "best": checkpoints.pointer("best")}
    for name, state in found.items():
        holds = state if isinstance(state, str) else "checksums hold" + _links_hold(folder, checkpoints, name)
        lines.append(f"  {name}  {holds}" + "".join(f", {mark}" for mark, target in marks.items() if target == name))
    return "\n".join(lines)


def _replay(folder: RunDir, damage: str) -> list[str]:
    """The overrides with which a run comes to the same knots, where the loss has placed them."""
    path = folder.path / "result.json"
    return [] if damage or not path.exists() else list(json.loads(path.read_bytes()).get("replay") or [])


def _state(path: Path) -> Any:
    try:
        return read_checkpoint(path).state
    except DamagedError as error:
        return f"DAMAGED: {error}"


def _damage(folder: RunDir, marker: Marker) -> str:
    """What is not as the run left it; nothing where all is."""
    try:
        run_config(folder.path, marker)
        if (folder.path / "result.json").exists():
            read_learnt(folder.path)
    except UserError as error:
        return str(error)
    return ""


def _status(folder: RunDir, events: list[dict[str, Any]]) -> str:
    last = next(
        (row for row in reversed(events) if row["event"] in ("started", "resumed", "stopped", "finished")), None
    )
    starts = sum(row["event"] in ("started", "resumed") for row in events)
    when = f" ({last.get('time', '?')}, start {starts})" if last else ""
    held = lock.holder(folder.path)
    if held:
        return f"going on: process {held.get('pid')} on {held.get('host')}{when}"
    if (folder.path / "result.json").exists():
        return f"finished{when}"
    if last and last["event"] == "stopped":
        return (
            f"stopped on {last.get('signal', '?')} after step {last.get('step', '?')}; the same command goes on{when}"
        )
    return f"ended before it was finished; the same command goes on from its newest checkpoint{when}"


def _count_links(folder: RunDir) -> int:
    return len(list((folder.path / "chain").glob("link-[0-9][0-9][0-9][0-9]")))


def _links_hold(folder: RunDir, checkpoints: CheckpointFolder, name: str) -> str:
    """What is to be said of chain/ beside a checkpoint: a link there that is not the one which the checkpoint holds."""
    files = json.loads((checkpoints.path / name / "manifest.json").read_bytes())["files"]
    for file, entry in files.items():
        if file.startswith("link-"):
            path = folder.link_path(int(file[5:9])) / "adapter_model.safetensors"
            if not path.is_file() or sha256_of(path) != entry["sha256"]:
                return f" (but {path.relative_to(folder.path)} is not the link in it)"
    return ""
