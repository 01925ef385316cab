"""With processes.py, all that imports deepspeed: loading into shards, building and rebuilding the engine, gathering parameters.

Every function here that says "collective" must be called by all processes together.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cola_ds.processes import device  # first: it prepares the environment that deepspeed is imported in

# isort: split
import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.profiling.flops_profiler import FlopsProfiler
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from cola_ds.config import ModelConfig
from cola_ds.errors import UserError, first_line

Engine = Any  # deepspeed.DeepSpeedEngine; deepspeed ships no types
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# -- the model ---------------------------------------------------------------------------------------------------------


def check_engine_config(engine_config: dict[str, Any]) -> None:
    """Have DeepSpeed check the completed config. Raises UserError naming the key that it refuses. Needs a process group."""
    try:
        DeepSpeedConfig(engine_config)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"DeepSpeed refuses {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (AssertionError, ValueError, LookupError, TypeError, AttributeError, DeepSpeedConfigError) as error:
        raise UserError(f"DeepSpeed refuses the config: {first_line(error)}") from None


def load_model(config: ModelConfig, engine_config: dict[str, Any]) -> nn.Module:
    """Load a causal LM; under ZeRO-3 straight into shards, one module at a time. Collective.

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
                dtype=DTYPES[config.dtype],
                trust_remote_code=config.trust_remote_code,
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


def numel(param: Tensor) -> int:
    """Elements of the whole parameter, wherever its shards are."""
    return int(getattr(param, "ds_numel", param.numel()))


# -- the engine --------------------------------------------------------------------------------------------------------


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
        scale = float(engine.optimizer.loss_scale)
        fp16 = {**engine_config["fp16"], "initial_scale_power": max(0, round(math.log2(scale)))}
        engine_config = {**engine_config, "fp16": fp16}
    take_down_engine(engine)
    del engine
    return build_engine(model, engine_config, make_optimizer)


@torch.no_grad()
def restart_optimizer(engine: Engine) -> None:
    """Make the optimizer what a new engine would have: fp32 masters of the parameters as they are now, no moments, step 0.

    For parameters that were given new values in their shards (`own_part`). Nothing moves between processes. The fp16 loss
    scale stays, as it does in `rebuild_engine`, and here its counters do too.
    """
    engine.optimizer.refresh_fp32_params()
    for state in engine.optimizer.optimizer.state.values():
        # Moments, sums of squares and step counts: torch's optimizers start all of them at zero.
        for value in state.values():
            value.zero_()


def take_down_engine(engine: Engine) -> None:
    """Free all that the engine holds, and leave the model as it is.

    `engine.destroy()` leaves references to the engine, and with it its fp32 masters and moments, in four places.
    """
    engine.destroy()
    # 1. Two hooks on the model.
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        if hook is not None:
            hook.remove()
    # 2. On every module, the functions that fetch parameters in the backward pass. A new engine keeps those that it finds, and
    #    would prefetch by the old engine's trace of the old adapters.
    for module in engine.module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            module.__dict__.pop(name, None)
    # 3. On every trained parameter, the optimizer.
    for param in engine.param_names:
        param.__dict__.pop("_z3_optimizer", None)
    # 4. In a cache of a method, keyed by the coordinator, which knows every parameter of its trace. The decorator around the
    #    method hides the cache in its closure.
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in cached.__closure__ or ():
        getattr(cell.cell_contents, "cache_clear", lambda: None)()
    gc.collect()  # the engine is full of reference cycles; its memory must be free before the next one is built


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Set the rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


@contextmanager
def evaluating(engine: Engine) -> Iterator[None]:
    """Forward passes without dropout and gradients inside the block; the engine is as before after it. Collective."""
    was_training = engine.module.training  # the engine itself does not keep count
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train(was_training)
        # Under ZeRO-3 a forward pass prefetches for the backward pass that usually follows. What is still in flight could be
        # neither gathered nor partitioned.
        if hasattr(engine.optimizer, "empty_partition_cache"):
            engine.optimizer.empty_partition_cache()


@contextmanager
def gathered(params: Iterable[Tensor], write: bool = False) -> Iterator[None]:
    """Whole parameters inside the block. Collective, and not to be nested for one parameter.

    With `write`, changes made inside are kept: every process must make the same change. (Under ZeRO-3 those of process 0 go
    to all shards; without it the change would be lost in silence.)
    """
    with deepspeed.zero.GatheredParameters(list(params), modifier_rank=0 if write else None):
        yield


def is_sharded(param: Tensor) -> bool:
    """Whether ZeRO-3 keeps the parameter in shards, one per process."""
    return hasattr(param, "ds_id")


