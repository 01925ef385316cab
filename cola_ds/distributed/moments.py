"""Pruning of the optimizer's moments at a knot, by magnitude, after ReLoRA (arXiv 2307.05695); the same at every world size."""

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
    """Set all moments to zero of the `share` of elements of each trained parameter whose squared gradients have been smallest;
    step counts and masters stay. Returns the share of all moments that is zero then; None where the optimizer has none yet.
    Collective.

    ReLoRA's code prunes each moment by its own magnitude. What is left of Adam's first then stands over a second of zero in
    places, and the next update is thousands of learning rates: elements lose both here, or none.

    One moment of one A or B at a time is whole, on every process.
    """
    kinds = sorted(set(state_kinds(engine)) - {"master"}, reverse=True)  # exp_avg_sq first, where there is exp_avg
    zeros, total = torch.zeros((), dtype=torch.int64, device=device()), 0
    for param in trained(engine).values() if kinds else ():
        gone = smallest(_whole(engine, kinds[0], param), share)
        for kind in kinds:
            whole = _whole(engine, kind, param).masked_fill_(gone, 0)
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
