"""Other ways to run the same training on a cluster: what else would fit, and what would be faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cola_ds.config.deepspeed_json import read_engine_config
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.steps import rows_per_step
from cola_ds.errors import UserError
from cola_ds.plan.run import Cluster, Plan, plan_run
from cola_ds.training.prepared import Described

_FASTER = 0.95
"""Of the config's own seconds: what is not faster by more is not worth a change."""
_ROWS = (1, 2, 4)


@dataclass(frozen=True)
class Choice:
    """Another way: its overrides, and what it needs."""

    overrides: list[str]
    plan: Plan


def recommend(plan: Plan) -> Choice | None:
    """The fastest way that fits, if the plan does not fit or is slower; None where nothing is to be changed, or nothing fits."""
    choices = [choice for choice in _choices(plan.described, plan.cluster) if choice.plan.fits]
    if not choices or (plan.fits and "computing" not in plan.seconds):
        return None
    best = min(
        choices, key=lambda choice: (round(_seconds(choice.plan), 3), len(choice.overrides), choice.plan.total_device)
    )
    if plan.fits and _seconds(best.plan) > _FASTER * _seconds(plan):
        return None
    return best


def smallest(plan: Plan) -> Choice | None:
    """The way that comes nearest to fitting."""
    return min(_choices(plan.described, plan.cluster), key=lambda choice: choice.plan.fullness, default=None)


def nodes_that_fit(plan: Plan, most: int = 1024) -> tuple[int, Choice] | None:
    """The fewest nodes, of twice as many and so on, on which some way fits, and that way; None: not up to `most`."""
    nodes = 2 * plan.cluster.nodes
    while nodes <= most:
        cluster = replace(plan.cluster, nodes=nodes)
        fitting = [choice for choice in _choices(plan.described, cluster) if choice.plan.fits]
        if fitting:
            return nodes, min(fitting, key=lambda choice: len(choice.overrides))
        nodes *= 2
    return None


def _seconds(plan: Plan) -> float:
    """Of a step, as if nothing overlapped."""
    return sum(plan.seconds.values())


def _choices(described: Described, cluster: Cluster) -> Iterator[Choice]:
    config = described.config
    size, now = rows_per_step(config) // cluster.processes, config.optim.micro_batch_size
    micro = sorted({now, *(rows for rows in _ROWS if rows <= size and size % rows == 0)})
    low = config.model.dtype == "bf16"
    zero3, offload = ("zero3_bf16", "zero3_bf16_offload_cpu") if low else ("zero3", "zero3_offload_cpu")
    engines = dict.fromkeys([config.deepspeed, "zero2", zero3, offload])
    shards = ["world", "node"] if cluster.nodes > 1 and config.method != "full" else [None]
    for engine in engines:
        for where in [None] if engine == "zero2" else shards:
            for recomputes in (False, True):
                for rows in micro:
                    found = _try(described, cluster, engine, where, recomputes, rows)
                    if found is not None:
                        yield found


def _try(
    described: Described, cluster: Cluster, engine: str, shards: str | None, recomputes: bool, rows: int
) -> Choice | None:
    config, overrides = described.config, []
    model: dict[str, Any] = {"activation_checkpointing": recomputes}
    if engine != config.deepspeed:
        overrides.append(f"deepspeed={engine}")
    if shards is not None and shards != config.model.shards:
        overrides.append(f"model.shards={shards}")
        model["shards"] = shards
    if recomputes != config.model.activation_checkpointing:
        overrides.append(f"model.activation_checkpointing={str(recomputes).lower()}")
    if rows != config.optim.micro_batch_size:
        overrides.append(f"optim.micro_batch_size={rows}")
    changed = config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "optim": config.optim.model_copy(update={"micro_batch_size": rows}),
            "deepspeed": engine,
        }
    )
    base = sum(weight.numel() for weight in described.skeleton.parameters()) * DTYPES[config.model.dtype].element_bytes
    if engine == "zero2" and base > cluster.memory:
        return None
    try:
        other = replace(described, config=changed, engine_json=read_engine_config(changed))
        return Choice(overrides, plan_run(other, cluster))
    except UserError:  # what contradicts itself is no way to run
        return None
