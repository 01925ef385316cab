"""What the engine becomes once the processes, their nodes and their memory are known: ZeRO's stage, its sizes, and where shards
lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

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
from cola_ds.training.prepared import Prepared, count_trainable

UNKNOWN = ""
"""The host of a process that is not there yet."""


def settle_engine(prepared: Prepared, hosts: Sequence[str], memory: Callable[[], tuple[int, int]]) -> Prepared:
    """The same, its engine's stage and sizes known, and whether each node has shards of its own. `hosts` names that of every
    process, or is UNKNOWN. `memory` says what the process with least has, in bytes: where it computes, and on its host. It is
    asked (collective, if it is) where something is left to be chosen. Raises UserError for node shards that cannot be had."""
    config, zero = prepared.config, prepared.engine_config["zero_optimization"]
    shapes, reason = _shapes_of(prepared), ""
    if zero["stage"] == "auto":
        stage, reason = _stage(prepared, shapes, len(hosts), memory)
        check_compilable(config, stage)
        zero = {**zero, "stage": stage}
    nodes, shards_reason = _nodes(prepared, shapes, zero["stage"], hosts, memory)
    zero = with_sizes(zero, shapes, config.method == "full", prepared.step_plan.micro_steps)
    return dataclasses.replace(
        prepared, engine_config={**prepared.engine_config, "zero_optimization": zero}, stage_reason=reason, nodes=nodes,
        shards_reason=shards_reason,
    )  # fmt: skip


def _stage(
    prepared: Prepared, shapes: Shapes, world_size: int, memory: Callable[[], tuple[int, int]]
) -> tuple[int, str]:
    config = prepared.config
    if config.method == "full":
        return 3, "method full trains every weight"
    if config.model.shards == "node":
        return 3, "model.shards is node"
    if world_size == 1:
        return 2, "one process has nothing to shard"  # nor does it need stage 3's hooks on every module
    return choose_stage(_need(prepared, shapes), *memory(), one=_computes_on_host())


def _nodes(
    prepared: Prepared, shapes: Shapes, stage: int, hosts: Sequence[str], memory: Callable[[], tuple[int, int]]
) -> tuple[list[list[int]] | None, str]:
    """The ranks of each node, where each has shards of its own; None where they lie on all processes. And why, if that was
    chosen."""
    config, nodes = prepared.config, nodes_of(hosts)
    wanted = config.model.shards
    if wanted == "node" and stage != 3:
        raise UserError(f"model.shards node needs ZeRO stage 3, and {cut(config.deepspeed)} means stage {stage} here")
    if wanted == "node" and len(nodes) == 1 and len(hosts) > 1 and hosts[0] != UNKNOWN:
        return None, f"over all {len(hosts)} processes: all are on {hosts[0]}"  # or are hosts of one name
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
        _need(prepared, shapes), shapes, DTYPES[config.model.dtype].element_bytes, len(nodes[0]), *memory(),
        one=_computes_on_host(),
    )  # fmt: skip
    return nodes if fits else None, reason


def _computes_on_host() -> bool:
    from cola_ds.distributed.accelerator import kind

    return kind() == "cpu"


def _need(prepared: Prepared, shapes: Shapes) -> Need:
    config = prepared.config
    return need(
        shapes, DTYPES[config.model.dtype].element_bytes, config.optim.micro_batch_size * _longest_row(prepared),
        recomputes=config.model.activation_checkpointing, remainder_bytes=_bytes_a_remainder(config),
    )  # fmt: skip


def _longest_row(prepared: Prepared) -> int:
    return prepared.order.capacity or max(map(int, prepared.train.lengths))


def _shapes_of(prepared: Prepared) -> Shapes:
    config, skeleton = prepared.config, prepared.skeleton
    parameters = list(skeleton.parameters())
    layers = [skeleton.get_submodule(name) for name in prepared.targets]
    linear = [module for module in skeleton.modules() if isinstance(module, torch.nn.Linear)]
    links = range(1, config.chain.length + 1) if config.trains else ()
    vocabulary, hidden = skeleton.get_input_embeddings().weight.shape
    largest = max((max(layer.in_features, layer.out_features) for layer in layers), default=0)
    return Shapes(
        weights=tuple(p.numel() for p in parameters if p.dim() > 1),
        vectors=tuple(p.numel() for p in parameters if p.dim() < 2),
        adapter=max(config.lora_ranks) * largest,
        trained=max((count_trainable(prepared, link) for link in links), default=0),
        targets=sum(layer.weight.numel() for layer in layers),
        width=sum(layer.in_features + layer.out_features for layer in linear),
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
    return _bytes_a_remainder(prepared.config) * elements * copies


def _bytes_a_remainder(config: RunConfig) -> int:
    """Of one element of a target weight; 0 where nothing is kept."""
    if config.model.dtype == "fp32" or config.chain.length == 1:
        return 0
    weight = getattr(torch, DTYPES[config.model.dtype].torch_name)
    return remainder_dtype(weight, exact=config.chain.merge == "exact").itemsize
