"""The DeepSpeed engine: loading into shards, building, rebuilding, evaluating.

Every function here that says "collective" must be called by all processes together.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

from cola_ds.config.dtypes import DTYPES
from cola_ds.config.schema import ModelConfig
from cola_ds.distributed.accelerator import device
from cola_ds.distributed.compilation import uncompiled
from cola_ds.distributed.deepspeed_internals import (
    forget_modules,
    look_at_gradients_together,
    loss_scale,
    steps_traced_alone,
    take_down_engine,
)
from cola_ds.errors import UserError, first_line

Engine = Any  # deepspeed.DeepSpeedEngine; deepspeed ships no types


def check_engine_config(engine_config: dict[str, Any]) -> None:
    """Have DeepSpeed check the completed config. Raises UserError naming the key that it refuses. Needs a process group."""
    try:
        DeepSpeedConfig(engine_config)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"DeepSpeed refuses {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (AssertionError, ValueError, LookupError, TypeError, AttributeError, DeepSpeedConfigError) as error:
        raise UserError(f"DeepSpeed refuses the config: {first_line(error)}") from None


def load_model(config: ModelConfig, engine_config: dict[str, Any], attention: str | None = None) -> nn.Module:
    """Load a causal LM; under ZeRO-3 straight into shards, one module at a time. Collective.

    `attention` is Transformers' name of the attention that it gets; None: Transformers chooses.

    Under ZeRO-3, process 0 maps the checkpoint (it is never copied as a whole) and each module goes out to the shards of all
    processes before the next one is read. At stage 2 every process holds the model, as that stage does.

    Raises UserError for weights that are damaged, incomplete or not safetensors.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # transformers shards while this object is alive, and only then: keep it until the model is loaded.
    sharded = engine_config["zero_optimization"]["stage"] == 3
    sharding = HfDeepSpeedConfig(engine_config) if sharded else None
    try:
        with _freed_memory_goes_back(), _one_voice():
            model, loading = AutoModelForCausalLM.from_pretrained(
                config.path,
                revision=config.revision,
                dtype=getattr(torch, DTYPES[config.dtype].torch_name),
                trust_remote_code=config.trust_remote_code,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights of model.path {config.path} cannot be loaded: {first_line(error)}") from None
    del sharding
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(f"model.path {config.path} lacks {len(missing)} weights, such as {missing[0]}: a damaged model")
    if loading["unexpected_keys"] and dist.get_rank() == 0:
        unused = sorted(loading["unexpected_keys"])
        print(
            f"cola-ds: warning: model.path {config.path} has {len(unused)} weights that this architecture does not use, such as "
            f"{unused[0]}; see whether its config.json is of the same model", file=sys.stderr, flush=True,
        )  # fmt: skip
    if sharded:  # the shards are where they belong; what is neither parameter nor shard would stay on the host
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device())
    else:  # the engine would move it too, but a restored run ties its links before there is one
        model.to(device())
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextmanager
def _one_voice() -> Iterator[None]:
    """Without the table that transformers prints of weights that are missing or not used: what matters of it takes a line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _freed_memory_goes_back() -> Iterator[None]:
    """Have glibc return large blocks to the kernel as they are freed, and behave as usual afterwards.

    It would keep them for later use. Loading frees a gathered module after another, and would leave each process with more
    resident memory than the whole model takes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 1)  # another C library: nothing to set
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    mallopt(mmap_threshold, 128 * 1024)
    try:
        yield
    finally:
        # What glibc's own adjustment arrives at once a program has freed large blocks.
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 64 * 2**20)


def build_engine(
    model: nn.Module,
    engine_config: dict[str, Any],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> Engine:
    """Wrap the model in an engine whose optimizer holds what is trainable, with no state yet. Collective.

    A model with nothing to train gets an engine that only evaluates.
    """
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = make_optimizer(trainable) if trainable else None
    if optimizer is None and engine_config["zero_optimization"]["stage"] < 3:
        # Stages 1 and 2 shard gradients and optimizer states; without an optimizer DeepSpeed refuses them.
        engine_config = {**engine_config, "zero_optimization": {"stage": 0}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config, dist_init_required=False)
    look_at_gradients_together(engine)
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
def restart_optimizer(engine: Engine) -> None:
    """Make the optimizer what a new engine would have: fp32 masters of the parameters as they are now, no moments, step 0.

    For parameters that were given new values in their shards (`local_shard`). Nothing moves between processes. The fp16 loss
    scale stays, as it does in `rebuild_engine`, and here its counters do too.
    """
    engine.optimizer.refresh_fp32_params()
    for state in engine.optimizer.optimizer.state.values():
        # Moments, sums of squares and step counts: torch's optimizers start all of them at zero.
        for value in state.values():
            value.zero_()


def free_engine(engine: Engine) -> None:
    """Free the engine and all it holds, and the model with it once nobody else has it: for a process that goes on."""
    take_down_engine(engine)
    forget_modules()


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Set the rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


@contextmanager
def evaluating(engine: Engine) -> Iterator[None]:
    """Forward passes without dropout, gradients or compiled code inside the block; the engine is as before after it.

    Collective.
    """
    was_training = engine.module.training  # the engine itself does not keep count
    engine.eval()
    try:
        with torch.no_grad(), uncompiled(), steps_traced_alone(engine):
            yield
    finally:
        engine.train(was_training)
        # Under ZeRO-3 a forward pass prefetches for the backward pass that usually follows. What is still in flight could be
        # neither gathered nor partitioned.
        if hasattr(engine.optimizer, "empty_partition_cache"):
            engine.optimizer.empty_partition_cache()
