"""Pruning of the optimizer's moments at a knot, by magnitude, as in ReLoRA (arXiv 2307.05695); the same at every world size."""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from cola_ds.distributed.accelerator import device
from cola_ds.distributed.deepspeed_internals import master_part
from cola_ds.distributed.engine import Engine
from cola_ds.distributed.engine_state import kept, state_kinds, trained
from cola_ds.distributed.shards import numel


def smallest(moment: Tensor, share: float) -> Tensor:  # (n,) -> (n,) bool
    """Which elements of a moment are among the `share` of smallest magnitude, and those as small as the largest of them."""
    count = round(share * moment.numel())
    if not count:
        return torch.zeros_like(moment, dtype=torch.bool)
    # Not kthvalue: on CUDA run.deterministic refuses it.
    return moment.abs() <= moment.abs().sort().values[count - 1]


@torch.no_grad()
def prune_moments(engine: Engine, share: float) -> float | None:
    """Set the `share` of smallest magnitude of each moment of each trained parameter to zero; step counts and masters stay.
    Returns the share of all their elements that is zero then; None where the optimizer has no moments yet. Collective.

    One moment of one A or B at a time is whole, on every process.
    """
    zeros, total = torch.zeros((), dtype=torch.int64, device=device()), 0
    for kind in state_kinds(engine):
        for param in trained(engine).values() if kind != "master" else ():
            whole = _whole(engine, kind, param)
            whole.masked_fill_(smallest(whole, share), 0)
            if part := master_part(engine.optimizer, param):
                part.of(kept(engine, kind, part).detach()).copy_(whole[part.start :][: part.count])
            zeros += (whole == 0).sum()
            total += whole.numel()
    return int(zeros) / total if total else None


def _whole(engine: Engine, kind: str, param: nn.Parameter) -> Tensor:  # -> (n,) fp32, on the device
    """A moment of a parameter, gathered. Collective."""
    # Every element is some process's own and zero elsewhere: the sum of their bits as integers is the element, bit for bit.
    bits = torch.zeros(numel(param), dtype=torch.int32, device=device())
    if part := master_part(engine.optimizer, param):
        held = part.of(kept(engine, kind, part).detach())
        bits[part.start :][: part.count].copy_(held.float().view(torch.int32))
    dist.all_reduce(bits)
    return bits.view(torch.float32)
