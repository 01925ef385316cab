"""What a link begins with where a draw is not enough: orthogonal to what came before, or at factors of its own (lora.init).
Collective, as is all here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.products import times, transposed_times
from cola_ds.lora.layers import LoRALinear, draw_factors, lora_layers
from cola_ds.lora.starts import (
    draw_sketch,
    gradient_factors,
    orthogonal_rows,
    orthonormal,
    pissa_factors,
    singular,
    sketch_width,
)
from cola_ds.lora.tie import put_whole
from cola_ds.training.first_gradient import GradientProducts
from cola_ds.training.state import Chain

_WEIGHT_ROUNDS, _GRADIENT_ROUNDS = 4, 1
"""How often the iteration is repeated: a round costs two products with each weight, or two passes over a step's examples."""


def place_start(chain: Chain, link: int) -> bool:
    """Give the link that has just been begun (drawn, and nothing else; the engine around it) what it begins with. Parameters must
    be in their shards, and are so afterwards.

    Returns whether a Parameter has new values, which the optimizer's masters must have from it (`restart_optimizer`). What a link
    starts at is none.
    """
    config = chain.config
    if config.lora.init == "orthogonal" and link > 1:
        _make_orthogonal(chain, link)
        return True
    if config.starts_elsewhere:
        watchdog.heartbeat(f"start of link {link}")
        layers = lora_layers(chain.engine.module)
        directions = _of_gradient(chain, link) if config.lora.init == "gradient" else _of_weights(chain, link)
        for name, U, S, V in directions:
            _start_at(layers[name], *_factors(chain, link, layers[name], U, S, V))
    return False


def _make_orthogonal(chain: Chain, link: int) -> None:
    """Whoever minds a layer's earlier links makes its A, and gives it to all."""
    config, lora_rank = chain.config, chain.config.lora_ranks[link - 1]
    for number, (name, layer) in enumerate(lora_layers(chain.engine.module).items()):
        shapes = (lora_rank, layer.in_features), (layer.out_features, lora_rank)
        lora_A = torch.zeros(shapes[0], device=accelerator.device())
        if collectives.falls_to_this_process(number):
            drawn, _ = draw_factors(config.run.seed, link, name, shapes, config.lora.init, config.lora_trains[link - 1])
            assert drawn is not None
            earlier = chain.state.earlier[name][0].to(accelerator.device())
            lora_A.copy_(orthogonal_rows(drawn.to(accelerator.device()), earlier))
        put_whole(layer.lora_A, collectives.all_reduce_sum(lora_A))  # zeros elsewhere: the same bits


def _of_weights(chain: Chain, link: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """The leading singular directions of each layer's weight, as it is: U, S, V."""
    for name, layer in lora_layers(chain.engine.module).items():
        # W^T lies where W is (in, out): each product is the other one then.
        by, by_transposed = (transposed_times, times) if layer.transposed else (times, transposed_times)
        Q = orthonormal(by(layer.weight, _sketch(chain, link, name, layer)))
        Z = by_transposed(layer.weight, Q)
        for _ in range(_WEIGHT_ROUNDS):
            Q = orthonormal(by(layer.weight, orthonormal(Z)))
            Z = by_transposed(layer.weight, Q)
        yield name, *singular(Q, Z)


def _of_gradient(chain: Chain, link: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Those of the gradient of each layer's weight, on the examples of the step that comes next.

    A pass meets all layers, so that Q (out, k) and Z (in, k) of all are there at once: of each one, and what comes of one of them
    takes its place.
    """
    products = GradientProducts(chain)
    Z = {name: _sketch(chain, link, name, layer) for name, layer in lora_layers(chain.engine.module).items()}
    Q: dict[str, Tensor] = {}
    for _ in range(1 + _GRADIENT_ROUNDS):
        Q.clear()
        Q = products.times(_orthonormal(Z))
        Z.clear()
        Z = products.transposed_times(_orthonormal(Q))
    for name in list(Z):
        yield name, *singular(Q.pop(name), Z.pop(name))


def _orthonormal(columns: dict[str, Tensor]) -> dict[str, Tensor]:  # by layer (n, k) -> (n, k)
    """An orthonormal basis in the place of what it spans, layer by layer."""
    for name in columns:
        columns[name] = orthonormal(columns[name])
    return columns


def _sketch(chain: Chain, link: int, name: str, layer: LoRALinear) -> Tensor:  # -> (in, k)
    k = sketch_width(chain.config.lora_ranks[link - 1], (layer.in_features, layer.out_features))
    return draw_sketch(chain.config.run.seed, link, name, (layer.in_features, k)).to(accelerator.device())


def _factors(
    chain: Chain, link: int, layer: LoRALinear, U: Tensor, S: Tensor, V: Tensor
) -> tuple[Tensor, Tensor]:  # -> (r, in), (out, r)
    """A0 and B0: those of process 0, on all. (Other processors round otherwise.)"""
    lora_rank = chain.config.lora_ranks[link - 1]
    if chain.config.lora.init == "pissa":
        A0, B0 = pissa_factors(U, S, V, lora_rank, layer.scaling)
    else:
        A0, B0 = gradient_factors(U, V, lora_rank)
    mine = torch.cat([A0.flatten(), B0.flatten()])
    both = collectives.broadcast_tensor(mine, mine.numel())
    return both[: A0.numel()].view_as(A0), both[A0.numel() :].view_as(B0)


def _start_at(layer: LoRALinear, A0: Tensor, B0: Tensor) -> None:
    assert layer.start_A is not None and layer.start_B is not None
    layer.start_A.copy_(A0)
    layer.start_B.copy_(B0)
