"""Earlier links: those that are tied to the base before a run's own, of a finished run (model.links) or a PEFT adapter
(model.adapter).

A run that trains keeps a copy of them in earlier/: what it leaves is a whole chain, and where they came from may be gone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from cola_ds.config.inputs import sha256_of
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError, cut
from cola_ds.run.adapters import open_adapter
from cola_ds.run.learnt import SavedLink, read_learnt, run_config, run_marker
from cola_ds.run.marker import Marker
from cola_ds.run.peft_files import BASE, PREFIX, adapter_files, bias_name, layers_of, lora_names, read_link

_LINK = re.compile(r"link-(\d{4})")
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class EarlierLink:
    """One of them, wherever it lies."""

    folder: Path
    lora_rank: int
    alpha: float
    shapes: Shapes
    """By layer, of A (r, in) and B (out, r) as they lie there."""
    biases: dict[str, tuple[int, ...]]
    """By layer, of trained biases (out,)."""
    read: Callable[[], dict[str, Tensor]]
    """The link's tensors, with one LoRA rank for all layers."""
    copies: bool
    """Whether its files are a link's already."""
    stands_for: int = 1
    """Links that were drawn for it: an adapter may be a whole chain, or what is left of one."""
    transposed: bool = False
    """What its adapter_config.json says of its layers (fan_in_fan_out), where they are not."""

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.lora_rank

    def files(self, config: RunConfig) -> dict[str, bytes]:
        """A link's files, for a run of that config."""
        if self.copies:
            names = ("adapter_model.safetensors", "adapter_config.json")
            return {name: (self.folder / name).read_bytes() for name in names}
        bias = "lora_only" if self.biases else "none"
        layers = list(self.shapes)
        return adapter_files(config, self.lora_rank, self.alpha, layers, self.read(), self.transposed, bias=bias)


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The earlier links of a run."""

    named: str
    """The key that names them, and its value."""
    links: list[EarlierLink]
    base: str | None
    """The fingerprint of the model that they belong to, where that is known."""
    config: RunConfig | None
    """Of the run whose links they are."""
    hashes: Callable[[], list[str]]
    """SHA-256 of what they are, as it lies where it was named."""
    kept: bool = False
    """Whether these are the run's own copies."""

    @property
    def size_bytes(self) -> int:
        """On the disk."""
        return sum((link.folder / "adapter_model.safetensors").stat().st_size for link in self.links)

    def made(self, config: RunConfig) -> Iterable[tuple[EarlierLink, dict[str, bytes]]]:
        """Each with a link's files, for a run of that config: read when it is asked for or, of copies, at once: their folder may
        be made anew before that."""
        files = ((link, link.files(config)) for link in self.links)
        return list(files) if self.kept else files


def find_earlier(config: RunConfig, verified: bool = False) -> Earlier | None:
    """The earlier links of a run, from where its config says or, once it has begun and that is gone, from its own folder. With
    `verified` they are hashed, too, which one process does for all. Raises UserError where they are not there, not finished or
    have changed."""
    named = config.model.links if config.model.links is not None else config.model.adapter
    if named is None:
        return None
    key = "model.links" if config.model.links is not None else "model.adapter"
    if config.trains and not os.path.lexists(named):
        marker = Marker.read(Path(config.run.dir))
        if (
            marker
            and marker.begun
            and marker.facts["earlier"]
            # All of them: the run may have died between two. (An adapter is one, of files that are hashed each.)
            and (key == "model.adapter" or len(marker.facts["earlier"]) == len(marker.facts["base_links"]))
            and marker.facts["config"]["model"].get(key[6:]) == named
        ):
            return _kept(config, f"{key} {named}", marker, verified)
    return _of_run(named, verified) if key == "model.links" else _of_adapter(named)


