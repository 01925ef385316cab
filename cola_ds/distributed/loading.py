"""Loading a causal LM: under ZeRO-3 each process reads its own shards' bytes from the files, and nothing is sent.

Transformers builds the model and says which weight is which, as everywhere. What it would read on process 0 and send to all
others is read here by whoever keeps it; what it converts on the way, such as experts that are fused, still goes its way.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from deepspeed import comm as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from cola_ds import notices
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.schema import ModelConfig
from cola_ds.distributed.accelerator import DEVICE_ERRORS, device
from cola_ds.distributed.deepspeed_internals import shards_in
from cola_ds.distributed.nodes import Nodes, spread
from cola_ds.distributed.shards import local_shard
from cola_ds.distributed.weight_names import names_in_model, transformers_piece
from cola_ds.errors import UserError, counted, first_line


def load_model(
    config: ModelConfig, engine_config: dict[str, Any], attention: str | None = None, nodes: Nodes | None = None
) -> nn.Module:
    """Load a causal LM; under ZeRO-3 straight into shards. Collective.

    `attention` is Transformers' name of the attention that it gets; None: Transformers chooses. `nodes`: each of them keeps
    shards of its own; None: they lie on all processes.

    Under ZeRO-3 every process maps the files, and copies what belongs into its shards. At stage 2 every process holds the model,
    as that stage does.

    Raises UserError for weights that are damaged, incomplete or not safetensors.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # transformers shards while this object is alive, and only then: keep it until the model is loaded.
    sharded = engine_config["zero_optimization"]["stage"] == 3
    sharding = HfDeepSpeedConfig(engine_config) if sharded else None
    sent: list[str] = []
    try:
        shards = _into_shards(nodes, sent) if sharded else nullcontext()
        with _freed_memory_goes_back(), _one_voice(), _told(config.path, sharded), shards:
            model, loading = AutoModelForCausalLM.from_pretrained(
                config.path,
                revision=config.revision,
                dtype=getattr(torch, DTYPES[config.dtype].torch_name),
                trust_remote_code=config.trust_remote_code,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
            )
    except DEVICE_ERRORS:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights of model.path {config.path} cannot be loaded: {first_line(error)}") from None
    del sharding
    _check_keys(loading, config.path)
    if nodes:
        spread([param for name, param in model.named_parameters() if name in sent], nodes)
    if sent and dist.get_rank() == 0:
        what = f"{counted(len(sent), 'weight')}, such as {sent[0]}"
        notices.notice(f"process 0 reads and sends what is converted as it is loaded: {what}")
    if sharded:  # the shards are where they belong; what is neither parameter nor shard would stay on the host
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device())
    else:  # the engine would move it too, but a restored run ties its links before there is one
        model.to(device())
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _check_keys(loading: dict[str, Any], path: str) -> None:
    """Refuse a model that lacks weights, and warn of one that has others."""
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"model.path {path} lacks {counted(len(missing), 'weight')}, such as {missing[0]}: a damaged model"
        )
    if loading["unexpected_keys"] and dist.get_rank() == 0:
        unused = sorted(loading["unexpected_keys"])
        notices.warning(
            f"model.path {path} has {counted(len(unused), 'weight')} that this architecture does not use, such as "
            f"{unused[0]}; see whether its config.json is of the same model"
        )


@contextmanager
def _told(path: str, sharded: bool) -> Iterator[None]:
    """How far it is, as far as that is seen from here: of shards, `_read_own` says it."""
    speaks = dist.get_rank() == 0
    fetched = notices.waiting(f"loading {path}, from the hub or its cache", shown=speaks and not os.path.isdir(path))
    with fetched, notices.of_transformers("loading", "weight", shown=speaks and not sharded):
        yield


@contextmanager
def _into_shards(nodes: Nodes | None, sent: list[str]) -> Iterator[None]:
    """Transformers' loader for ZeRO-3 reads a process's own shards inside the block; what it still sends to them is
    added to `sent`, by name (read in 5.24)."""
    from transformers import modeling_utils

    plain_load = transformers_piece("modeling_utils", "_load_state_dict_into_zero3_model")
    plain_files = transformers_piece("modeling_utils", "load_state_dict")

    def load(model: Any, state_dict: dict[str, Tensor], load_config: Any = None) -> tuple[list[str], set[str]]:
        own = _own_weights(model, state_dict, load_config)
        _read_own(model, own)
        keys = {key for key, _ in own.values()}
        rest = {key: value for key, value in state_dict.items() if key not in keys}
        errors, missing = plain_load(model, rest, load_config)
        sent.extend(name for name, _ in model.named_parameters() if name not in own and name not in missing)
        return errors, missing - own.keys()

    def files(*args: Any, **words: Any) -> dict[str, Tensor]:
        return plain_files(*args, **{**words, "map_location": "cpu"})  # it maps them: what nobody looks at is not read

    modeling_utils._load_state_dict_into_zero3_model, modeling_utils.load_state_dict = load, files
    try:
        with shards_in(nodes.node if nodes else None):
            yield
    finally:
        modeling_utils._load_state_dict_into_zero3_model, modeling_utils.load_state_dict = plain_load, plain_files


def _own_weights(model: Any, state_dict: dict[str, Tensor], load_config: Any) -> dict[str, tuple[str, Tensor]]:
    """By parameter, the key and the tensor in the files that it is, as it lies there."""
    names = names_in_model(model, state_dict, getattr(load_config, "weight_mapping", None) or [])
    params = dict(model.named_parameters())
    own = {}
    for key, name in names.items():
        param: Any = params.get(name or "")
        if name and param is not None and tuple(state_dict[key].shape) == tuple(param.ds_shape):
            own[name] = (key, state_dict[key])
    return own


@torch.no_grad()
def _read_own(model: nn.Module, own: dict[str, tuple[str, Tensor]]) -> None:
    """Fill this process's shards. What process 0 says on the way is how much of the model it has passed, its own part read: the
    others are about as far with theirs."""
    whole = sum(tensor.nbytes for _, tensor in own.values())
    passed = 0
    with notices.Progress("loading", "B", whole, shown=dist.get_rank() == 0) as progress:
        for name, param in model.named_parameters():
            if name not in own:
                continue
            part, start = local_shard(param)
            mine = own[name][1].reshape(-1)[start : start + part.numel()]
            _announce(mine)
            part.copy_(mine)
            param._is_hf_initialized = True  # type: ignore[attr-defined]
            passed += own[name][1].nbytes
            progress.at(passed)


def _announce(mapped: Tensor) -> None:
    """Have the kernel read a part of a mapped file at once, not page by page as it is touched. Where it cannot, it is read so."""
    begin = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = ctypes.c_size_t(mapped.data_ptr() + mapped.nbytes - begin)
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and mapped.nbytes:
        madvise(ctypes.c_void_p(begin), size, mmap.MADV_WILLNEED)


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
