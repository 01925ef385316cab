"""DeepSpeed's private parts: everything here that its releases may change without a word, as read in DeepSpeed 0.19.8.

Where a piece is gone, what asks for it raises UserError in one line that names the version that is installed and the one that
was read. Neither torch nor deepspeed is imported with this module.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cola_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

READ_IN = "0.19.8"
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _gone(what: str) -> UserError:
    installed = version("deepspeed")
    return UserError(f"DeepSpeed {installed} has no {what} as {READ_IN} has; pip install deepspeed=={READ_IN}")


def _part(owner: Any, name: str) -> Any:
    """An attribute that DeepSpeed promises nobody. Raises UserError where it is gone."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise _gone(f"{type(owner).__name__}.{name}") from None


# -- taking an engine down ---------------------------------------------------------------------------------------------


def take_down_engine(engine: Any) -> None:
    """Free all that the engine holds, and leave the model as it is.

    `engine.destroy()` leaves references to the engine, and with it its fp32 masters and moments, in four places.
    """
    stage_3 = hasattr(engine.optimizer, "grad_position")
    has_stepped = stage_3 and engine.global_steps > 0
    engine.destroy()
    remove_root_hooks(engine)
    forget_backward_functions(engine.module, expected=has_stepped)
    forget_optimizer(engine.param_names, expected=stage_3)
    clear_release_cache()
    gc.collect()  # the engine is full of reference cycles; its memory must be free before the next one is built


def forget_modules() -> None:
    """The stack of modules in their forward pass, on which the root of the last model stays (0.19.8, stage 3)."""
    from deepspeed.runtime.zero import parameter_offload

    _part(parameter_offload, "FWD_MODULE_STACK").clear()


def remove_root_hooks(engine: Any) -> None:
    """Two hooks on the model, which keep the engine alive (0.19.8)."""
    for hook in (_part(engine, "module_forward_pre_hook"), _part(engine, "module_forward_post_hook")):
        if hook is not None:
            hook.remove()


def forget_backward_functions(model: nn.Module, expected: bool) -> None:
    """On every module, the functions that fetch parameters in the backward pass (0.19.8, from the first forward pass on).

    A new engine keeps those that it finds, and would prefetch by the old engine's trace of the old adapters.
    """
    for name in ("pre_bwd_fn", "post_bwd_fn"):
        found = [module.__dict__.pop(name) for module in model.modules() if name in module.__dict__]
        if expected and not found:
            raise _gone(f"{name} on a module")


def forget_optimizer(params: Any, expected: bool) -> None:
    """On every trained parameter, ZeRO-3's optimizer (0.19.8)."""
    found = [param.__dict__.pop("_z3_optimizer") for param in params if "_z3_optimizer" in param.__dict__]
    if expected and not found:
        raise _gone("_z3_optimizer on a parameter")


