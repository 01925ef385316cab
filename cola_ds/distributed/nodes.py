"""Nodes: which processes share one, and shards of frozen weights that each node keeps for itself (model.shards: node).

Under ZeRO-3 a frozen weight's shards lie on the processes of one node, and every node has the whole weight: gathering it, in a
step or at a knot, sends nothing from node to node. What is trained has its shards on all processes, so that gradients are
averaged over all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import nn

from cola_ds.distributed import accelerator, collectives
from cola_ds.distributed.deepspeed_internals import without_limit
from cola_ds.distributed.shards import gathered, is_sharded, local_shard, process_group
from cola_ds.errors import TrainingFailedError


@dataclass(frozen=True)
class Nodes:
    """This process's place among the nodes."""

    node: Any
    """The process group of this node."""
    column: Any
    """That of the processes with this one's place, one on each node."""
    count: int
    first: int
    """The lowest rank of the column, which is on the first node."""


def make_groups(nodes: list[list[int]]) -> Nodes:
    """Process groups of the nodes, and across them. Collective: every process makes every group, in the same order."""
    rank = dist.get_rank()
    columns = [list(ranks) for ranks in zip(*nodes, strict=True)]
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in [*nodes, *columns]}
    without_limit(collectives.NO_LIMIT)
    node = next(ranks for ranks in nodes if rank in ranks)
    column = next(ranks for ranks in columns if rank in ranks)
    return Nodes(groups[tuple(node)], groups[tuple(column)], len(nodes), column[0])


def spread(params: list[nn.Parameter], nodes: Nodes) -> None:
    """Give every node the shards of the first one. Collective."""
    for param in params:
        shard = local_shard(param)[0]
        sent = shard.to(accelerator.device())  # offload_param has it on the host, where NCCL does not reach
        dist.broadcast(sent, src=nodes.first, group=nodes.column)
        shard.copy_(sent)


def trained_by_all(model: nn.Module) -> None:
    """Take what is trained, biases, out of the shards of single nodes: whole Parameters, which the engine will put in the shards
    of all processes. Else gradients would be averaged over each node alone. Collective; before the engine is built."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param.requires_grad and is_sharded(param) and not is_everyones(param):
                with gathered([param]):
                    whole = param.detach().clone()
                setattr(module, name, nn.Parameter(whole))


def is_everyones(param: nn.Parameter) -> bool:
    """Whether a sharded parameter's shards lie on all processes."""
    return bool(dist.get_world_size(group=process_group(param)) == dist.get_world_size())


@torch.no_grad()
def check_alike(model: nn.Module, frozen: Iterable[torch.Tensor], step: int) -> None:
    """Raise TrainingFailedError where what is trained, or `frozen` beside it (whole on every process, and no part of the base),
    is not the same on all of them, bit for bit. Collective.

    What is trained cannot differ while its gradients are averaged over all processes: this is the proof that they are.
    """
    trained = [param for param in model.parameters() if param.requires_grad]
    mine = torch.zeros(2, dtype=torch.int64, device=trained[0].device)
    with gathered(trained):
        for param in (*trained, *frozen):
            bits = _bits(param.detach())
            places = torch.arange(1, len(bits) + 1, device=bits.device)
            mine += torch.stack([bits.sum(), (bits * places).sum()])  # modulo 2^64; the second sees what moves
    sums = collectives.all_gather_ints(mine)
    if any(found != sums[0] for found in sums):
        first = next(rank for rank, found in enumerate(sums) if found != sums[0])
        raise TrainingFailedError(
            f"A and B on process {first} are not those of process 0 after step {step}: the nodes have drifted apart; nothing of "
            "it was saved. Use model.shards=world, and report it"
        )


def _bits(param: torch.Tensor) -> torch.Tensor:  # -> (n,) int64
    whole = {2: torch.int16, 4: torch.int32}[param.element_size()]
    return param.contiguous().view(-1).view(whole).long()