def own_part(param: Any) -> tuple[Tensor, int]:
    """The flat part of a parameter that this process keeps, and the position in the whole parameter at which it starts.

    Changing it changes the parameter. Under ZeRO-3 it is the shard without its padding, on the host if parameters are offloaded,
    and empty where a small parameter leaves nothing for this process; otherwise it is the whole parameter.
    """
    if not is_sharded(param):
        return param.data.view(-1), 0
    # While a parameter is whole, its shard is a copy that the next gathering ignores.
    assert param.ds_status.name == "NOT_AVAILABLE", f"{param.ds_id} is {param.ds_status.name}"
    start = param.ds_tensor.ds_numel * dist.get_rank(param.ds_process_group)
    return param.ds_tensor.data.narrow(0, 0, min(max(param.ds_numel - start, 0), param.ds_tensor.ds_numel)), start


def written_part(param: Tensor) -> Tensor:
    """What of a parameter, flat, this process has to change inside `gathered(..., write=True)`.

    Under ZeRO-3 all of it on process 0, whose changes go to all shards, and nothing elsewhere; otherwise all of it everywhere.
    """
    flat = param.data.view(-1)
    return flat[:0] if is_sharded(param) and dist.get_rank() else flat


def host_zeros(count: int) -> Tensor:
    """fp32 zeros in host memory; pinned where there is an accelerator, so that copies need not wait."""
    zeros = torch.zeros(count)
    return zeros if get_accelerator().device_name() == "cpu" else get_accelerator().pin_memory(zeros)


def collective_bytes(params: Iterable[Tensor], write: bool = False) -> int:
    """Bytes that the collectives of `gathered` carry for these parameters: an all-gather, and a broadcast if written."""
    sharded = [p for p in params if is_sharded(p) and dist.get_world_size() > 1]
    return sum(numel(p) * p.element_size() for p in sharded) * (2 if write else 1)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with whole tensors in host memory, on process 0; empty elsewhere. Collective."""
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with gathered([value] if isinstance(value, nn.Parameter) else []):
            if dist.get_rank() == 0:
                state[name] = value.detach().cpu().clone()
    return state


# -- what a checkpoint needs -------------------------------------------------------------------------------------------

_ELEMENTS_AT_ONCE = 2**26  # 256 MiB of fp32: bounds what a checkpoint takes on the device at a time


@dataclass(frozen=True)
class _MasterPart:
    """Where this process keeps its part of a trained parameter's fp32 master, and of its optimizer state."""

    flat: Tensor  # the optimizer's own flat parameter
    offset: int  # in flat
    start: int  # in the whole parameter, flattened
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """The part of a tensor shaped like `flat`. -> (count,)"""
        return flat.narrow(0, self.offset, self.count)


def _master_part(engine: Engine, param: Any) -> _MasterPart | None:
    """None where no part of the parameter is this process's."""
    optimizer = engine.optimizer
    if is_sharded(param):
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(param)]
        start = padded * dist.get_rank(param.ds_process_group)
        count = min(max(param.ds_numel - start, 0), padded)
        return _MasterPart(optimizer.fp32_partitioned_groups_flat[group], offset, start, count) if count else None
    mapping = param._hp_mapping
    if mapping is None:
        return None
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    where, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
    return _MasterPart(flat, where.start, whole.start, where.numel)


def trained(engine: Engine) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by name."""
    return {name: param for name, param in engine.module.named_parameters() if param.requires_grad}


def optimizer_scalars(engine: Engine) -> dict[str, float]:
    """The numbers that the optimizer keeps beside its moments, such as Adam's step count; none before its first step."""
    found: dict[str, float] = {}
    for state in engine.optimizer.optimizer.state.values():
        found |= {key: float(value) for key, value in state.items() if value.numel() == 1}
    return found


def trained_tensors(engine: Engine) -> Iterator[dict[str, Tensor]]:
    """The fp32 master and the moments of every trained parameter, whole, by names such as `master/NAME` and `exp_avg/NAME`.

    In pieces of bounded size: on process 0 tensors in host memory, elsewhere empty dicts. Collective, piece by piece.
    """
    state = engine.optimizer.optimizer.state
    moments = sorted({k for values in state.values() for k, value in values.items() if value.numel() > 1})
    piece: list[tuple[str, nn.Parameter, str]] = []
    count = 0
    for kind in ("master", *moments):
        for name, param in trained(engine).items():
            if piece and count + numel(param) > _ELEMENTS_AT_ONCE:
                yield _gather_piece(engine, piece, count)
                piece, count = [], 0
            piece.append((name, param, kind))
            count += numel(param)
    yield _gather_piece(engine, piece, count)


@torch.no_grad()
def _gather_piece(engine: Engine, piece: list[tuple[str, nn.Parameter, str]], count: int) -> dict[str, Tensor]:
    # Every element is some process's own and zero elsewhere: the sum of their bits as integers is the element, bit for bit.
    whole = torch.zeros(count, dtype=torch.int32, device=device())
    begin = 0
    for _, param, kind in piece:
        part = _master_part(engine, param)
        if part:
            held = part.flat if kind == "master" else engine.optimizer.optimizer.state[part.flat][kind]
            whole[begin + part.start :][: part.count].copy_(part.of(held.detach()).float().view(torch.int32))
        begin += numel(param)
    dist.all_reduce(whole)
    if dist.get_rank():
        return {}
    shapes = [getattr(param, "ds_shape", param.shape) for _, param, _ in piece]
    pieces = whole.cpu().view(torch.float32).split([numel(param) for _, param, _ in piece])
    return {
        f"{kind}/{name}": values.reshape(shape).clone()
        for (name, _, kind), shape, values in zip(piece, shapes, pieces, strict=True)
    }