def clear_release_cache() -> None:
    """The cache of a method, keyed by the coordinator, which knows every parameter of its trace (0.19.8).

    The method's name is mangled, and the decorator around it hides the cache in its closure.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    name = "_PartitionedParameterCoordinator__params_to_release"
    cells = getattr(getattr(Coordinator, name, None), "__closure__", None) or ()
    caches = [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "cache_clear")]
    if not caches:
        raise _gone(f"cache around {name.removeprefix('_PartitionedParameterCoordinator')}")
    for cache in caches:
        cache.cache_clear()


# -- what is gathered when ---------------------------------------------------------------------------------------------


@contextmanager
def steps_traced_alone(engine: Any) -> Iterator[None]:
    """Forward passes inside the block leave no trace that training would go by (0.19.8, stage 3).

    Of a step DeepSpeed records which module follows which, and keeps a weight whole from the forward pass to the backward pass. A
    trace of forward passes alone has no second use of any weight. And what it finds there it remembers by module and place, also
    when another trace has come: from then on every step would gather every weight twice.
    """
    if not hasattr(engine.optimizer, "grad_position"):  # below stage 3, or nothing is trained
        yield
        return
    coordinator = _part(_part(engine.optimizer, "parameter_offload"), "get_param_coordinator")()
    before = _modules_in_order(coordinator) if _part(coordinator, "is_complete_trace")() else None
    try:
        yield
    finally:
        if before is None or _modules_in_order(coordinator) is not before:
            if not _part(coordinator, "is_invalid_trace")():
                _part(coordinator, "_invalidate_trace")()
            clear_release_cache()


def _modules_in_order(coordinator: Any) -> Any:
    return _part(coordinator, "_PartitionedParameterCoordinator__submodule_order")


def gather_in_order(engine: Any) -> None:
    """Have stage 3 begin the gathers of a module in the same order on every process (0.19.8).

    It takes the parameters from a set, whose order is that of their addresses. With node shards they belong to two groups, each
    of which is gathered by itself: where two NCCL groups begin in another order on another process, either may wait for the
    other.
    """
    if not hasattr(engine.optimizer, "grad_position"):  # below stage 3, or nothing is trained
        return
    coordinator = _part(_part(engine.optimizer, "parameter_offload"), "get_param_coordinator")()
    name = "_PartitionedParameterCoordinator__all_gather_params"
    gather = _part(coordinator, name)

    def in_order(params: Any, forward: bool) -> None:
        gather(sorted(params, key=lambda param: _part(param, "ds_id")), forward)

    setattr(coordinator, name, in_order)


# -- where parameters and fp32 masters are -----------------------------------------------------------------------------


@dataclass(frozen=True)
class MasterPart:
    """Where this process keeps its part of a trained parameter's fp32 master, and of its optimizer state."""

    flat: Tensor  # the optimizer's own flat parameter
    offset: int  # in flat
    start: int  # in the whole parameter, flattened
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """The part of a tensor shaped like `flat`. -> (count,)"""
        return flat.narrow(0, self.offset, self.count)


def master_part(optimizer: Any, param: Any) -> MasterPart | None:
    """This process's part of a parameter's fp32 master; None where it has none (0.19.8).

    At stage 3 by `grad_position`, whose offsets are in the flat fp32 groups; below it by the parameter's `_hp_mapping`.
    """
    from deepspeed import comm as dist

    if hasattr(param, "ds_id"):
        group, offset, padded = _part(optimizer, "grad_position")[_part(optimizer, "get_param_id")(param)]
        start = padded * dist.get_rank(group_of(param))
        count = min(max(_part(param, "ds_numel") - start, 0), padded)
        flat = _part(optimizer, "fp32_partitioned_groups_flat")[group]
        return MasterPart(flat, offset, start, count) if count else None
    mapping = _part(param, "_hp_mapping")
    if mapping is None:
        return None
    flat = _part(optimizer, "single_partition_of_fp32_groups")[_part(mapping, "param_group_index")]
    where, whole = _part(mapping, "hp_fragment_address"), _part(mapping, "lp_fragment_address")
    return MasterPart(flat, where.start, whole.start, where.numel)


def flat_masters(optimizer: Any) -> list[Tensor]:
    """The flat fp32 groups, of stage 3 or of the stages below it (0.19.8)."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise _gone("flat fp32 groups in its optimizers")


def group_of(param: Any) -> Any:
    """The process group among which a ZeRO-3 parameter's shards lie (0.19.8)."""
    return _part(param, "ds_process_group")


def shard(param: Any) -> tuple[Tensor, int]:
    """The flat part of a ZeRO-3 parameter that this process keeps, without its padding, and its place in the whole parameter
    (0.19.8)."""
    from deepspeed import comm as dist

    # While a parameter is whole, its shard is a copy that the next gathering ignores.
    status = _part(param, "ds_status").name
    assert status == "NOT_AVAILABLE", f"{param.ds_id} is {status}"
    held = _part(param, "ds_tensor")
    size = _part(held, "ds_numel")
    start = size * dist.get_rank(group_of(param))
    return held.data.narrow(0, 0, min(max(_part(param, "ds_numel") - start, 0), size)), start


@contextmanager
def shards_in(group: Any) -> Iterator[None]:
    """Shards of parameters that are made inside the block lie on the processes of a group; None: on all. Their first values are
    those of each process, and go nowhere: the weights are still to come (0.19.8).

    Transformers names no group where it calls deepspeed.zero.Init (5.24).
    """
    import deepspeed

    plain = deepspeed.zero.Init
    _part(plain, "_zero_init_param")

    class Init(plain):  # type: ignore[misc, valid-type]
        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    deepspeed.zero.Init = Init if group is None else functools.partial(Init, data_parallel_group=group)
    try:
        yield
    finally:
        deepspeed.zero.Init = plain


