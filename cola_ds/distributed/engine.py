"""The DeepSpeed engine: building, rebuilding, evaluating.

Every function here that says "collective" must be called by all processes together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError
from torch import nn

from cola_ds.distributed.collectives import NO_LIMIT
from cola_ds.distributed.compilation import uncompiled
from cola_ds.distributed.deepspeed_internals import (
    forget_modules,
    gather_in_order,
    look_at_gradients_together,
    loss_scale,
    steps_traced_alone,
    take_down_engine,
    without_limit,
)
from cola_ds.distributed.nodes import trained_by_all
from cola_ds.distributed.shards import is_sharded
from cola_ds.errors import UserError, cut, first_line, quoted

Engine = Any  # deepspeed.DeepSpeedEngine; deepspeed ships no types


def check_engine_config(engine_config: dict[str, Any], path: str) -> None:
    """Have DeepSpeed check the completed config of the JSON at `path`. Raises UserError naming the key that it refuses. Needs a
    process group."""
    try:
        DeepSpeedConfig(engine_config)
    except ValidationError as error:
        first = error.errors()[0]
        key, value = ".".join(map(str, first["loc"])), cut(quoted(first["input"]), 80)
        raise UserError(f"{cut(path)}: DeepSpeed refuses {key} {value}: {first['msg']}") from None
    except (AssertionError, ValueError, LookupError, TypeError, AttributeError, DeepSpeedConfigError) as error:
        raise UserError(f"{cut(path)}: DeepSpeed refuses the config: {first_line(error)}") from None


def build_engine(
    model: nn.Module,
    engine_config: dict[str, Any],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> Engine:
    """Wrap the model in an engine whose optimizer holds what is trainable, with no state yet. Collective.

    A model with nothing to train gets an engine that only evaluates.
    """
    trained_by_all(model)
    trainable = [param for param in model.parameters() if param.requires_grad]
    for param in trainable:  # its shards lie on all processes, wherever the base's do
        if not is_sharded(param):
            param.ds_zero_partition_process_group = dist.get_world_group()  # type: ignore[attr-defined]
    optimizer = make_optimizer(trainable) if trainable else None
    if optimizer is None and engine_config["zero_optimization"]["stage"] < 3:
        # Stages 1 and 2 shard gradients and optimizer states; without an optimizer DeepSpeed refuses them.
        engine_config = {**engine_config, "zero_optimization": {"stage": 0}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config, dist_init_required=False)
    look_at_gradients_together(engine)
    gather_in_order(engine)
    without_limit(NO_LIMIT)
    return engine


def rebuild_engine(
    engine: Engine,
    engine_config: dict[str, Any],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> Engine:
    """A new engine around the same model: fresh fp32 masters, moments and step counts for what is trainable now. Collective.

    The fp16 loss scale carries over: it is a fact about the loss, not about the link.
    """
    model = engine.module
    if "fp16" in engine_config:
        fp16 = {**engine_config["fp16"], "initial_scale_power": max(0, round(math.log2(loss_scale(engine))))}
        engine_config = {**engine_config, "fp16": fp16}
    take_down_engine(engine)
    del engine
    return build_engine(model, engine_config, make_optimizer)


@torch.no_grad()
def restart_optimizer(engine: Engine, keep_state: bool = False) -> None:
    """Make the optimizer what a new engine would have: fp32 masters of the parameters as they are now, no moments, step 0. With
    `keep_state` the masters alone are new.

    For parameters that were given new values in their shards (`local_shard`). Nothing moves between processes. The fp16 loss
    scale stays, as it does in `rebuild_engine`, and here its counters do too.
    """
    engine.optimizer.refresh_fp32_params()
    for state in () if keep_state else engine.optimizer.optimizer.state.values():
        # Moments, sums of squares and step counts: torch's optimizers start all of them at zero.
        for value in state.values():
            value.zero_()


def free_engine(engine: Engine) -> None:
    """Free the engine and all it holds, and the model with it once nobody else has it: for a process that goes on."""
    take_down_engine(engine)
    forget_modules()


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Set the rate of the next step; of a group with a `lr_ratio` its multiple of that."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


@contextmanager
def evaluating(engine: Engine, gradients: bool = False) -> Iterator[None]:
    """Forward passes without dropout, gradients or compiled code inside the block; the engine is as before after it.

    With `gradients`, backward passes too, by torch.autograd.grad, towards what is no Parameter. Collective.
    """
    was_training = engine.module.training  # the engine itself does not keep count
    engine.eval()
    try:
        with torch.set_grad_enabled(gradients), uncompiled(), steps_traced_alone(engine):
            yield
    finally:
        engine.train(was_training)
        # Under ZeRO-3 a forward pass prefetches for the backward pass that usually follows. What is still in flight could be
        # neither gathered nor partitioned.
        if hasattr(engine.optimizer, "empty_partition_cache"):
            engine.optimizer.empty_partition_cache()
