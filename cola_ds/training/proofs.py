"""Proofs, on the model itself and before the first step: what may be computed in a faster way. Collective."""

from __future__ import annotations

import torch

from cola_ds.distributed import accelerator
from cola_ds.errors import UserError, first_line
from cola_ds.evaluation import fused_loss
from cola_ds.evaluation.separation import check_separation
from cola_ds.training.prepared import Prepared
from cola_ds.training.state import Chain


def prove(chain: Chain, prepared: Prepared) -> None:
    """Find out whether the loss can be fused, and whether the examples of one row see nothing of each other.

    Where they do, or the device lacks the kernel, varlen that nobody asked for is given up for SDPA. Raises UserError for rows
    that were asked for, by data.packing or model.attention. No gradients, and the engine is as before after it.
    """
    if not fused_loss.allow(chain.engine):
        chain.logger.say("the model's logits are more than its head gives: the loss takes them whole")
    batchers = [each for each in (chain.train, chain.held_out, chain.watched) if each is not None and each.joined]
    asked_for = prepared.order.capacity is not None and prepared.config.trains
    if not batchers and not asked_for:
        return
    try:
        check_separation(chain.engine, prepared.train.largest_id)
    except (torch.OutOfMemoryError, accelerator.NETWORK_ERROR):  # of memory another attention needs more
        raise
    except (UserError, RuntimeError) as error:  # or a kernel that this device does not have, an AcceleratorError
        if prepared.config.model.attention != "auto" or prepared.config.model.compile or not batchers:
            raise
        chain.logger.say(f"varlen is given up, attention is SDPA: {first_line(error)}")
        chain.logger.event("varlen given up", reason=first_line(error))
        chain.engine.module.set_attn_implementation("sdpa")
        for each in batchers:
            each.joined = False
        if asked_for:
            check_separation(chain.engine, prepared.train.largest_id)
