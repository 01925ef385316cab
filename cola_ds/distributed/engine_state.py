"""The optimizer's state in an engine, as a checkpoint keeps it: fp32 masters, moments, step counts, loss scale, random states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from cola_ds.distributed.accelerator import device
from cola_ds.distributed.deepspeed_internals import (
    MasterPart,
    flat_masters,
    loss_scale_state,
    master_part,
    set_loss_scale_state,
)
from cola_ds.distributed.engine import Engine
from cola_ds.distributed.shards import Part, numel, shape_of

__all__ = [
    "kept",
    "loss_scale_state",
    "optimizer_scalars",
    "own_parts",
    "random_state",
    "set_loss_scale_state",
    "set_optimizer_scalars",
    "set_random_state",
    "set_trained_tensor",
    "state_kinds",
    "trained",
    "trained_tensors",
]

_ELEMENTS_AT_ONCE = 2**26  # 256 MiB of fp32: bounds what a checkpoint takes on the device at a time


def trained(engine: Engine) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by name."""
    return {name: param for name, param in engine.module.named_parameters() if param.requires_grad}


def optimizer_scalars(engine: Engine) -> dict[str, float]:
    """The numbers that the optimizer keeps beside its moments, such as Adam's step count; none before its first step."""
    found: dict[str, float] = {}
    for state in engine.optimizer.optimizer.state.values():
        found |= {key: float(value) for key, value in state.items() if value.numel() == 1}
    return found


def state_kinds(engine: Engine) -> list[str]:
    """What the optimizer keeps of every element: its master and, from the first step on, moments."""
    state = engine.optimizer.optimizer.state
    return ["master", *sorted({k for values in state.values() for k, value in values.items() if value.numel() > 1})]


def own_parts(engine: Engine, kinds: Iterable[str]) -> Iterator[Part]:
    """What this process keeps of masters and moments, without padding: over all processes every element once. Moments that the
    optimizer has not begun yet are begun, at zero."""
    for kind in kinds:
        for name, param in trained(engine).items():
            part = master_part(engine.optimizer, param)
            if part:
                yield Part(f"{kind}/{name}", shape_of(param), part.start, part.of(kept(engine, kind, part).detach()))


def kept(engine: Engine, kind: str, part: MasterPart) -> Tensor:
    """The optimizer's own flat master or moment that a part lies in."""
    if kind == "master":
        return part.flat
    state = engine.optimizer.optimizer.state[part.flat]
    if kind not in state:
        state[kind] = torch.zeros_like(part.flat)
    held: Tensor = state[kind]
    return held


def trained_tensors(engine: Engine) -> Iterator[dict[str, Tensor]]:
    """The fp32 master and the moments of every trained parameter, whole, by names such as `master/NAME` and `exp_avg/NAME`.

    In pieces of bounded size: on process 0 tensors in host memory, elsewhere empty dicts. Collective, piece by piece.
    """
    piece: list[tuple[str, nn.Parameter, str]] = []
    count = 0
    for kind in state_kinds(engine):
        for name, param in trained(engine).items():
            if piece and count + numel(param) > _ELEMENTS_AT_ONCE:
                yield _gather_piece(engine, piece, count)
                piece, count = [], 0
            piece.append((name, param, kind))
            count += numel(param)
    yield _gather_piece(engine, piece, count)


@torch.no_grad()
def _gather_piece(engine: Engine, piece: list[tuple[str, nn.Parameter, str]], count: int) -> dict[str, Tensor]:
    # Every element is some process's own and zero elsewhere: the sum of their bits as integers is the element, bit for bit. A sum
    # for process 0 alone moves half of what one for all would; a gather would need connections from it to all.
    whole = torch.zeros(count, dtype=torch.int32, device=device())
    begin = 0
    for _, param, kind in piece:
        part = master_part(engine.optimizer, param)
        if part:
            held = kept(engine, kind, part).detach()
            whole[begin + part.start :][: part.count].copy_(part.of(held).float().view(torch.int32))
        begin += numel(param)
    dist.reduce(whole, dst=0)
    if dist.get_rank():
        return {}
    shapes = [shape_of(param) for _, param, _ in piece]
    pieces = whole.cpu().view(torch.float32).split([numel(param) for _, param, _ in piece])
    return {
        f"{kind}/{name}": values.reshape(shape).clone()
        for (name, _, kind), shape, values in zip(piece, shapes, pieces, strict=True)
    }


@torch.no_grad()
def set_trained_tensor(engine: Engine, kind: str, param: nn.Parameter, whole: Tensor) -> None:
    """Put a whole master or moment (flat, on this process's device) where the engine keeps it."""
    part = master_part(engine.optimizer, param)
    if part:
        part.of(kept(engine, kind, part).detach()).copy_(whole[part.start :][: part.count])


@torch.no_grad()
def set_optimizer_scalars(engine: Engine, scalars: dict[str, float]) -> None:
    """Give the optimizer the numbers that `optimizer_scalars` found."""
    # Not those in the optimizer's groups: at stage 3 these are empty between steps.
    optimizer = engine.optimizer
    fused = optimizer.optimizer.defaults.get("fused")
    for flat in flat_masters(optimizer):
        for key, value in scalars.items():
            # Where their own first step would make them: fused optimizers beside the moments, others in host memory.
            made = torch.zeros((), device=flat.device if fused else None)
            optimizer.optimizer.state[flat].setdefault(key, made).fill_(value)


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
