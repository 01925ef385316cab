"""What the engine becomes once the processes, their nodes and their memory are known: ZeRO's stage, its sizes, and where shards
lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cola_ds.config.deepspeed_json import check_compilable
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.engine_sizes import (
    Need,
    Shapes,
    choose_shards,
    choose_stage,
    need,
    nodes_of,
    why_not_alike,
    with_sizes,
)
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError, cut
from cola_ds.lora.remainders import remainder_dtype
from cola_ds.lora.targets import is_linear, sizes_of
from cola_ds.training.prepared import Described, Prepared, frozen_of_links, trained_of_links


@dataclasses.dataclass(frozen=True)
class Settled:
    """What the engine becomes: as in Prepared."""

    zero: dict[str, Any]
    stage_reason: str
    nodes: list[list[int]] | None
    shards_reason: str


UNKNOWN = ""
"""The host of a process that is not there yet."""


def settle_engine(prepared: Prepared, hosts: Sequence[str], memory: Callable[[], tuple[int, int]]) -> Prepared:
    """The same, its engine's stage and sizes known, and whether each node has shards of its own. `hosts` names that of every
    process, or is UNKNOWN. `memory` says what the process with least has, in bytes: where it computes, and on its host. It is
    asked (collective, if it is) where something is left to be chosen. Raises UserError for node shards that cannot be had."""
    longest = prepared.order.capacity or max(map(int, prepared.train.lengths))
    settled = settle(
        prepared, prepared.engine_config["zero_optimization"], prepared.step_plan.micro_steps, longest, hosts, memory,
        computes_on_host(),
    )  # fmt: skip
    return dataclasses.replace(
        prepared, engine_config={**prepared.engine_config, "zero_optimization": settled.zero},
        stage_reason=settled.stage_reason, nodes=settled.nodes, shards_reason=settled.shards_reason,
    )  # fmt: skip


def settle(
    model: Prepared | Described, zero: dict[str, Any], micro_steps: int, longest: int, hosts: Sequence[str],
    memory: Callable[[], tuple[int, int]], one: bool,
) -> Settled:  # fmt: skip
    """As `settle_engine`, of a model whose longest row has `longest` tokens; `one`: it computes on the host."""
    shapes, reason = _shapes_of(model), ""
    needed = _need(model, shapes, longest)
    if zero["stage"] == "auto":
        stage, reason = _stage(model.config, needed, len(hosts), memory, one)
        check_compilable(model.config, stage)
        zero = {**zero, "stage": stage}
    nodes, shards_reason = _nodes(model.config, needed, shapes, zero["stage"], hosts, memory, one)
    zero = with_sizes(zero, shapes, model.config.method == "full", micro_steps)
    return Settled(zero, reason, nodes, shards_reason)


def _stage(
    config: RunConfig, needed: Need, world_size: int, memory: Callable[[], tuple[int, int]], one: bool
) -> tuple[int, str]:
    if config.method == "full":
        return 3, "method full trains every weight"
    if config.model.shards == "node":
        return 3, "model.shards is node"
    if world_size == 1:
        return 2, "one process has nothing to shard"  # nor does it need stage 3's hooks on every module
    return choose_stage(needed, *memory(), one=one)


def _nodes(
    config: RunConfig, needed: Need, shapes: Shapes, stage: int, hosts: Sequence[str], memory: Callable[[], tuple[int, int]],
    one: bool,
) -> tuple[list[list[int]] | None, str]:  # fmt: skip
    """The ranks of each node, where each has shards of its own; None where they lie on all processes. And why, if that was
    chosen."""
    nodes, wanted = nodes_of(hosts), config.model.shards
    if wanted == "node" and stage != 3:
        raise UserError(f"model.shards node needs ZeRO stage 3, and {cut(config.deepspeed)} means stage {stage} here")
    if wanted == "node" and len(nodes) == 1 and len(hosts) > 1 and hosts[0] != UNKNOWN:
        return None, f"over all {len(hosts)} processes: all are on {hosts[0]}"  # or are hosts of one name
    if wanted == "node" and len(hosts) > 1 and len(nodes) == 1:
        return None, "in each node, where there are several"
    if wanted == "world" or stage != 3 or len(nodes) == 1:
        return None, ""
    why = why_not_alike(hosts)
    if wanted == "node":
        if why is not None:
            raise UserError(f"model.shards node is not for this run: {why}; start as many on each, or use world")
        return nodes, ""
    if config.method == "full":
        return None, ""
    if why is not None:
        return None, f"over all processes: {why}"
    fits, reason = choose_shards(
        needed, shapes, DTYPES[config.model.dtype].element_bytes, len(nodes[0]), *memory(), one=one
    )  # fmt: skip
    return nodes if fits else None, reason


def computes_on_host() -> bool:
    """Whether what a process computes with lies in its host's memory."""
    from cola_ds.distributed.accelerator import kind

    return kind() == "cpu"


def _need(model: Prepared | Described, shapes: Shapes, longest: int) -> Need:
    config = model.config
    return need(
        shapes, DTYPES[config.model.dtype].element_bytes, config.optim.micro_batch_size * longest,
        recomputes=config.model.activation_checkpointing, remainder_bytes=bytes_a_remainder(config),
    )  # fmt: skip


def _shapes_of(prepared: Prepared | Described) -> Shapes:
    config, skeleton = prepared.config, prepared.skeleton
    parameters = list(skeleton.parameters())
    layers = [skeleton.get_submodule(name) for name in prepared.targets]
    linear = [module for module in skeleton.modules() if isinstance(module, torch.nn.Linear) or is_linear(module)]
    vocabulary, hidden = skeleton.get_input_embeddings().weight.shape
    largest = max((max(sizes_of(layer)) for layer in layers), default=0)
    return Shapes(
        weights=tuple(p.numel() for p in parameters if p.dim() > 1),
        vectors=tuple(p.numel() for p in parameters if p.dim() < 2),
        adapter=max(config.lora_ranks) * largest,
        trained=max(trained_of_links(prepared)) if config.trains else 0,
        frozen=max(frozen_of_links(prepared)),
        targets=sum(layer.weight.numel() for layer in layers),
        width=sum(sum(sizes_of(layer)) for layer in linear),
        vocabulary=vocabulary,
        hidden=hidden,
        blocks=max(1, getattr(skeleton.config, "num_hidden_layers", None) or 1),
    )


def remainder_bytes(prepared: Prepared, world_size: int) -> int:
    """Host memory of the remainders of a chain, over all processes."""
    copies = world_size
    if prepared.engine_config["zero_optimization"]["stage"] == 3:
        copies = 1 if prepared.nodes is None else len(prepared.nodes)
    elements = sum(prepared.skeleton.get_submodule(name).weight.numel() for name in prepared.targets)
    return bytes_a_remainder(prepared.config) * elements * copies


def bytes_a_remainder(config: RunConfig) -> int:
    """Of one element of a target weight; 0 where nothing is kept."""
    if config.model.dtype == "fp32" or (config.chain.length == 1 and not (config.has_earlier and config.trains)):
        return 0
    weight = getattr(torch, DTYPES[config.model.dtype].torch_name)
    return remainder_dtype(weight, exact=config.chain.merge == "exact").itemsize