@torch.no_grad()
def set_trained_tensor(engine: Engine, kind: str, param: nn.Parameter, whole: Tensor) -> None:
    """Put a whole master or moment (flat, on this process's device) where the engine keeps it."""
    part = _master_part(engine, param)
    if part is None:
        return
    if kind == "master":
        held = part.flat.data
    else:
        held = engine.optimizer.optimizer.state[part.flat].setdefault(kind, torch.zeros_like(part.flat))
    part.of(held).copy_(whole[part.start :][: part.count])


@torch.no_grad()
def set_optimizer_scalars(engine: Engine, scalars: dict[str, float]) -> None:
    """Give the optimizer the numbers that `optimizer_scalars` found."""
    # Not those in the optimizer's groups: at stage 3 these are empty between steps.
    optimizer = engine.optimizer
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    for flat in next(getattr(optimizer, name) for name in names if hasattr(optimizer, name)):
        for key, value in scalars.items():
            # torch's optimizers keep them in host memory, as their own first step would make them.
            optimizer.optimizer.state[flat].setdefault(key, torch.zeros(())).fill_(value)


def loss_scale_state(engine: Engine) -> dict[str, float]:
    """The fp16 loss scale and its counters; nothing in other dtypes."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return {}
    return {name: float(getattr(scaler, name)) for name in _SCALER if hasattr(scaler, name)}


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def set_loss_scale_state(engine: Engine, state: dict[str, float]) -> None:
    """Give the loss scaler what `loss_scale_state` found."""
    for name, value in state.items():
        setattr(engine.optimizer.loss_scaler, name, value if name == "cur_scale" else int(value))


def random_state() -> Tensor:  # -> (n,) uint8
    """The states of torch's random generators of this process: the host's, and the accelerator's where it has its own."""
    states = [torch.get_rng_state()]
    if get_accelerator().device_name() != "cpu":
        states.append(get_accelerator().get_rng_state().cpu())
    return torch.cat(states)


def set_random_state(state: Tensor) -> None:
    """Restore what `random_state` returned; on another kind of device, the host's alone."""
    host = torch.get_rng_state().numel()
    torch.set_rng_state(state[:host].clone())
    if state.numel() > host and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(state[host:].clone())


class Monitor:
    """The monitors that the DeepSpeed JSON asks for (TensorBoard, W&B, ...), fed with the chain's own step counts."""

    def __init__(self, engine_json: dict[str, Any]):
        """Raises UserError when a monitor's package is not installed."""
        self._master: Any = None
        try:
            self._master = MonitorMaster(get_monitor_config(engine_json))
        except ImportError as error:
            raise UserError(f"the DeepSpeed JSON asks for a monitor whose package is missing: {error}") from None
        except (ValidationError, AssertionError) as error:  # of the JSON itself
            raise UserError(f"the DeepSpeed JSON asks for a monitor that cannot be: {first_line(error)}") from None
        except Exception as error:  # no room in its folder, no network, no account
            self._turn_off(error)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write named numbers at a step; process 0 alone does so. A monitor that fails is turned off, with one line that says so:
        its disk or its network must not cost the run."""
        if self._master is None or not self._master.enabled:
            return
        try:
            self._master.write_events([(name, value, step) for name, value in values.items()])
        except Exception as error:  # whatever their packages raise
            self._turn_off(error)

    def _turn_off(self, error: Exception) -> None:
        self._master = None
        if not dist.is_initialized() or dist.get_rank() == 0:
            why = f"cola-ds: warning: the monitors are off from here on: {first_line(error)}"
            print(why, file=sys.stderr, flush=True)


def forward_flops(model: Any, input_ids: Tensor, positions: Tensor) -> int:
    """What DeepSpeed's profiler counts for one forward pass of a causal LM on the meta device, with ids (B, T) and logits at
    `positions` (K,) only, where the architecture offers that."""
    # With a mask of this shape, transformers asks for no values, and the meta device has none.
    mask = torch.empty(input_ids.shape[0], 1, input_ids.shape[1], input_ids.shape[1], device="meta", dtype=model.dtype)
    inputs: dict[str, Any] = {"input_ids": input_ids.to("meta"), "attention_mask": mask, "use_cache": False}
    known = inspect.signature(model.forward).parameters
    if "position_ids" in known:  # OPT would find them in a mask of another shape
        inputs["position_ids"] = torch.empty_like(input_ids, device="meta")
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = positions.to("meta")
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    try:
        with torch.no_grad():
            model(**inputs)
        return int(profiler.get_total_flops())
    finally:
        profiler.end_profile()
