"""A run before it starts: what is known of it without its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cola_ds.checkpoint.decide import Identity, engine_facts
from cola_ds.config.schema import RunConfig
from cola_ds.config.steps import StepPlan
from cola_ds.data.order import Order
from cola_ds.data.tasks.dataset import TaskData
from cola_ds.data.text import TokenizedData
from cola_ds.data.tokenize import Found
from cola_ds.lora.targets import sizes_of


@dataclass(frozen=True, kw_only=True)
class Described:
    """A config whose DeepSpeed JSON, model and targets fit each other: all that the model's config.json tells."""

    config: RunConfig
    engine_json: dict[str, Any]
    skeleton: Any
    """The model on the meta device: its modules and shapes."""
    targets: list[str]
    max_length: int
    """Tokens of the longest row that there can be."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A config whose DeepSpeed JSON, model and targets fit each other, and whose files are there. No data has been read but a
    task's."""

    config: RunConfig
    engine_json: dict[str, Any]
    tokenizer: Any
    skeleton: Any
    targets: list[str]
    attention: str | None
    """Transformers' name of the attention that the model gets; None: Transformers chooses."""
    kernels: bool
    """Whether the model gets Liger's kernels."""
    task: tuple[TaskData, TaskData, TaskData, str] | None
    """Its train, dev and test examples, and their sizes in one line."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that has passed every check that needs no weights."""

    config: RunConfig
    engine_json: dict[str, Any]
    """The DeepSpeed JSON as it was read."""
    engine_config: dict[str, Any]
    """What DeepSpeed's engine gets: the JSON, completed; its stage and sizes by `settle_engine`."""
    stage_reason: str = ""
    """Why the stage is what it is, where it was chosen."""
    nodes: list[list[int]] | None = None
    """The ranks of each node, where each keeps the base in shards of its own; None: its shards lie on all processes."""
    shards_reason: str = ""
    """Why that is so, where it was chosen."""
    step_plan: StepPlan
    tokenizer: Any
    skeleton: Any
    """The model on the meta device: its modules and shapes."""
    targets: list[str]
    attention: str | None
    kernels: bool
    train: TokenizedData | TaskData
    order: Order
    """Which examples of `train` each row of an epoch has."""
    held_out: TokenizedData | TaskData | None
    watched: TokenizedData | None = None
    """data.watch."""
    test: TaskData | None = None
    """Of a task: what is reported, once `held_out`, its dev split, has chosen."""
    sizes: str = ""
    """Of a task: how many examples each split has, and what was left out."""
    found: Found | None = None
    """Of text: what has been tokenized."""

    @functools.cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """SHA-256 of all that the run reads of train, held_out, watched and test, in order; None for a split that it has not."""
        splits = {"train": self.train, "held_out": self.held_out, "watched": self.watched, "test": self.test}
        return {name: None if data is None else data.fingerprint() for name, data in splits.items()}

    @property
    def identity(self) -> Identity:
        """What the run is, apart from its config."""
        train, held_out = self.fingerprints["train"], self.fingerprints["held_out"]
        assert train is not None
        if self.test is not None:
            held_out = f"{held_out} {self.fingerprints['test']}"
        return Identity(engine_facts(self.engine_json), train, held_out, self.fingerprints["watched"])


def count_trainable(prepared: Prepared | Described, link: int) -> int:
    """Parameters that `link` trains: A and B, or one of them (and biases, if asked), or all of them with method full."""
    config = prepared.config
    if config.method == "full":
        return sum(p.numel() for p in prepared.skeleton.parameters())
    biases = 0
    if config.lora.bias == "lora_only":
        layers = [prepared.skeleton.get_submodule(name) for name in prepared.targets]
        biases = sum(layer.bias.numel() for layer in layers if layer.bias is not None)
    part = {"both": "AB"}.get(config.lora_trains[link - 1], config.lora_trains[link - 1])
    return _factors(prepared, link, part) + biases


def trained_of_links(prepared: Prepared | Described) -> list[int]:
    """Parameters that each link trains."""
    return _of_links(prepared, count_trainable)


def frozen_of_links(prepared: Prepared | Described) -> list[int]:
    """Elements of each link's factors that are not trained: of A or B, and of what a link starts at."""
    if not prepared.config.trains_lora:
        return [0]
    return _of_links(prepared, lambda prepared, link: _held(prepared, link) - count_trainable(prepared, link))


def tied_of_links(prepared: Prepared | Described) -> list[int]:
    """Elements of each link as it is tied and saved: A and B, both halves of them where it starts elsewhere, and biases."""
    return _of_links(prepared, _held)


def _held(prepared: Prepared | Described, link: int) -> int:
    if not prepared.config.trains_lora:
        return count_trainable(prepared, link)
    part = {"A": "B", "B": "A"}.get(prepared.config.lora_trains[link - 1], "")
    beside = count_adapters(prepared, link) if prepared.config.starts_elsewhere else 0
    return count_trainable(prepared, link) + _factors(prepared, link, part) + beside


def _of_links(prepared: Prepared | Described, count: Callable[[Prepared | Described, int], int]) -> list[int]:
    """A count of each link; of those alike once."""
    kinds = list(zip(prepared.config.lora_ranks, prepared.config.lora_trains, strict=True))
    counts = {kind: count(prepared, kinds.index(kind) + 1) for kind in {*kinds}}
    return [counts[kind] for kind in kinds]


def count_adapters(prepared: Prepared | Described, link: int) -> int:
    """Elements of A and B of all layers in `link`."""
    return _factors(prepared, link, "AB")


def _factors(prepared: Prepared | Described, link: int, which: str) -> int:
    """Elements of A, of B, or of both, of all layers in `link`."""
    sizes = [sizes_of(prepared.skeleton.get_submodule(name)) for name in prepared.targets]
    width = sum(("A" in which) * of_A + ("B" in which) * of_B for of_A, of_B in sizes)
    return prepared.config.lora_ranks[link - 1] * width
