"""Shards of parameters under ZeRO-3: this process's own, and whole parameters gathered from all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from cola_ds.distributed import deepspeed_internals


@dataclass(frozen=True)
class Part:
    """What one process keeps of a tensor of a parameter's shape: of its weight, its fp32 master or a moment."""

    key: str
    """Such as `master/NAME`."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Of the first element in the whole parameter, flattened."""
    values: Tensor
    """(n,), where this process keeps them: what is written into it is kept."""


def numel(param: Tensor) -> int:
    """Elements of the whole parameter, wherever its shards are."""
    return int(getattr(param, "ds_numel", param.numel()))


def shape_of(param: Tensor) -> tuple[int, ...]:
    """Of the whole parameter, wherever its shards are."""
    return tuple(getattr(param, "ds_shape", param.shape))


@contextmanager
def gathered(params: Iterable[Tensor], write: bool = False) -> Iterator[None]:
    """Whole parameters inside the block. Collective, and not to be nested for one parameter.

    With `write`, changes made inside are kept: every process must make the same change. (Under ZeRO-3 those of process 0 go
    to all shards; without it the change would be lost in silence.)
    """
    with deepspeed.zero.GatheredParameters(list(params), modifier_rank=0 if write else None):
        yield


def is_sharded(param: Tensor) -> bool:
    """Whether ZeRO-3 keeps the parameter in shards, one per process (of a node, or of all)."""
    return hasattr(param, "ds_id")


def process_group(param: Any) -> Any:
    """The processes among which a sharded parameter's shards lie."""
    return deepspeed_internals.group_of(param)


def copies(param: Tensor) -> int:
    """On how many processes each element of a parameter is kept: on one under ZeRO-3, or on one of each node; else on all."""
    return dist.get_world_size() // (dist.get_world_size(group=process_group(param)) if is_sharded(param) else 1)


def local_shard(param: Any) -> tuple[Tensor, int]:
    """The flat part of a parameter that this process keeps, and the position in the whole parameter at which it starts.

    Changing it changes the parameter. Under ZeRO-3 it is the shard without its padding, on the host if parameters are offloaded,
    and empty where a small parameter leaves nothing for this process; otherwise it is the whole parameter.
    """
    if not is_sharded(param):
        return param.data.view(-1), 0
    return deepspeed_internals.shard(param)


def writable_part(param: Tensor) -> Tensor:
    """What of a parameter, flat, this process has to change inside `gathered(..., write=True)`.

    Under ZeRO-3 all of it on process 0 (of each node, with shards of its own), whose changes go to all shards, and nothing
    elsewhere; otherwise all of it everywhere.
    """
    flat = param.data.view(-1)
    return flat[:0] if is_sharded(param) and dist.get_rank(group=process_group(param)) else flat


def host_room(count: int, dtype: torch.dtype) -> Tensor:
    """Host memory, still to be written; pinned where there is an accelerator, so that copies need not wait."""
    return torch.empty(count, dtype=dtype, pin_memory=get_accelerator().device_name() != "cpu")


def collective_bytes(params: Iterable[Tensor], write: bool = False) -> int:
    """Bytes that the collectives of `gathered` carry for these parameters: an all-gather, and a broadcast if written."""
    sharded = [p for p in params if is_sharded(p) and dist.get_world_size(group=process_group(p)) > 1]
    return sum(numel(p) * p.element_size() for p in sharded) * (2 if write else 1)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with whole tensors in host memory, on process 0; empty elsewhere. Collective."""
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with gathered([value] if isinstance(value, nn.Parameter) else []):
            if dist.get_rank() == 0:
                state[name] = value.detach().cpu().clone()
    return state
