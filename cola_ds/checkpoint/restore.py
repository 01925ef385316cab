"""Restoring a run from a checkpoint. Collective: process 0 reads, and sends to the others; of a checkpoint in shards (method
full) each process reads what it keeps."""

from __future__ import annotations

import json
import socket
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cola_ds.checkpoint.format import Checkpoint, SavedState, hash_of
from cola_ds.checkpoint.shards import SHARD, find, nearest_first, read_header, take
from cola_ds.checkpoint.store import CheckpointFolder
from cola_ds.config.schema import RunConfig
from cola_ds.distributed import accelerator, collectives
from cola_ds.distributed.engine import Engine
from cola_ds.distributed.engine_state import (
    own_parts,
    set_loss_scale_state,
    set_optimizer_scalars,
    set_random_state,
    set_trained_tensor,
    trained,
)
from cola_ds.distributed.launcher import Process
from cola_ds.distributed.shards import Part, local_shard, numel, shape_of
from cola_ds.errors import UserError, first_line
from cola_ds.lora.layers import LoRALinear, frozen_factors, lora_layers
from cola_ds.lora.remainders import Remainder
from cola_ds.lora.starts import begin_link
from cola_ds.lora.targets import any_transposed
from cola_ds.lora.tie import Links, put_whole, tie_link
from cola_ds.run.folder import RunDir
from cola_ds.run.peft_files import is_bias, lora_names, read_link

# Masters, and the moments of torch's AdamW and AdaGrad.
_KINDS = {"master", "exp_avg", "exp_avg_sq", "sum"}
_FROZEN = "frozen"


@dataclass(frozen=True)
class _Shards:
    """The shard files of a checkpoint, as one process sees them: those first in which it will find what it keeps."""

    path: Path
    files: list[Path]
    kinds: list[str]


def restore_model(
    model: nn.Module, config: RunConfig, link: int, found: Checkpoint | None, remainders: dict[str, Remainder],
    earlier: dict[str, Links], process: Process, drawn_before: int = 0,
) -> None:  # fmt: skip
    """Tie the links before `link` again, in order, and give the trained parameters their values. Before the engine is built.
    `drawn_before`: as `begin_link` has it.

    The same arithmetic as at the knots, on the same shards: the same bits. `found` is None on every process but 0.
    """
    device = accelerator.device()
    collectives.on_rank_0(lambda: _check_links(model, config, link, found))
    exact = config.chain.merge == "exact"
    for past in range(1, link):
        tensors = read_link(found.link_path(past)) if found else {}
        lora_rank = config.tied_rank(past)
        _tie_again(
            model,
            lora_rank,
            config.tied_alpha(past) / lora_rank,
            tensors,
            remainders,
            earlier,
            config.chain.tie == "local",
            exact,
        )
    if config.trains_lora:
        begin_link(model, config, link, device, drawn_before)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if shards := _open_shards(found, process):
        parts = [(name, *local_shard(param)) for name, param in params.items()]
        wanted = [Part(f"master/{name}", shape_of(params[name]), start, part) for name, part, start in parts]
        _take_own(shards, wanted, params, process)
        return
    frozen = frozen_factors(model)
    collectives.on_rank_0(lambda: _check_shapes(found, params, frozen))
    held = {**params, **frozen}  # no name is in both
    for name, _, whole in _from_process_0(found, held, ("master", _FROZEN)):
        put_whole(held[name], whole)


def _tie_again(
    model: nn.Module, lora_rank: int, scaling: float, tensors: dict[str, Tensor], remainders: dict[str, Remainder],
    earlier: dict[str, Links], local: bool, exact: bool,
) -> None:  # fmt: skip
    """Tie a link that process 0 has read, as the run did. Collective."""
    for name, layer in lora_layers(model).items():
        lora_A, lora_B = (
            collectives.broadcast_tensor(tensors.get(key), shape[0] * shape[1]).view(shape)
            for key, shape in zip(lora_names(name), _shapes(layer, lora_rank), strict=True)
        )
        layer.reset(lora_A, scaling, accelerator.device())
        layer.lora_B.data.copy_(lora_B)
    tie_link(model, remainders, earlier, local=local, exact=exact, last=False, keep_tensors=False)


def _check_links(model: nn.Module, config: RunConfig, link: int, found: Checkpoint | None) -> None:
    assert found is not None
    for past in range(1, link):
        lora_rank = config.tied_rank(past)
        expected: dict[str, tuple[int, ...]] = {}
        for name, layer in lora_layers(model).items():
            expected |= zip(lora_names(name), _shapes(layer, lora_rank), strict=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in read_link(found.link_path(past)).items()}
        _refuse_misfit(found.link_path(past), {k: v for k, v in shapes.items() if not is_bias(k)}, expected)


