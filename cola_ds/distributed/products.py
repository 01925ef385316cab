"""Products with a weight in shards: each process multiplies its own flat part of it, and the results are summed. No weight
moves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed import comm as dist
from torch import Tensor

from cola_ds.distributed.accelerator import device
from cola_ds.distributed.shards import is_sharded, local_shard, process_group, shape_of

_ELEMENTS_AT_ONCE = 2**22  # of the weight, in fp32 on the device


@torch.no_grad()
def times(weight: Tensor, right: Tensor) -> Tensor:  # (out, in), (in, k) -> (out, k), fp32
    """weight @ right. Collective over the processes that share the weight's shards; the weight must be in them."""
    found = torch.zeros(shape_of(weight)[0], right.shape[1], device=right.device)
    for rows, columns, piece in _pieces(weight):
        found[rows] += piece @ right[columns]
    return _over_shards(weight, found)


@torch.no_grad()
def transposed_times(weight: Tensor, left: Tensor) -> Tensor:  # (out, in), (out, k) -> (in, k), fp32
    """weight^T @ left, as `times`."""
    found = torch.zeros(shape_of(weight)[1], left.shape[1], device=left.device)
    for rows, columns, piece in _pieces(weight):
        found[columns] += piece.T @ left[rows]
    return _over_shards(weight, found)


def _pieces(weight: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """What this process keeps of a weight as blocks (rows, columns) of it, in fp32 on the device: parts of a row where its shard
    begins or ends within one, some whole rows at a time between."""
    flat, start = local_shard(weight)
    width = shape_of(weight)[1]
    at_once = max(1, _ELEMENTS_AT_ONCE // width)
    done = 0
    while done < flat.numel():
        row, column = divmod(start + done, width)
        left = flat.numel() - done
        height = 1 if column or left < width else min(left // width, at_once)
        count = min(width - column, left) if height == 1 else height * width
        piece = flat[done : done + count].to(device(), torch.float32)
        yield slice(row, row + height), slice(column, column + count // height), piece.view(height, -1)
        done += count


def _over_shards(weight: Tensor, found: Tensor) -> Tensor:
    if is_sharded(weight) and dist.get_world_size(group=process_group(weight)) > 1:
        dist.all_reduce(found, group=process_group(weight))
    return found