# -- gradients that are not finite ------------------------------------------------------------------------------------


def look_at_gradients_together(engine: Any) -> None:
    """Have stage 2 look for gradients that are not finite in a few passes over all of them (0.19.8).

    It takes two reductions and five more kernels for each trained parameter: of LoRA on all layers, thousands of a few
    microseconds.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "has_overflow_partitioned_grads_serial"):  # nothing is trained
        return
    if hasattr(optimizer, "grad_position"):  # stage 3 looks at its flat buffer
        return
    groups = _part(optimizer, "averaged_gradients")

    def any_not_finite() -> Tensor:  # -> (1,) bool, on the device
        import torch

        grads = [grad for group in groups.values() for grad in group or () if grad is not None and grad.numel()]
        if not grads:
            return torch.zeros(1, dtype=torch.bool, device=optimizer.device)
        norms = torch.stack(torch._foreach_norm(grads, ord=float("inf")))
        return ~torch.isfinite(norms).all().reshape(1)

    optimizer.has_overflow_partitioned_grads_serial = any_not_finite


# -- the fp16 loss scale -----------------------------------------------------------------------------------------------


def loss_scale(engine: Any) -> float:
    """What the next step's loss is multiplied by, fixed or not; 1 in other dtypes than fp16 (0.19.8)."""
    return float(_part(engine.optimizer, "loss_scale"))


def loss_scale_state(engine: Any) -> dict[str, float]:
    """The fp16 loss scale and its counters; nothing in other dtypes, or where the scale is fixed (0.19.8)."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return {}
    return {name: float(_part(scaler, name)) for name in _SCALER}


def set_loss_scale_state(engine: Any, state: dict[str, float]) -> None:
    """Give the loss scaler what `loss_scale_state` found."""
    for name, value in state.items():
        scaler = _part(engine.optimizer, "loss_scaler")
        _part(scaler, name)
        setattr(scaler, name, value if name == "cur_scale" else int(value))


# -- process groups ----------------------------------------------------------------------------------------------------


def without_limit(limit: timedelta) -> None:
    """Give every process group there is that limit of time. Those that DeepSpeed makes for itself have torch's, ten minutes with
    NCCL (0.19.8; torch 2.10), after which whoever waits is ended, whatever it waits for."""
    from torch.distributed import distributed_c10d as c10d

    for group in list(_part(_part(c10d, "_world"), "pg_map")):
        if _part(group, "_device_types"):
            _part(c10d, "_set_pg_timeout")(limit, group)


# -- processes ---------------------------------------------------------------------------------------------------------


def remove_shared_memory_name() -> None:
    """Remove the name in /dev/shm of the buffer of 66 MiB that each process on the CPU shares with those on its machine (0.19.8).

    DeepSpeed never removes it. Once all processes have opened it the name can go: the memory itself then goes with the processes,
    however they end. Where there is none, there is no such buffer.
    """
    name = "deepspeed_allreduce_buffer_{}_{MASTER_ADDR}_{MASTER_PORT}_{RANK}".format(os.getuid(), **os.environ)
    Path("/dev/shm", name).unlink(missing_ok=True)


def _release_compilation() -> None:
    """Remove the lock of a compilation that ends with this process, for which every later one would wait (torch 2.10).

    torch takes it as each process begins, to see whether anything is to be compiled, and keeps the file open while it has it.
    """
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = ("/torch_extensions/", os.path.realpath(named)) if named else ("/torch_extensions/",)
    for entry in os.scandir("/proc/self/fd"):
        with suppress(OSError):
            path = os.readlink(entry.path)
            if path.endswith("/lock") and any(folder in path for folder in folders):
                os.unlink(path)


def end_process(status: int) -> NoReturn:
    """End this process with that status at once, with what it has printed and without exit handlers (0.19.8).

    DeepSpeed's references keep gloo's threads alive. One that lets go of a tensor while the interpreter shuts down aborts the
    process: one run in fourteen ended in SIGABRT after it had written everything. And exit handlers of a process group can wait
    for peers that wait for this process.
    """
    with suppress(OSError):  # whoever read what this process prints may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    with suppress(OSError):
        _release_compilation()
    os._exit(status)
