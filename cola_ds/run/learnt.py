"""What a run has learnt, as whoever reads a run must see it: checked against what was recorded when its links were tied.

Training, export, evaluation, inspection and reports read a run's config, links and result through here, and nowhere else.
Neither torch nor a model is needed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cola_ds.config.inputs import sha256_of
from cola_ds.config.keys import flat_keys, is_free, is_place
from cola_ds.config.loading import load_config
from cola_ds.config.schema import RunConfig, is_task_file
from cola_ds.errors import UserError, some_of
from cola_ds.run.marker import NAME, Marker

_COPIES = "its checkpoints hold a copy: remove result.json, and the run's own command goes on from there"
_SOURCE = "remove result.json, and the run's own command copies it anew from where model.links or model.adapter says"


@dataclass(frozen=True, kw_only=True)
class SavedLink:
    """A link of a chain, as it was tied."""

    path: Path
    lora_rank: int
    alpha: float
    layers: list[str]
    transposed: bool = False
    """Whether their weights are (in, out)."""

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.lora_rank

    @property
    def file(self) -> Path:
        """A, B and trained biases."""
        return self.path / "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """A run that has finished."""

    folder: Path
    config: RunConfig
    result: dict[str, Any]
    """result.json."""
    base: str
    """The fingerprint of the model that it began with."""
    links: list[SavedLink]
    """Its own."""
    earlier: list[SavedLink] = field(default_factory=list)
    """Those that were tied to that model before."""
    facts: dict[str, Any]
    """All that it recorded of itself."""

    @property
    def chain(self) -> list[SavedLink]:
        """All links that lead from the base to what was learnt, in order."""
        return [*self.earlier, *self.links]

    def check_base(self, path: str, fingerprint: str) -> None:
        """Raise UserError where that is not the model which the run began with."""
        if fingerprint != self.base:
            raise UserError(
                f"model.path {path} is not the base model of {self.folder}: its fingerprint is {fingerprint[:16]}, that run's "
                f"{self.base[:16]}; name the run's own by model.path=FOLDER"
            )


def run_marker(folder: Path) -> Marker:
    """What the folder's run.json says. Raises UserError where no run has begun there."""
    marker = Marker.read(folder)
    if marker is None or not marker.begun:
        held = "it has no run.json" if marker is None else "what was in it is being removed"
        raise UserError(f"{folder} is no run's folder: {held}; name one that `cola-ds train` wrote")
    return marker


def run_config(folder: Path, marker: Marker | None = None) -> RunConfig:
    """A run's config, from run.yaml. Raises UserError where that is not what the run was started with, but for where things lie
    and what cannot change a result."""
    if not (folder / "run.yaml").is_file():
        held = "it has no run.json" if not is_run(folder) else "its run.yaml is missing: put it back"
        raise UserError(f"{folder} cannot be read as a run: {held}")
    marker = marker or run_marker(folder)
    config = load_config(folder / "run.yaml")
    said, recorded = flat_keys(config.model_dump(mode="json")), flat_keys(marker.facts["config"])
    changed = [
        f"{key} {said.get(key)}, and {NAME} {value}"
        for key, value in recorded.items()
        if said.get(key) != value and not (is_free(key) or is_place(key) or _both_files(key, value, said.get(key)))
    ]
    if changed:
        raise UserError(
            f"{folder / 'run.yaml'} says {some_of(changed, '; ')}: one of them has changed since; put it back"
        )
    return config


def _both_files(key: str, *values: Any) -> bool:
    return key == "data.task" and all(isinstance(value, str) and is_task_file(value) for value in values)


def read_learnt(folder: str | Path) -> Learnt:
    """What a finished run has learnt.

    Raises UserError, naming the file, for a folder that is no run's, a run that has not finished, a config or a result that is
    not the run's own, and a link (or, with method full, a model) that is missing or is not the one that the run made.
    """
    path = Path(folder)
    marker = run_marker(path)
    config = run_config(path, marker)
    result = _result(path, marker)
    links = [_link(path, "chain", row) for row in marker.facts["links"]]
    earlier = [_link(path, "earlier", row) for row in marker.facts["earlier"]]
    for name, digest in marker.facts.get("model", {}).items():
        _check_file(path / name, digest, "the model that the run trained")
    return Learnt(
        folder=path, config=config, result=result, base=marker.facts["base"], links=links, earlier=earlier,
        facts=marker.facts,
    )  # fmt: skip


def _result(folder: Path, marker: Marker) -> dict[str, Any]:
    path = folder / "result.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no result.json: the run has not finished; the command that began it goes on with it"
        )
    if sha256_of(path) not in marker.facts.get("result", []):
        raise UserError(
            f"{path} is not what the run in this folder wrote: put that back, or remove it, and the run's own command goes on "
            "from its newest checkpoint"
        )
    return dict(json.loads(path.read_bytes()))


def _link(folder: Path, below: str, row: dict[str, Any]) -> SavedLink:
    link = SavedLink(
        path=folder / below / f"link-{row['link']:04d}",
        lora_rank=row["lora_rank"],
        alpha=row["lora_alpha"],
        layers=row["layers"],
    )
    remedy = _COPIES if below == "chain" else _SOURCE
    if not link.file.is_file():
        raise UserError(f"{folder} lacks {link.path.relative_to(folder)}: a link of the chain is missing; {remedy}")
    _check_file(link.file, row["sha256"], "the link that the run tied", remedy)
    _check_file(link.path / "adapter_config.json", row["config_sha256"], "what the run wrote of this link", remedy)
    said = json.loads((link.path / "adapter_config.json").read_bytes())
    link = replace(link, transposed=bool(said.get("fan_in_fan_out")))
    if [said.get(key) for key in ("r", "lora_alpha", "target_modules")] != [link.lora_rank, link.alpha, link.layers]:
        raise UserError(
            f"{link.path / 'adapter_config.json'} and {folder / NAME} contradict each other: one was changed"
        )
    return link


def _check_file(path: Path, digest: str, what: str, remedy: str = _COPIES) -> None:
    if not path.is_file() or sha256_of(path) != digest:
        raise UserError(f"{path} is not {what}: it has changed; {remedy}")


def is_run(folder: Path) -> bool:
    """Whether a run has begun there, without looking closer."""
    return os.path.isfile(folder / NAME)