def _of_run(run: str, verified: bool) -> Earlier:
    folder = Path(run)
    marker = run_marker(folder)
    config = run_config(folder, marker)
    if verified:
        read_learnt(folder)
    if not (folder / "result.json").is_file():
        raise UserError(f"model.links {run} has not finished: it has no result.json; the command that began it goes on")
    rows = [("earlier", row) for row in marker.facts["earlier"]] + [("chain", row) for row in marker.facts["links"]]
    if not marker.facts["links"]:
        raise UserError(f"model.links {run} has no links: its method is {config.method}")
    return Earlier(
        named=f"model.links {run}", links=[_of_row(folder / below, row) for below, row in rows], base=marker.facts["base"],
        config=config, hashes=lambda: [row["sha256"] for _, row in rows],
    )  # fmt: skip


def _of_row(below: Path, row: dict[str, Any]) -> EarlierLink:
    link = SavedLink(
        path=below / f"link-{row['link']:04d}",
        lora_rank=row["lora_rank"],
        alpha=row["lora_alpha"],
        layers=row["layers"],
    )
    if not link.file.is_file():
        raise UserError(f"{link.path} is missing: a link that is tied before the run's own; put it back")
    with safe_open(link.file, framework="pt") as opened:
        found = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    named = {name.removeprefix(PREFIX): shape for name, shape in found.items()}
    shapes = {}
    if set(link.layers) != set(layers_of(named)):
        raise UserError(f"{link.file} has other layers than the run's record of it: one of them was changed")
    for layer in link.layers:  # in the run's own order: the file has them sorted by name
        A, B = lora_names(layer)
        shapes[layer] = (named[A], named[B])
    return EarlierLink(
        folder=link.path, lora_rank=link.lora_rank, alpha=link.alpha, shapes=shapes,
        biases={layer: named[bias_name(layer)] for layer in shapes if bias_name(layer) in named},
        read=partial(read_link, link.file), copies=True, stands_for=row.get("stands_for", 1),
    )  # fmt: skip


def _of_adapter(named: str) -> Earlier:
    folder = Path(named)
    if not folder.is_dir():
        raise UserError(f"model.adapter {cut(named)} is not a folder; name that of a PEFT adapter")
    adapter, base = open_adapter(folder), None
    run = folder.resolve().parent.parent
    below, number = folder.resolve().parent.name, _LINK.fullmatch(folder.resolve().name)
    if number and below in ("chain", "earlier") and (marker := Marker.read(run)) and marker.begun:
        base = marker.facts["base"]
        if int(number[1]) > 1 or (below == "chain" and marker.facts["earlier"]):
            raise UserError(
                f"model.adapter {named} is a link on top of others, which it is nothing without: name the run by model.links, or "
                "export its chain (cola-ds export --upto LINK --to peft)"
            )
    link = EarlierLink(
        folder=folder, lora_rank=adapter.lora_rank, alpha=adapter.scaling * adapter.lora_rank, shapes=adapter.shapes,
        biases=adapter.biases, read=adapter.tensors, copies=False, stands_for=adapter.links,
        transposed=adapter.transposed,
    )  # fmt: skip
    names = ["adapter_model.safetensors", "adapter_config.json", *([BASE] if (folder / BASE).is_file() else [])]
    return Earlier(
        named=f"model.adapter {named}", links=[link], base=adapter.base or base, config=None,
        hashes=lambda: [sha256_of(folder / name) for name in names],
    )  # fmt: skip


def _kept(config: RunConfig, named: str, marker: Marker, verified: bool) -> Earlier:
    """The run's own copies."""
    below = Path(config.run.dir) / "earlier"
    for row in marker.facts["earlier"] if verified else ():
        for name, digest in (("model.safetensors", row["sha256"]), ("config.json", row["config_sha256"])):
            path = below / f"link-{row['link']:04d}/adapter_{name}"
            if not path.is_file() or sha256_of(path) != digest:
                raise UserError(
                    f"{path} has changed, and {named}, which it was copied from, is not there: put one of them back"
                )
    return Earlier(
        named=named, links=[_of_row(below, row) for row in marker.facts["earlier"]], base=marker.facts["base"], config=None,
        hashes=lambda: list(marker.facts["base_links"] or []), kept=True,
    )  # fmt: skip