def _shapes(layer: LoRALinear, lora_rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and B."""
    return (lora_rank, layer.in_features), (layer.out_features, lora_rank)


def _check_shapes(found: Checkpoint | None, params: dict[str, nn.Parameter], frozen: dict[str, Tensor]) -> None:
    assert found is not None
    shapes = found.shapes()
    kinds = {key.partition("/")[0] for key in shapes} - {_FROZEN} | {"master"}
    _check_kinds(found.path, kinds)
    _refuse_misfit(found.path, shapes, _expected(kinds, params) | _expected([_FROZEN], frozen))


def _check_kinds(path: Path, kinds: set[str]) -> None:
    if not kinds <= _KINDS:
        raise UserError(f"checkpoint {path} holds {', '.join(sorted(kinds - _KINDS))}, which no optimizer here keeps")


def _expected(kinds: Iterable[str], params: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of all masters and moments."""
    return {f"{kind}/{name}": shape_of(param) for kind in kinds for name, param in params.items()}


def _refuse_misfit(path: Path, shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        raise UserError(
            f"checkpoint {path} does not fit the model: it has {wrong[0]} of shape {shapes.get(wrong[0])}, "
            f"the model wants {expected.get(wrong[0])}"
        )


def _from_process_0(found: Checkpoint | None, params: Mapping[str, Tensor], kinds: Container[str] | None) -> Any:
    """Name, kind and whole values (flat, fp32, on the device) of the saved tensors of `params`; of some kinds if they are given.
    Reads each file once. Collective."""
    keys = collectives.broadcast_object(list(found.shapes()) if found else None)
    held = found.trained() if found else None
    for expected in keys:
        key, tensor = next(held) if held else (expected, None)
        assert key == expected
        this, _, name = key.partition("/")
        if (kinds is None or this in kinds) and name in params:
            yield name, this, collectives.broadcast_tensor(tensor, numel(params[name]))


def _open_shards(found: Checkpoint | None, process: Process) -> _Shards | None:
    """The shards of a checkpoint that process 0 has verified; None where it has whole tensors. Collective. Raises UserError where
    a process does not see that checkpoint."""
    told = None
    if found and found.shards:
        told = {
            "path": str(found.path), "manifest": hash_of(found.path / "manifest.json"), "of": found.state.world_size,
        }  # fmt: skip
    told = collectives.broadcast_object(told)
    if told is None:
        return None
    path = Path(told["path"])

    def look() -> _Shards:
        manifest = path / "manifest.json"
        if hash_of(manifest) != told["manifest"]:
            raise UserError(
                f"checkpoint {path} on {socket.gethostname()} (process {process.rank}) is not the one that process 0 sees: each "
                "process reads its own part of it; put it on a shared file system"
            )
        names = filter(SHARD.fullmatch, json.loads(manifest.read_bytes())["files"])
        files = [path / name for name in nearest_first(names, process.rank, process.world_size, told["of"])]
        try:
            kinds = read_header(files[0])[0]
        except (ValueError, OSError, SafetensorError) as error:
            raise _unreadable(path, process, error) from None
        _check_kinds(path, set(kinds))
        return _Shards(path, files, kinds)

    return collectives.on_all(look)


def _unreadable(path: Path, process: Process, error: Exception) -> UserError:
    return UserError(
        f"checkpoint {path} cannot be read on {socket.gethostname()} (process {process.rank}): {first_line(error)}"
    )


def _take_own(shards: _Shards, wanted: Iterable[Part], params: dict[str, nn.Parameter], process: Process) -> None:
    """Read what is wanted here. Collective in so far as nobody reads where it does not fit somebody's model."""

    def look() -> Any:
        try:
            return find(shards.files, wanted, _expected(shards.kinds, params))
        except (OSError, SafetensorError) as error:
            raise _unreadable(shards.path, process, error) from None
        except ValueError as error:
            raise UserError(f"checkpoint {shards.path} does not fit the model: {error}") from None

    take(collectives.on_all(look))


def restore_engine(engine: Engine, saved: SavedState, found: Checkpoint | None, process: Process) -> None:
    """Give a new engine the masters, moments, step counts and loss scale that the checkpoint's had, and each process its random
    state."""
    params = trained(engine)
    shards = _open_shards(found, process)
    if shards:
        _take_own(shards, own_parts(engine, shards.kinds), params, process)
    for name, kind, whole in () if shards else _from_process_0(found, params, None):
        set_trained_tensor(engine, kind, params[name], whole)
    set_optimizer_scalars(engine, saved.scalars)
    set_loss_scale_state(engine, saved.loss_scale)
    _restore_random_state(found, saved.world_size, process)


def _restore_random_state(found: Checkpoint | None, world_size: int, process: Process) -> None:
    """Each process's own; at another world size they begin anew, from the seed and the step.

    All go to all at once: a few KiB of each process, where a message for each would take as long as there are processes.
    """
    if world_size != process.world_size:
        return
    states = found.random_states() if found else []
    sizes = collectives.broadcast_object([state.numel() for state in states])
    held = collectives.broadcast_bytes(torch.cat(states) if states else None, sum(sizes))
    set_random_state(held.split(sizes)[process.rank])


def restore_folder(
    folder: RunDir, skeleton: nn.Module, config: RunConfig, targets: list[str], found: Checkpoint
) -> Checkpoint:
    """Make the run's folder what it was when the checkpoint was written, with those before it. Returns the folder's own copy of
    it. On process 0 alone; `skeleton` is the model, without weights.

    Whatever is done of it when the process dies, the next start finds that checkpoint and does it again.
    """
    checkpoints = CheckpointFolder(folder)
    if found.path.parent.resolve() == checkpoints.path.resolve():
        checkpoints.set_aside(later_than=found.step)
    else:
        found = checkpoints.take_in(found)
    checkpoints.mark_best(found.state.chain.best_step)
    folder.go_back(found.state.rows.model_dump())
    for link in range(1, found.state.chain.link):
        transposed = any_transposed(skeleton, targets)
        folder.write_link(config, link, targets, read_link(found.link_path(link)), transposed)
    return found
